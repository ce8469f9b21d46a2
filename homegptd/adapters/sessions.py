"""Sessions, as /proc shows them: who lives in one, signals to all of it, the end by pidfds.

An engine leads a session of its own, so session, process group and leader share one number, which
together with the leader's start time names one run for ever. Nothing here polls: the kernel makes
a pidfd (`pidfd_open(2)`) readable when its process ends.
"""

import asyncio
import json
import logging
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """What the next daemon needs to adopt an engine: one small JSON file each."""

    model: str
    pid: int
    """Also its process group and session."""
    start_ticks: int
    """Field 22 of /proc/PID/stat; with `boot` and `pid` it names one process for ever."""
    boot: str
    started_at: float
    """Unix seconds."""
    fingerprint: str

    @classmethod
    def of(cls, model: str, pid: int, fingerprint: str) -> "Record":
        """Of a process that was just started. Raises OSError where /proc cannot be read."""
        proc = _proc(pid)  # None if it has ended already: then there is nothing to adopt either
        ticks = 0 if proc is None else proc.start_ticks
        return cls(model, pid, ticks, boot_id(), _started_at(ticks), fingerprint)

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """None, with a warning, where the file does not hold one."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            log.warning("ignored the record of an engine: %s: %s", path, error)
            return None

    def write(self, path: Path) -> None:
        """All of it or nothing. Raises OSError."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        try:
            draft.write_text(json.dumps(asdict(self)))
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise


@dataclass(frozen=True, slots=True)
class Proc:
    """A living process, as far as /proc tells who it belongs to."""

    pid: int
    pgrp: int
    session: int
    start_ticks: int


@dataclass(slots=True)
class Run:
    """One run of an engine, watched until its leader ends."""

    record: Record
    pidfd: int | None
    log: Path | None
    child: "subprocess.Popen[bytes] | None" = None
    code: int | None = None
    stopping: bool = False
    unwritten: bool = False
    """Its record could not be written yet."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        if self.pidfd is None:
            self.ended.set()
        else:
            asyncio.get_running_loop().add_reader(self.pidfd, self._on_end, self.pidfd)

    @classmethod
    def adopted(cls, record: Record, log_path: Path | None) -> "Run | None":
        """None if its leader is not there any more."""
        try:
            pidfd = os.pidfd_open(record.pid)
        except OSError:
            return None
        proc = _proc(record.pid)  # after the pidfd was taken: it cannot become another one now
        if proc is None or proc.start_ticks != record.start_ticks:
            os.close(pidfd)
            return None
        return cls(record, pidfd, log_path)

    def how_it_ended(self) -> str:
        match self.code:
            case None:
                return "ended; its exit code is unknown, an earlier daemon had started it"
            case code if code < 0:
                return f"killed by {signal.Signals(-code).name}"
            case code:
                return f"exited with code {code}"

    def _on_end(self, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        if self.child is not None:
            self.code = self.child.wait()  # at once: a readable pidfd means it has ended
        if not self.stopping:
            signal_session(self.record, signal.SIGKILL)
        self.ended.set()


def _proc(pid: int) -> Proc | None:
    """None where it has ended, zombies included. See proc_pid_stat(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return Proc(pid, int(fields[2]), int(fields[3]), int(fields[19]))


def members_of(record: Record) -> list[Proc]:
    """Who lives in the engine's session or group.

    The kernel gives a pid to nobody new while a session or group of that number has members; a
    member older than the leader, though, means the number was taken anew after all had ended.
    """
    procs = (_proc(int(name)) for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208
    members = [
        proc for proc in procs if proc is not None and record.pid in (proc.session, proc.pgrp)
    ]
    reused = any(p.pid == record.pid and p.start_ticks != record.start_ticks for p in members)
    return [] if reused else members


def signal_session(record: Record, number: signal.Signals) -> None:
    """Signal everybody in it, its GPU workers too."""
    for pgrp in {proc.pgrp for proc in members_of(record)}:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pgrp, number)
            os.killpg(pgrp, signal.SIGCONT)  # a stopped process would never see the first one


async def emptied(record: Record) -> None:
    """Return once nobody lives in it any more. Without a limit of its own."""
    while members := members_of(record):
        for proc in members:
            await _exited(proc.pid)


async def _exited(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def leftover(record: Record) -> str:
    """For an error: who still lives in it."""
    pids = " ".join(str(proc.pid) for proc in members_of(record))
    return f"processes {pids} are left"


def boot_id() -> str:
    """Of this boot of the kernel: pids and start times mean nothing in the next one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started_at(ticks: int) -> float:
    """Unix seconds of a start time in clock ticks since boot."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return int(line.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def remove(path: Path) -> None:
    """Delete a record, if it is there."""
    with suppress(OSError):
        path.unlink()
