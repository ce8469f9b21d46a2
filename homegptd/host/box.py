"""What the box has: cards, memory, disk, caches of weights. Nothing here fails; it knows or not."""

import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from .commands import run
from .places import Places

_QUERY = "index,name,memory.total,memory.used,driver_version"
_CONTROLLERS = Path("/sys/fs/cgroup/cgroup.controllers")


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as nvidia-smi tells it."""

    index: int
    name: str
    total_mib: int
    used_mib: int
    driver: str


def cards() -> list[Card]:
    """Empty where there are none, or no driver."""
    done = run("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits", limit_s=20)
    rows = [[part.strip() for part in row.split(",")] for row in done.out.splitlines()]
    return [
        Card(int(row[0]), row[1], int(row[2]), int(row[3]), row[4])
        for row in rows
        if done.code == 0 and len(row) == 5 and all(row[at].isdecimal() for at in (0, 2, 3))
    ]


def ram_mib() -> int:
    """0 where /proc does not say."""
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(row.split()[1]) // 1024 for row in rows if row.startswith("MemTotal:")), 0)


def limits_memory() -> bool:
    """Whether the kernel's memory controller is there, without which MemoryMax= is but a word."""
    try:
        return "memory" in _CONTROLLERS.read_text().split()
    except OSError:
        return False


def free_gib(path: Path) -> float:
    """On the file system that `path` is, or will be, on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free / 2**30


def caches(places: Places) -> list[Path]:
    """Hugging Face caches: ours, then those of the environment and of the person who asks."""
    found = [places.hf_cache]
    if home := os.environ.get("HF_HOME"):
        found.append(Path(home))
    for name in (os.environ.get("SUDO_USER"), None):
        try:
            user = pwd.getpwnam(name) if name else pwd.getpwuid(os.geteuid())
        except KeyError:
            continue
        found.append(Path(user.pw_dir, ".cache", "huggingface"))
    return [path for path in dict.fromkeys(found) if (path / "hub").is_dir()]
