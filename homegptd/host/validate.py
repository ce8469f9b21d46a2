"""Units are tried on podman's own generator and on systemd before anything is touched."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .commands import HostFault, run
from .places import QUADLETS, Places

GENERATORS = ("/usr/libexec/podman/quadlet", "/usr/lib/podman/quadlet")
_CHATTER = ("Loading source unit file", "quadlet-generator", "No files parsed")


def validate(files: Mapping[str, str], places: Places) -> None:
    """Try the files together with the administrator's drop-ins.

    Raises: HostFault with what the generator or systemd said.
    """
    quadlet = next((path for path in GENERATORS if Path(path).exists()), None)
    if quadlet is None:
        raise HostFault("cannot check the units: podman has no quadlet here", "apt install podman")
    with tempfile.TemporaryDirectory(prefix="homegpt-") as name:
        units, made = Path(name, "units"), Path(name, "made")
        _stage(files, places, units)
        made.mkdir()
        env = {**os.environ, "QUADLET_UNIT_DIRS": str(units)}
        tried = run(quadlet, "-dryrun", env=env)
        if tried.code:
            raise HostFault(f"podman would refuse the units:\n{_said(tried.err, name)}")
        run(quadlet, "-no-kmsg-log", str(made), env=env)
        _verify(made, name)


def _stage(files: Mapping[str, str], places: Places, units: Path) -> None:
    units.mkdir()
    for name, text in files.items():
        (units / name).write_text(text)
    beside = places.at(QUADLETS).parent
    for drop_ins in beside.glob("*.d") if beside.is_dir() else ():
        if drop_ins.is_dir():
            shutil.copytree(drop_ins, units / drop_ins.name)


def _verify(made: Path, staged: str) -> None:
    """Without --recursive-errors=no it says what is wrong and exits 0 (systemd 257)."""
    services = sorted(map(str, made.glob("*.service")))
    if not services or shutil.which("systemd-analyze") is None:
        return
    done = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *services)
    if done.code:
        raise HostFault(f"systemd would refuse the units:\n{_said(done.err, staged)}")


def _said(text: str, staged: str) -> str:
    rows = [row.strip().replace(f"{staged}/", "") for row in text.splitlines()]
    told = [row for row in rows if row and not any(word in row for word in _CHATTER)]
    return "\n".join(f"  {row}" for row in told or rows)
