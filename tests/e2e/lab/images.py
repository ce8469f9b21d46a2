"""The simulated engine as a container image: Debian's Python, aiohttp and `homegptd.sim`.

The part from Debian is made from the lab's own root and cached; the simulator is added anew each
time. Quadlet's `Exec=` takes what `vllm serve` would: the entrypoint is the simulator's `serve`.
"""

import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from . import roots
from .machine import REPO, Machine

IMAGE = "localhost/homegpt-sim:1"
ENTRYPOINT = ("python3", "-m", "homegptd.sim", "serve")
_NEEDS = ("python3-aiohttp", "busybox-static")
_NOT = {"debconf", "perl-base", "dpkg", "tar", "ca-certificates", "media-types", "openssl"}
_USR_MERGE = ("bin", "sbin", "lib", "lib64")
# files of the packages and all they depend on, with the byte code that dpkg does not know of
_LIST = r"""
set -eu
needs="$*"
apt-cache depends --recurse --installed --no-recommends --no-suggests --no-conflicts \
    --no-breaks --no-replaces --no-enhances $needs | grep '^[a-z]' | cut -d: -f1 | sort -u
"""


def engine_tar() -> Path:
    """An image of the working tree's simulator, cached by its content."""
    base = _debian_part()
    with tempfile.NamedTemporaryFile(suffix=".tar", dir=roots.cache(), delete=False) as file:
        path = Path(file.name)
    subprocess.run(["cp", "--reflink=auto", base, path], check=True)
    with tarfile.open(path, "a") as tar:
        for source in [REPO / "homegptd/__init__.py", *(REPO / "homegptd/sim").glob("*.py")]:
            tar.add(source, arcname=f"opt/{source.relative_to(REPO)}")
    return path


def load_engine(machine: Machine, *names: str) -> None:
    """Import the image and give it more names, say that of the real one. About 2 s."""
    path = engine_tar()
    try:
        with path.open("rb") as file:
            changes = [f"ENTRYPOINT {json.dumps(ENTRYPOINT)}", "ENV PYTHONPATH=/opt"]
            words = [f"--change={change}" for change in changes]
            machine.run("podman", "import", "-q", *words, "-", IMAGE, stdin=file.read())
    finally:
        path.unlink()
    for name in names:
        machine.run("podman", "tag", IMAGE, name)


def _debian_part() -> Path:
    path = roots.cache() / f"engine-{roots.BASE.key}.tar"
    if path.exists():
        return path
    for old in roots.cache().glob("engine-*.tar"):
        old.unlink()
    with roots.lent(roots.BASE) as root:
        found = roots.offline(root, "sh", "-c", _LIST, "list", *_NEEDS).split()
        packages = [name for name in found if name not in _NOT]
        files = roots.offline(root, "dpkg", "-L", *packages).splitlines()
        names = sorted({name.lstrip("/") for name in files if _wanted(root, name)})
        part = path.with_suffix(".part")
        with tarfile.open(part, "w") as tar:
            for name in (*_USR_MERGE, *names):
                tar.add(root / name, arcname=name, recursive=False)
                for code in _byte_code(root / name):
                    tar.add(code, arcname=str(code.relative_to(root)))
            _add_folders(tar)
        part.rename(path)
    return path


def _wanted(root: Path, name: str) -> bool:
    """Files alone: their folders are made by whoever unpacks."""
    path = root / name.lstrip("/")
    litter = name.startswith(("/usr/share/", "/var/", "/etc/init.d"))
    return not litter and (path.is_file() or path.is_symlink()) and not path.parent.is_symlink()


def _byte_code(path: Path) -> list[Path]:
    if path.suffix != ".py":
        return []
    return list((path.parent / "__pycache__").glob(f"{path.stem}.cpython-*.pyc"))


def _add_folders(tar: tarfile.TarFile) -> None:
    for name, mode in (("tmp", 0o1777), ("run", 0o755), ("root", 0o700), ("var/tmp", 0o1777)):
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        tar.addfile(entry)
