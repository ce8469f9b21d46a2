"""Checks of what runs the models: units, images, weights, secrets, closed doors."""

import stat
from collections.abc import Iterator
from pathlib import Path

from .apply import plan
from .commands import HostFault, run
from .doctor import Check, Finding, Patient
from .places import SOCKETS
from .podman_api import running
from .pull import has_secret, lacks_image, lacks_weights
from .render import CannotRender


def units(patient: Patient) -> Iterator[Finding]:
    try:
        planned = plan(patient.places)
    except (CannotRender, HostFault) as error:
        yield Finding("units", "fail", str(error), getattr(error, "hint", None))
        return
    if planned:
        count = len(planned.changes.writes) + len(planned.changes.removals)
        said = f"{count} differ from the configuration"
        yield Finding("units", "fail", said, "sudo homegptctl apply")
        return
    lost = [model.unit for model in patient.config.models if not _loaded(model.unit)]
    if lost:
        said = f"systemd has no {', '.join(lost)}"
        yield Finding("units", "fail", said, "sudo homegptctl apply; systemctl daemon-reload")
    else:
        yield Finding("units", "ok", "as configured")


def _loaded(unit: str) -> bool:
    return run("systemctl", "show", "-pLoadState", "--value", unit).out.strip() == "loaded"


def images(patient: Patient) -> Iterator[Finding]:
    if not patient.root:
        yield Finding("images", "skip", "only root sees them", "sudo homegptctl doctor")
        return
    names = [m.engine.image for m in patient.config.models if m.engine is not None]
    if patient.config.webui.enabled:
        names.append(patient.config.webui.image)
    try:
        lost = [name for name in dict.fromkeys(names) if lacks_image(name)]
    except HostFault as fault:
        yield Finding("images", "fail", fault.message, fault.hint)
        return
    if lost:
        mend = " && ".join(f"sudo podman pull {name}" for name in lost)
        yield Finding("images", "fail", f"not here: {', '.join(lost)}", mend)
    else:
        yield Finding("images", "ok", f"{len(set(names))} present")


def weights(patient: Patient) -> Iterator[Finding]:
    lost = [
        model.id
        for model in patient.config.models
        if model.engine is not None and lacks_weights(model.engine, patient.places)
    ]
    if lost:
        mend = " && ".join(f"sudo homegptctl pull {name}" for name in lost)
        said = f"fetched at the first start: {', '.join(lost)}"
        yield Finding("weights", "warn", said, mend)
    else:
        yield Finding("weights", "ok", "complete")


def secrets(patient: Patient) -> Iterator[Finding]:
    name = patient.config.secrets.hf_token
    if name is None:
        return
    if not patient.root:
        yield Finding("secrets", "skip", "only root sees them", "sudo homegptctl doctor")
    elif has_secret(name):
        yield Finding("secrets", "ok", name)
    else:
        mend = f"sudo podman secret create {name} FILE"
        yield Finding("secrets", "fail", f"podman has no secret {name}", mend)


def containers(patient: Patient) -> Iterator[Finding]:
    """What runs, by Podman's own account, and whether it has doors to the outside."""
    if not patient.root:
        yield Finding("containers", "skip", "only root sees them", "sudo homegptctl doctor")
        return
    names = [model.unit.removesuffix(".service") for model in patient.config.models]
    try:
        found = running(names)
    except HostFault as fault:
        yield Finding("containers", "skip", fault.message, fault.hint)
        return
    sizes = (f"{name} {one.memory_mib / 1024:.1f} GB" for name, one in found.items())
    yield Finding("containers", "ok", ", ".join(sizes) or "none runs")
    wrong = [f"{name} at {port}" for name, one in found.items() for port in one.ports]
    if wrong:
        mend = "take PublishPort= out of the unit, and give the model an engine: in the file"
        yield Finding("ports of engines", "warn", f"open to the box: {', '.join(wrong)}", mend)


def closed(patient: Patient) -> Iterator[Finding]:
    """No engine may be reached but by the daemon: dev mode has no locks of its own."""
    wrong = [row for model in patient.config.models for row in _open(patient, model.id)]
    if wrong:
        mend = "sudo homegptctl apply; a unit of your own: --uds, in a folder of mode 2750"
        yield Finding("closed", "fail", "; ".join(wrong), mend)
    else:
        yield Finding("closed", "ok", "engines' sockets are the daemon's alone")


def _open(patient: Patient, ident: str) -> Iterator[str]:
    folder = patient.places.at(f"{SOCKETS}/{ident}")
    for path in (folder, folder / "engine.sock"):
        mode = _mode(path)
        if mode is not None and mode & stat.S_IRWXO:
            yield f"{path} is open to everybody"


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, PermissionError):
        return None


ENGINES: tuple[Check, ...] = (units, images, weights, secrets, containers, closed)
