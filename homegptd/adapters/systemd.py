"""Engines as systemd units, Quadlet containers above all, driven over D-Bus.

What is known of units comes by signals: nothing polls, and no process is started on the way. The
engines belong to systemd; when the daemon ends they run on and the next one adopts them.
"""

import asyncio
import logging
import os
import signal
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from homegptd.core.model import Exit, ModelId, Running
from homegptd.core.refusals import Fault

from .dbus import BusError
from .journal_tail import newest_lines
from .systemd_manager import SYSTEMD, Manager, NoSystemd, Unit, exit_of

log = logging.getLogger(__name__)

JobType = Literal["stop", "restart", "other"]

_CANNOT_RUN = {
    125: "podman refuses to run it",
    126: "its container cannot be started",
    127: "its command is not in the image",
}
"""podman-run(1), "Exit Status": a configuration fault, the next try would end the same way."""
_BEFORE_THE_ENGINE = ("podman", "install", "rm", "sh")
"""Programs of a unit whose words are about its start; conmon's are the engine's own."""
_LATE_S = (0.1, 0.3, 0.6)
"""Looks at a journal that may come late: on a busy machine the end of a unit is known before."""
_LONGEST_NOTE = 200
"""Characters; a sha256 has 71."""
_DENIED = {
    "org.freedesktop.DBus.Error.AccessDenied",
    "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
}
_UNKNOWN = {f"{SYSTEMD}.NoSuchUnit", f"{SYSTEMD}.LoadFailed"}
_WRONG = {f"{SYSTEMD}.UnitMasked", f"{SYSTEMD}.BadUnitSetting"}


@dataclass(frozen=True, slots=True)
class EngineUnit:
    """The unit that runs a model's engine."""

    name: str
    """With its suffix: `vllm-coder.service`."""
    socket: Path | None = None
    """Where the engine will listen; a stale one is removed before a start, if we may."""
    image_note: Path | None = None
    """Where root writes down the digest of its image, just before each start."""


class SystemdUnits:
    """Fits `UnitsPort`. One loop; `address` is that of a bus other than the system's, for tests.

    Stopping is a stop job, which ends in SIGKILL after the unit's TimeoutStopSec= at the latest.
    It is hurried: SIGTERM again to the main process after `term_again_s` (a starting vLLM swallows
    the first one, 0.22 to 0.33; conmon passes it on), SIGKILL to all after `kill_after_s` more, and
    a `Fault` if something still lives `give_up_after_s` later. polkit must allow the verbs start,
    stop, kill and reset-failed for the units.
    """

    def __init__(
        self,
        units: Mapping[ModelId, EngineUnit],
        *,
        address: str | None = None,
        term_again_s: float = 2.0,
        kill_after_s: float = 8.0,
        give_up_after_s: float = 20.0,
    ) -> None:
        self._units = dict(units)
        self._used: dict[ModelId, EngineUnit] = {}
        self._manager = Manager(address)
        self._locks: defaultdict[ModelId, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._escalation = (
            ("main", signal.SIGTERM, term_again_s),
            ("all", signal.SIGKILL, kill_after_s),
        )
        self._stop_s = term_again_s + kill_after_s + give_up_after_s

    def replace(self, units: Mapping[ModelId, EngineUnit]) -> None:
        """A reload: from the next start on. What runs stays as it is, under its old unit's name."""
        self._units = dict(units)

    async def observe(self) -> Mapping[ModelId, Running]:
        """Engines that run now, whoever started them; one call, and one more for each of them."""
        names = {unit.name: model for model, unit in self._units.items()}
        (listed,) = await self._manager.call("ListUnitsByNames", "as", list(names))
        found: dict[ModelId, Running] = {}
        for name, _, _, active, *_ in listed:
            if name in names and active not in {"inactive", "failed"}:
                unit = await self._manager.watch(name)
                if unit.up:
                    model = names[name]
                    self._used[model] = self._units[model]
                    found[model] = Running(unit.main_pid, await self._since(unit))
        return found

    async def start(self, model: ModelId) -> None:
        """Start the unit; returns when its container runs. A no-op while it is active.

        Raises `Fault`: lasting where the unit, the container's settings or a right is wrong.
        """
        async with self._locks[model]:
            unit = await self._watch(model)
            if not unit.up:
                self._used.pop(model, None)
                unit = await self._watch(model)
                await self._forgive(unit)
                _remove_stale(self._units[model].socket)
            self._used.setdefault(model, self._units[model])
            result = await self._start(model, unit)
            if result == "failed" and unit.end().refused_by_podman:
                # a container whose conmon was killed can stand in the way once; podman 5.4.2 says
                # "conmon exited prematurely" and has removed it after that
                result = await self._start(model, unit)
            if result != "done":
                raise await self._cannot_start(model, unit, result)

    async def stop(self, model: ModelId) -> None:
        """Stop the unit and wait until nothing of it is left. Raises `Fault` if something is."""
        async with self._locks[model]:
            unit = await self._watch(model)
            try:
                async with asyncio.timeout(self._stop_s):
                    await self._stop(unit)
            except BusError as error:
                if error.name in _UNKNOWN and not unit.up:
                    return
                raise _not_ordered("stop", model, unit.name, error) from error
            except TimeoutError:
                text = f'cannot stop "{model}": {unit.name} is still {unit.active} after '
                hint = f"systemctl status {unit.name}"
                raise Fault(f"{text}{self._stop_s:.0f} s", hint=hint) from None
            await self._nothing_left(model, unit)

    async def gone(self, model: ModelId) -> Exit:
        """Return when the engine has ended, whatever systemd thinks of it; at once if none runs.

        A vLLM whose engine process died exits 0 and its unit is `inactive`, not `failed` (0.32).
        Never raises: while systemd is out of reach nobody knows, and it waits on.
        """
        unit = await self._seen(model)
        if not unit.up:
            return exit_of(unit.end()) if unit.code else Exit(None, "was not running")
        ends = unit.ends
        while unit.ends == ends:
            news = unit.news
            if unit.tie is None or unit.tie.lost:
                await self._seen(model)
            else:
                await news.wait()
        return exit_of(unit.last or unit.end())

    def image(self, model: ModelId) -> str:
        unit = self._unit_of(model)
        return "" if unit is None or unit.image_note is None else _noted(unit.image_note)

    async def log_tail(self, model: ModelId, lines: int) -> Sequence[str]:
        """From the journal where we may read it, else none; a process, so not for every day."""
        found = self._unit_of(model)
        if lines <= 0 or found is None:
            return ()
        told = await newest_lines(2 * lines, f"_SYSTEMD_UNIT={found.name}", "_COMM=conmon")
        return tuple(line for line in told if not line.startswith("conmon "))[-lines:]

    async def pids(self, model: ModelId) -> frozenset[int]:
        """Everybody in its unit, as the host counts them. Raises `Fault`."""
        return frozenset(await self._processes(await self._watch(model)))

    async def host_mib(self, model: ModelId) -> int | None:
        """RAM charged to its control group; None where nobody knows. Raises `Fault`."""
        return await self._manager.charged_mib(await self._watch(model))

    async def stop_all(self) -> None:
        """Stop every engine, all at the same time. Raises the `Fault` of one that survived."""
        faults: list[Fault] = []

        async def stop(model: ModelId) -> None:
            try:
                await self.stop(model)
            except Fault as fault:
                log.exception("engine survives")
                faults.append(fault)

        async with asyncio.TaskGroup() as group:
            for model in {**self._units, **self._used}:
                group.create_task(stop(model), name=f"stop {model}")
        if faults:
            raise faults[0]

    async def own_job_type(self) -> JobType | None:
        """Why we were told to end: systemd's job for our own unit; None if it has none.

        `stop` for `systemctl stop` and at shutdown, `restart` for restart and try-restart. Raises
        `Fault` if systemd cannot be asked.
        """
        try:
            (path,) = await self._manager.call("GetUnitByPID", "u", os.getpid())
            number, job = await self._manager.get(path, "Unit", "Job")
            kind = await self._manager.get(job, "Job", "JobType") if number else None
        except BusError as error:  # no unit of ours, or the job ended in this moment
            log.info("systemd knows no job of ours: %s", error)
            return None
        match kind:
            case None:
                return None
            case "stop":
                return "stop"
            case "restart":
                return "restart"
            case _:
                return "other"

    async def close(self) -> None:
        """Let go of the bus. Engines run on."""
        self._manager.close()

    # ------------------------------------------------------------ starting

    async def _start(self, model: ModelId, unit: Unit) -> str:
        """How the job ended; `unit` is fresh after it, unless it is done."""
        try:
            result = await self._manager.order("StartUnit", unit.name)
        except BusError as error:
            raise _not_ordered("start", model, unit.name, error) from error
        if result != "done":
            await self._watch(model)
        return "done" if result == "unknown" and unit.up else result

    async def _cannot_start(self, model: ModelId, unit: Unit, result: str) -> Fault:
        name = unit.name
        hint = f"journalctl -u {name} -n 20"
        text = f'cannot start "{model}": '
        match result:
            case "dependency":
                text += f"a unit that {name} needs did not start"
                return Fault(text, hint="systemctl list-units --failed")
            case "canceled":
                return Fault(f"{text}another job for {name} came first", hint=hint)
            case "timeout":
                return Fault(f"{text}systemd gave up on {name} (TimeoutStartSec=)", hint=hint)
            case _:
                pass
        end = unit.end()
        why = _CANNOT_RUN.get(end.status) if end.code == os.CLD_EXITED else None
        ended = exit_of(end)
        spoke = why is not None or ended.code is None
        words = await self._last_words(unit, _LATE_S if spoke else ())
        said = f": {words}" if words else ""
        if why is not None:
            return Fault(f"{text}{why} (exit {end.status}){said}", hint=hint, lasting=True)
        return Fault(f"{text}{name} {ended.detail}{said}", hint=hint)

    async def _last_words(self, unit: Unit, pauses: Sequence[float]) -> str:
        """What podman, or a command before it, said in this try; "" where we may not read it."""
        try:
            number = await self._manager.get(unit.path, "Unit", "InvocationID")
        except BusError:
            return ""
        this = f"_SYSTEMD_INVOCATION_ID={bytes(number).hex()}"
        told = tuple(f"{name}: " for name in ("Error", *_BEFORE_THE_ENGINE))
        for pause in (0.0, *pauses):
            await asyncio.sleep(pause)
            lines = await newest_lines(20, this, *(f"_COMM={name}" for name in _BEFORE_THE_ENGINE))
            if errors := [line for line in lines if line.startswith(told)]:
                return errors[-1].removeprefix("Error: ")[:300]
        return ""

    # ------------------------------------------------------------ stopping

    async def _stop(self, unit: Unit) -> None:
        refused: BusError | NoSystemd | None = None
        async with asyncio.TaskGroup() as group:
            hurry = group.create_task(self._hurry(unit), name=f"hurry {unit.name}")
            try:
                await self._manager.order("StopUnit", unit.name)
            except (BusError, NoSystemd) as error:
                refused = error
            finally:
                hurry.cancel()
        if refused is not None:
            raise refused

    async def _hurry(self, unit: Unit) -> None:
        for who, number, patience_s in self._escalation:
            await asyncio.sleep(patience_s)
            try:
                await self._manager.call("KillUnit", "ssi", unit.name, who, number)
            except (BusError, NoSystemd) as error:  # it may have ended just now
                log.info("cannot send %s to %s: %s", number.name, unit.name, error)

    async def _nothing_left(self, model: ModelId, unit: Unit) -> None:
        unit = await self._manager.watch(unit.name)
        left = await self._processes(unit)
        if unit.up or left:
            pids = " ".join(map(str, left))
            text = f'cannot stop "{model}": of {unit.name} processes {pids} are left'
            raise Fault(text, hint=f"systemctl status {unit.name}")
        if unit.active == "failed":  # SIGTERM's 143 counts as failed; a stop by order is none
            await self._forgive(unit)

    async def _forgive(self, unit: Unit) -> None:
        """Also sets back StartLimitBurst=, which counts orders: how often to try is our affair."""
        with suppress(BusError):
            await self._manager.call("ResetFailedUnit", "s", unit.name)

    async def _processes(self, unit: Unit) -> list[int]:
        try:
            (left,) = await self._manager.call("GetUnitProcesses", "s", unit.name)
        except BusError:  # systemd forgets a unit that has nothing to tell any more
            return []
        return [pid for _, pid, _ in left]

    # ------------------------------------------------------------ looking

    def _unit_of(self, model: ModelId) -> EngineUnit | None:
        return self._used.get(model) or self._units.get(model)

    async def _watch(self, model: ModelId) -> Unit:
        found = self._unit_of(model)
        if found is None:
            raise Fault(f'"{model}" has no unit', lasting=True)
        try:
            return await self._manager.watch(found.name)
        except BusError as error:
            raise _not_ordered("look at", model, found.name, error) from error

    async def _seen(self, model: ModelId) -> Unit:
        told = False
        while True:
            try:
                return await self._watch(model)
            except NoSystemd as fault:
                if not told:
                    log.warning("cannot watch %s: %s", model, fault.message)
                told = True

    async def _since(self, unit: Unit) -> float:
        """Unix seconds of its start."""
        name = "ActiveEnterTimestamp" if unit.active == "active" else "InactiveExitTimestamp"
        return int(await self._manager.get(unit.path, "Unit", name)) / 1e6


def _not_ordered(act: str, model: ModelId, name: str, error: BusError) -> Fault:
    text = f'cannot {act} "{model}": '
    if error.name in _UNKNOWN:
        return Fault(
            f"{text}systemd has no unit {name}",
            hint="homegptctl apply renders it; a Quadlet with a mistake makes no unit: "
            "/usr/libexec/podman/quadlet -dryrun",
            lasting=True,
        )
    if error.name in _WRONG:
        hint = f"systemctl status {name}"
        return Fault(f"{text}{error.message.lower()}", hint=hint, lasting=True)
    if error.name in _DENIED:
        return Fault(
            f"{text}polkit does not let this user {act} {name}",
            hint="homegptctl doctor; polkit must run, its rule must name this unit",
            lasting=True,
        )
    return Fault(f"{text}systemd answered: {error}", hint=f"systemctl status {name}")


def _noted(note: Path) -> str:
    """A line in /run; empty where there is none that can be read."""
    try:
        with note.open() as file:
            return file.read(_LONGEST_NOTE).strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _remove_stale(socket: Path | None) -> None:
    """A second vLLM cannot bind where the first one left its socket (0.32)."""
    if socket is None:
        return
    try:
        if socket.is_socket():
            socket.unlink()
    except PermissionError:
        log.debug("%s is not ours to remove: its unit does it", socket)
    except OSError as error:
        log.info("left the old socket %s: %s", socket, error.strerror)
