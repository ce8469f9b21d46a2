"""Host RAM as the kernel accounts it: of processes, of a control group, of the box."""

from collections.abc import Iterable
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_OWN = frozenset({"anon", "shmem", "kernel", "sock"})
"""Of memory.stat: what cannot be dropped like page cache. Pinned pages count as shmem
(docs.kernel.org/admin-guide/cgroup-v2.html)."""


def of_processes(pids: Iterable[int]) -> int | None:
    """MiB of their own: proportional shares of anonymous and shared memory, not of mapped files.

    None where none of them can be read. Takes milliseconds for each 10 GiB: not for the loop.
    """
    kib, known = 0, False
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        known = True
        kib += sum(
            int(row.split()[1]) for row in lines if row.startswith(("Pss_Anon:", "Pss_Shmem:"))
        )
    return kib // 1024 if known else None


def of_cgroup(group: str, root: Path = CGROUPS) -> int | None:
    """MiB charged to a control group and all below it, without page cache."""
    try:
        lines = (root / group.lstrip("/") / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    rows = (line.split() for line in lines)
    return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in _OWN) >> 20


def available_mib(path: Path = Path("/proc/meminfo")) -> int | None:
    """What could be had without swapping: free memory and page cache."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    rows = (line.split() for line in lines)
    return next((int(row[1]) // 1024 for row in rows if row[0] == "MemAvailable:"), None)


def pressure(path: Path = Path("/proc/pressure/memory")) -> float:
    """Percent of the last 10 s in which some task waited for memory; 0 without PSI.

    docs.kernel.org/accounting/psi.html
    """
    try:
        words = path.read_text().split()
    except OSError:
        return 0.0
    return next((float(w[6:]) for w in words if w.startswith("avg10=")), 0.0)
