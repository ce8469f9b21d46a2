"""One simulated box, shared by several simulator processes through a file.

The file is JSON, replaced atomically under a lock beside it. Holdings are keyed by process id and
start time; those of processes that are gone are dropped at each access, so `kill -9` frees memory
as on a real card. A holding named `foreign:NAME` belongs to nobody and stays: another program on
the GPU.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from homegptd.sim.physics import GIB, Box, Holding

_serial = itertools.count()


class Card(Protocol):
    """Somewhere a box lives; what happens inside `locked` happens at once for all who share it."""

    def locked(self) -> AbstractContextManager[Box]: ...


class MemoryCard:
    """A box inside this process."""

    def __init__(self, box: Box) -> None:
        self.box = box

    @contextmanager
    def locked(self) -> Iterator[Box]:
        yield self.box


class FileCard:
    """A box in a file, see the module's text."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[Box]:
        """The box under an exclusive lock; written back even when the block raises."""
        with Path(f"{self.path}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            box = _from_json(self.path.read_text())
            for owner in [o for o in box.holdings if not _alive(o)]:
                box.drop(owner)
            try:
                yield box
            finally:
                _write(self.path, box)


def new_box(gpus: int = 1, gpu_gb: float = 80, ram_gb: float = 128) -> Box:
    """A box of equal GPUs; sizes in GiB."""
    return Box({gpu: round(gpu_gb * GIB) for gpu in range(gpus)}, round(ram_gb * GIB))


def create(path: Path, box: Box) -> FileCard:
    """Write a fresh card file over whatever was there."""
    _write(path, box)
    return FileCard(path)


def owner_id() -> str:
    """A name for a new holding of this process: pid, start time, serial number."""
    pid = os.getpid()
    return f"{pid}:{_start_time(pid)}:{next(_serial)}"


def _alive(owner: str) -> bool:
    if owner.startswith("foreign:"):
        return True
    pid, start, _ = owner.split(":")
    return _start_time(int(pid)) == int(start)


def _start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat (proc(5)); -1 when the process is gone or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    fields = stat.rpartition(")")[2].split()
    return -1 if fields[0] in "ZX" else int(fields[19])


def _from_json(text: str) -> Box:
    raw = json.loads(text)
    holdings = {
        owner: Holding({int(g): m for g, m in h["gpu_mib"].items()}, h["pinned_mib"], h["host_mib"])
        for owner, h in raw["holdings"].items()
    }
    gpus = {int(gpu): mib for gpu, mib in raw["gpu_total_mib"].items()}
    return Box(gpus, raw["ram_total_mib"], holdings)


def _write(path: Path, box: Box) -> None:
    fresh = Path(f"{path}.new")
    fresh.write_text(json.dumps(asdict(box)))
    fresh.replace(path)


def show(box: Box) -> str:
    """The box in a few lines for a person."""
    lines = [
        f"gpu {gpu}: {box.used_mib(gpu)} of {total} MiB used, {box.free_mib(gpu)} free"
        for gpu, total in sorted(box.gpu_total_mib.items())
    ]
    ram = f"{box.ram_used_mib()} of {box.ram_total_mib} MiB used, {box.ram_free_mib()} free"
    lines.append(f"ram: {ram}")
    for owner, h in sorted(box.holdings.items()):
        gpus = " ".join(f"gpu{g}={m}" for g, m in sorted(h.gpu_mib.items()))
        lines.append(f"  {owner}: {gpus} pinned={h.pinned_mib} host={h.host_mib}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`python -m homegptd.sim card PATH …`: make, show or burden a card file."""
    parser = argparse.ArgumentParser(prog="python -m homegptd.sim card", description=main.__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--gpus", type=int, default=1, help="how many GPUs a new card has")
    parser.add_argument("--gpu-gb", "--total-gb", type=float, default=80.0, help="GiB of each GPU")
    parser.add_argument("--ram-gb", type=float, default=128.0, help="GiB of host memory")
    parser.add_argument("--show", action="store_true", help="show an existing card, change nothing")
    parser.add_argument("--json", action="store_true", help="with --show: as JSON")
    parser.add_argument("--hold", metavar="NAME=GB[@GPU]", help="let a foreign program take memory")
    parser.add_argument("--release", metavar="NAME", help="let a foreign program give it back")
    args = parser.parse_args(argv)
    if not (args.show or args.hold or args.release):
        create(args.path, new_box(args.gpus, args.gpu_gb, args.ram_gb))
        return 0
    if not args.path.exists():
        parser.exit(1, f"no card at {args.path}\n")
    with FileCard(args.path).locked() as box:
        if args.hold:
            name, _, size = args.hold.partition("=")
            gb, _, gpu = size.partition("@")
            box.take(f"foreign:{name}", int(gpu or 0), round(float(gb) * GIB))
        if args.release:
            box.drop(f"foreign:{args.release}")
        sys.stdout.write((json.dumps(asdict(box)) if args.json else show(box)) + "\n")
    return 0
