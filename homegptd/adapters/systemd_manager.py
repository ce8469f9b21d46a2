"""A lasting tie to systemd: calls, jobs and a mirror of the units that matter.

Whoever calls while the tie is broken mends it first: no task watches over it. A new tie reads every
unit anew, so what happened in between is seen as well. See org.freedesktop.systemd1(5).
"""

import asyncio
import logging
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jeepney import DBusAddress

from homegptd.core.model import Exit
from homegptd.core.refusals import Fault

from . import host_memory
from .dbus import Bus, BusError, BusLost, Signal

log = logging.getLogger(__name__)

SYSTEMD = "org.freedesktop.systemd1"
MANAGER = DBusAddress("/org/freedesktop/systemd1", SYSTEMD, f"{SYSTEMD}.Manager")
PROPERTIES = "org.freedesktop.DBus.Properties"
MEND_S = 30.0
"""How long a call tries to reach systemd before it gives up."""
PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Between tries. Nothing tells when a bus is back: its socket is there before anybody answers."""

_UNIT_PROPERTIES = ("LoadState", "ActiveState", "SubState", "InvocationID")
_SERVICE_PROPERTIES = ("MainPID", "Result", "ExecMainCode", "ExecMainStatus")
# what dbus-daemon says while systemd executes itself anew or has not come back to a new bus
_AWAY = {
    "org.freedesktop.DBus.Error.NoReply",
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.Disconnected",
    "org.freedesktop.DBus.Error.Spawn.ChildExited",
    "org.freedesktop.DBus.Error.Spawn.ExecFailed",
    "org.freedesktop.DBus.Error.TimedOut",
}

_ENDED_BY_SYSTEMD = {
    "oom-kill": "was killed: the host ran out of memory",
    "timeout": "was killed by systemd: it took too long",
    "watchdog": "was killed by systemd's watchdog",
}


class NoSystemd(Fault):
    """systemd does not answer: not there, or not for us."""


@dataclass(frozen=True, slots=True)
class End:
    """How a unit's main process ended, in systemd's words."""

    result: str
    """`success`, `exit-code`, `signal`, `core-dump`, `oom-kill`, `timeout`, `watchdog`, …"""
    code: int
    """CLD_EXITED 1, CLD_KILLED 2, CLD_DUMPED 3 of waitid(2); 0: none ended."""
    status: int
    """Exit status or signal number."""
    restarted: bool = False
    """Another invocation runs already: somebody restarted it."""

    @property
    def refused_by_podman(self) -> bool:
        """podman-run(1), "Exit Status"."""
        return (self.code, self.status) == (os.CLD_EXITED, 125)


@dataclass(slots=True)
class Unit:
    """A mirror of one service, as far as engines need it."""

    name: str
    load: str = ""
    active: str = "inactive"
    sub: str = "dead"
    main_pid: int = 0
    result: str = "success"
    code: int = 0
    status: int = 0
    invocation: bytes = b""
    ends: int = 0
    """Raised whenever it went from running to ended; `last` says how."""
    last: End | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced by a new one, at every change and when the tie breaks."""
    signals: int = 0
    tie: Bus | None = None
    """For which connection its signals are asked for."""

    @property
    def path(self) -> str:
        return f"/org/freedesktop/systemd1/unit/{escaped(self.name)}"

    @property
    def up(self) -> bool:
        """Something of it runs. Between two automatic restarts nothing does."""
        if self.active in {"deactivating", "maintenance"}:
            return self.main_pid != 0
        running = self.active in {"active", "reloading", "refreshing", "activating"}
        return running and not self.sub.startswith("auto-restart")

    def end(self) -> End:
        return End(self.result, self.code, self.status)

    def take(self, values: dict[str, Any]) -> None:
        """New values of properties; the same ones are told several times."""
        was_up, invocation = self.up, self.invocation
        self.load = values.get("LoadState", self.load)
        self.active = values.get("ActiveState", self.active)
        self.sub = values.get("SubState", self.sub)
        self.main_pid = values.get("MainPID", self.main_pid)
        self.result = values.get("Result", self.result)
        self.code = values.get("ExecMainCode", self.code)
        self.status = values.get("ExecMainStatus", self.status)
        self.invocation = bytes(values.get("InvocationID", self.invocation))
        if was_up and not self.up:
            self.ends, self.last = self.ends + 1, self.end()
        elif was_up and invocation and self.invocation != invocation:
            self.ends, self.last = self.ends + 1, End("success", 0, 0, restarted=True)
        if not self.up:
            self.invocation = b""
        self.stir()

    def stir(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class Manager:
    """systemd's manager object, reconnected to as often as it takes."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address
        self._bus: Bus | None = None
        self._mending = asyncio.Lock()
        self._units: dict[str, Unit] = {}
        self._by_path: dict[str, Unit] = {}
        self._jobs: dict[int, asyncio.Future[str]] = {}
        self._ordering: list[str] = []

    async def call(self, member: str, signature: str = "", *args: Any) -> tuple[Any, ...]:
        """A method of the manager. Raises BusError, and NoSystemd after 30 s of trying."""
        return await self._ask(MANAGER, member, signature, *args)

    async def get(self, path: str, interface: str, name: str) -> Any:
        """One property. Raises BusError, NoSystemd."""
        at = DBusAddress(path, SYSTEMD, PROPERTIES)
        ((_, value),) = await self._ask(at, "Get", "ss", f"{SYSTEMD}.{interface}", name)
        return value

    async def charged_mib(self, unit: "Unit") -> int | None:
        """RAM charged to its control group, page cache aside; None where nobody knows."""
        try:
            group = await self.get(unit.path, "Service", "ControlGroup")
        except BusError:
            return None
        return await asyncio.to_thread(host_memory.of_cgroup, str(group)) if group else None

    async def watch(self, name: str) -> Unit:
        """The unit's mirror, fresh; from now on it follows. Raises NoSystemd, BusError."""
        unit = self._units.get(name)
        if unit is None:
            unit = self._units[name] = Unit(name)
            self._by_path[unit.path] = unit
        for pause in _pauses():
            try:
                bus = await self._tied()
                if unit.tie is not bus:
                    await bus.match(
                        f"type='signal',sender='{SYSTEMD}',interface='{PROPERTIES}',"
                        f"member='PropertiesChanged',path='{unit.path}'"
                    )
                    unit.tie = bus
                await self._refresh(bus, unit)
            except (BusLost, TimeoutError) as error:
                await _wait_or_give_up(pause, error)
            else:
                return unit
        raise AssertionError

    async def order(self, method: str, unit: str) -> str:
        """Queue a job (`StartUnit`, `StopUnit`) and wait for its end.

        Returns systemd's word for it: `done`, `failed`, `canceled`, `timeout`, `dependency`, …; or
        `unknown` where the tie broke meanwhile and the job is no more. Raises BusError, NoSystemd.
        """
        self._ordering.append(unit)
        number = 0
        try:
            (path,) = await self.call(method, "ss", unit, "replace")
            number = int(path.rpartition("/")[2])
            while True:
                try:
                    return await self._job(number)
                except BusLost:
                    if await self._job_of(unit) != number:
                        return "unknown"
        finally:
            self._ordering.remove(unit)
            self._jobs.pop(number, None)
            if not self._ordering:
                self._jobs.clear()

    def close(self) -> None:
        if self._bus is not None:
            self._bus.close()
            self._on_lost()

    # ------------------------------------------------------------ the tie

    async def _ask(
        self, at: DBusAddress, method: str, signature: str, *args: Any
    ) -> tuple[Any, ...]:
        for pause in _pauses():
            try:
                return await (await self._tied()).call(at, method, signature, *args)
            except BusLost as error:
                await _wait_or_give_up(pause, error)
            except BusError as error:
                if error.name not in _AWAY:
                    raise
                await _wait_or_give_up(pause, error)
            except TimeoutError as error:
                raise NoSystemd(f"systemd did not answer {method}") from error
        raise AssertionError

    async def _tied(self) -> Bus:
        """The connection, made anew if it is lost. Raises BusLost."""
        async with self._mending:
            if self._bus is None or self._bus.lost:
                bus = await Bus.connect(
                    self._address, on_signal=self._on_signal, on_lost=self._on_lost
                )
                try:
                    await self._listen(bus)
                except (BusError, TimeoutError) as error:
                    bus.close()
                    raise BusLost(str(error)) from error
                except BaseException:
                    bus.close()
                    raise
                self._bus = bus
            return self._bus

    async def _listen(self, bus: Bus) -> None:
        """Signals first, so that nothing ordered later can end unheard."""
        await bus.match(
            f"type='signal',sender='{SYSTEMD}',interface='{SYSTEMD}.Manager',member='JobRemoved'"
        )
        await bus.match(
            "type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged',"
            f"arg0='{SYSTEMD}'"
        )
        try:
            await bus.call(MANAGER, "Subscribe")
        except BusError as error:
            if error.name != f"{SYSTEMD}.AlreadySubscribed":
                raise

    async def _refresh(self, bus: Bus, unit: Unit) -> None:
        """Read it; again if it changed while being read. Raises BusLost, BusError, TimeoutError."""
        at = DBusAddress(unit.path, SYSTEMD, PROPERTIES)
        while True:
            before = unit.signals
            wanted = [(f"{SYSTEMD}.Unit", name) for name in _UNIT_PROPERTIES]
            if unit.name.endswith(".service"):
                wanted += [(f"{SYSTEMD}.Service", name) for name in _SERVICE_PROPERTIES]
            answers = [bus.send(at, "Get", "ss", *pair) for pair in wanted]
            async with asyncio.timeout(MEND_S):
                values = [await answer for answer in answers]
            if unit.signals == before:
                unit.take(
                    {name: value[0][1] for (_, name), value in zip(wanted, values, strict=True)}
                )
                return

    def _on_lost(self) -> None:
        self._bus = None
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            if not job.done():
                job.set_exception(BusLost("the connection to systemd is lost"))
        for unit in self._units.values():
            unit.stir()

    def _on_signal(self, signal: Signal) -> None:
        match signal.interface, signal.member, signal.body:
            case (str(interface), "PropertiesChanged", (_, changed, _)) if interface == PROPERTIES:
                if unit := self._by_path.get(signal.path):
                    unit.signals += 1
                    unit.take({name: value for name, (_, value) in changed.items()})
            case (_, "JobRemoved", (number, _, unit_name, result)):
                if number in self._jobs or unit_name in self._ordering:
                    job = self._jobs.setdefault(number, _future())
                    if not job.done():
                        job.set_result(result)
            case (_, "NameOwnerChanged", (name, old, _)) if name == SYSTEMD and old:
                log.info("systemd left the bus; connecting anew")
                if self._bus is not None:
                    self._bus.close()
                self._on_lost()
            case _:
                pass

    # ------------------------------------------------------------ jobs

    async def _job(self, number: int) -> str:
        """JobRemoved may have come before the answer that named the job. Raises BusLost."""
        return await self._jobs.setdefault(number, _future())

    async def _job_of(self, unit: str) -> int:
        number, _ = await self.get(self._units[unit].path, "Unit", "Job")
        return int(number)


def escaped(name: str) -> str:
    """A unit's name in an object path, as sd_bus_path_encode(3) spells it."""
    if not name:
        return "_"
    return re.sub(
        r"^[0-9]|[^A-Za-z0-9]",
        lambda found: "".join(f"_{byte:02x}" for byte in found[0].encode()),
        name,
    )


def _pauses() -> Sequence[float | None]:
    """Pauses in seconds that make up `MEND_S`; then None: give up."""
    steady = int((MEND_S - sum(PAUSES_S)) / PAUSES_S[-1])
    return (*PAUSES_S, *(PAUSES_S[-1] for _ in range(steady)), None)


async def _wait_or_give_up(pause: float | None, error: Exception) -> None:
    if pause is None:
        text = f"cannot reach systemd: {str(error) or 'no answer'}"
        raise NoSystemd(text, hint="systemctl status dbus") from error
    await asyncio.sleep(pause)


def _future() -> "asyncio.Future[str]":
    return asyncio.get_running_loop().create_future()


def exit_of(end: End) -> Exit:
    """conmon exits as a shell says it: 128 and the number of the signal that ended the engine."""
    if end.code in {os.CLD_KILLED, os.CLD_DUMPED}:
        code: int | None = -end.status
    elif end.code == os.CLD_EXITED:
        named = end.status > 128 and end.status - 128 in set(signal.Signals)
        code = 128 - end.status if named else end.status
    else:
        code = None
    return Exit(code, _detail(end, code))


def _detail(end: End, code: int | None) -> str:
    if end.restarted:
        return "was restarted by somebody else"
    if end.result in _ENDED_BY_SYSTEMD:
        return _ENDED_BY_SYSTEMD[end.result]
    if code is None:
        failed = end.result in {"exit-code", "signal"}
        return "failed before its engine began" if failed else "ended; nobody knows how"
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by {signal.Signals(-code).name}"
