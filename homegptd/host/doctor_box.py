"""Checks of the box itself: programs, cards, memory, disk, ports, rights."""

import errno
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import yaml

from .additions import missing_gib
from .box import free_gib, limits_memory, ram_mib
from .commands import run
from .doctor import Check, Finding, Patient
from .validate import GENERATORS

PODMAN = (4, 9)
SYSTEMD = 250
_CDI = ("etc/cdi", "run/cdi", "var/run/cdi")
_CDI_MEND = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
_HOST_GIB_PER_ENGINE = 4
_DISK_SPARE_GIB = 20
_PROCESSES = "/proc/driver/nvidia/version"


def podman(patient: Patient) -> Iterator[Finding]:
    done = run("podman", "--version")
    found = re.search(r"(\d+)\.(\d+)\S*", done.out)
    if found is None:
        yield Finding("podman", "fail", "is not installed", "sudo apt install podman")
        return
    good = (int(found[1]), int(found[2])) >= PODMAN
    mend = None if good else "install podman 4.9 or newer"
    yield Finding("podman", "ok" if good else "fail", found[0], mend)
    if not any(Path(path).exists() for path in GENERATORS):
        yield Finding("quadlet", "fail", "podman has no generator", "sudo apt install podman")
    places = ("/usr/libexec/podman/catatonit", "/usr/lib/podman/catatonit", "/usr/bin/catatonit")
    if not any(map(Path.exists, map(Path, places))):
        said = "no init for containers"
        yield Finding("catatonit", "fail", said, "sudo apt install catatonit")


def systemd(patient: Patient) -> Iterator[Finding]:
    done = run("systemctl", "--version")
    found = re.match(r"systemd (\d+)", done.out)
    good = found is not None and int(found[1]) >= SYSTEMD and Path("/run/systemd/system").is_dir()
    said = found[0] if found else "does not run here"
    yield Finding("systemd", "ok" if good else "fail", said, None if good else "boot with systemd")


def driver(patient: Patient) -> Iterator[Finding]:
    version = patient.places.at(_PROCESSES)
    if not version.exists():
        mend = "sudo apt install nvidia-driver, or the driver of your card's maker; then reboot"
        yield Finding("driver", "fail", "the NVIDIA kernel driver is not loaded", mend)
    elif not patient.cards:
        why = run("nvidia-smi", limit_s=20).why
        yield Finding("driver", "fail", f"nvidia-smi shows no card: {why}", "sudo reboot")
    else:
        names = ", ".join(f"{card.index}: {card.name}" for card in patient.cards)
        yield Finding("driver", "ok", f"{patient.cards[0].driver}; {names}")


def cdi(patient: Patient) -> Iterator[Finding]:
    """The names that units ask for must be in a specification; see cdi(5) of the toolkit."""
    known: set[str] = set()
    texts: list[str] = []
    for folder in _CDI:
        for path in sorted(patient.places.at(folder).glob("*.[jy]*")):
            text = path.read_text(errors="replace")
            known |= _devices(text)
            texts.append(text)
    models = [model for model in patient.config.models if model.engine is not None]
    lost = sorted({str(gpu) for model in models for gpu in model.gpus} - known, key=int)
    if lost:
        said = f"no specification for nvidia.com/gpu={', '.join(lost)}"
        yield Finding("CDI", "fail", said, _CDI_MEND)
    elif _stale(patient, texts):
        yield Finding("CDI", "fail", "the specification is of another driver version", _CDI_MEND)
    else:
        yield Finding("CDI", "ok", f"knows {', '.join(sorted(known))}")


def _devices(text: str) -> set[str]:
    """Names of a specification, JSON or YAML; nodes, since values are not for us to make."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return set()
    pairs = root.value if isinstance(root, yaml.MappingNode) else ()
    top = {key.value: value for key, value in pairs}
    if getattr(top.get("kind"), "value", "") != "nvidia.com/gpu":
        return set()
    devices = top["devices"].value if "devices" in top else []
    return {v.value for device in devices for k, v in device.value if k.value == "name"}


def _stale(patient: Patient, texts: list[str]) -> bool:
    versions = set(re.findall(r"libcuda\.so\.(\d+\.[\d.]+)", "".join(texts)))
    return bool(versions and patient.cards and patient.cards[0].driver not in versions)


def vram(patient: Patient) -> Iterator[Finding]:
    there = {card.index: card for card in patient.cards}
    if not there:
        yield Finding("VRAM", "skip", "no card to compare with")
        return
    wrong = [
        f"GPU {card.index}: configured {card.memory_mib} MiB, has {there[card.index].total_mib}"
        for card in patient.config.gpus
        if card.memory_mib and card.index in there
        and card.memory_mib > there[card.index].total_mib
    ]  # fmt: skip
    asked = {gpu for model in patient.config.models for gpu in model.gpus}
    wrong += [f"there is no GPU {gpu}" for gpu in sorted(asked - set(there))]
    if wrong:
        yield Finding("VRAM", "fail", "; ".join(wrong), "sudoedit /etc/homegpt/config.yaml")
        return
    total = sum(card.total_mib for card in there.values()) / 1024
    yield Finding("VRAM", "ok", f"{total:.0f} GB on {len(there)} GPUs")


def ram(patient: Patient) -> Iterator[Finding]:
    has = ram_mib() / 1024
    said = patient.config.available_ram_gb
    mend = "sudoedit /etc/homegpt/config.yaml"
    if said and said > has:
        text = f"switching.available_ram_gb is {said:g}, the box has {has:.0f} GB"
        yield Finding("RAM", "fail", text, mend)
        return
    models = [model for model in patient.config.models if model.startup_mode != "disabled"]
    asleep = sum(model.weights_mib for model in models if model.sleep_level != 2) / 1024
    needs = asleep + _HOST_GIB_PER_ENGINE * len(models)
    text = (
        f"{has:.0f} GB; all models asleep at level 1 take {needs:.0f} GB, up to twice the weights"
    )
    good = needs <= (said or has)
    hint = None if good else f"{mend}: sleep_level: 2 for some, or startup_mode: disabled"
    yield Finding("RAM", "ok" if good else "warn", text, hint)
    if not limits_memory():
        text = "the kernel limits no unit's memory (no cgroup v2 controller), so MemoryMax= is void"
        yield Finding("memory limits", "warn", text, "boot without cgroup_disable=memory")


def disk(patient: Patient) -> Iterator[Finding]:
    free = free_gib(patient.places.hf_cache)
    needs = missing_gib(patient.config, patient.places)
    text = f"{free:.0f} GB free for weights"
    if needs:
        text += f", about {needs:.0f} GB are still to be fetched"
    if free >= needs + _DISK_SPARE_GIB:
        yield Finding("disk", "ok", text)
    else:
        mend = f"make room on {patient.places.hf_cache}, or mount a larger disk there"
        yield Finding("disk", "fail" if free < needs else "warn", text, mend)


def ports(patient: Patient) -> Iterator[Finding]:
    config = patient.config
    if patient.running:
        yield Finding("ports", "ok", "homegpt runs and holds its own")
        return
    wanted = [(*_split(listen), "http.listen") for listen in config.http.listen]
    wanted += [("127.0.0.1", m.host_port, m.id) for m in config.models if m.host_port]
    if config.webui.enabled:
        wanted.append(("127.0.0.1", config.webui.port, "webui"))
    taken = [f"{port} ({whose})" for host, port, whose in wanted if _taken(host, port)]
    if taken:
        said = f"in use by somebody else: {', '.join(taken)}"
        yield Finding("ports", "fail", said, "sudo ss -ltnp")
    else:
        yield Finding("ports", "ok", ", ".join(str(port) for _, port, _ in wanted))


def _split(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def _taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def rights(patient: Patient) -> Iterator[Finding]:
    wrong = [
        f"{path} may be written by others"
        for path in (patient.places.config, patient.places.config.parent, patient.places.quadlets)
        if path.exists() and path.stat().st_mode & 0o002
    ]
    if wrong:
        path = wrong[0].partition(" ")[0]
        yield Finding("rights", "fail", "; ".join(wrong), f"sudo chmod o-w {path}")
    if run("getent", "passwd", "homegpt").code:
        said = "there is no user homegpt"
        yield Finding("user", "fail", said, "sudo systemd-sysusers homegpt.conf")
    if shutil.which("pkaction") is None:
        said = "is not installed, so the daemon may start nothing"
        yield Finding("polkit", "fail", said, "sudo apt install polkitd")
    elif patient.root and not patient.places.rule.exists():
        yield Finding("polkit", "fail", "the rule is missing", "sudo homegptctl apply")
    else:
        yield Finding("polkit", "ok", "installed")


BOX: tuple[Check, ...] = (systemd, podman, driver, cdi, vram, ram, disk, ports, rights)
