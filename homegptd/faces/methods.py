"""The methods of the control socket: handlers, parameters, and the OpenRPC document.

`Control` is what this face asks of the daemon. Waiting is no business of its implementer: a method
begins its operation and returns at once; the face follows `operation_updates`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from os import getpid
from typing import Any, Generic, Protocol, TypeVar

from homegptd import __version__
from homegptd.wire import control as wire
from homegptd.wire import schema
from homegptd.wire.control import Method, Notice

from .openrpc import openrpc

P = TypeVar("P")


class Refused(Exception):
    """A call is turned down; nothing was begun. `reason` is a word of `wire.codes.TABLE`."""

    def __init__(self, reason: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.hint = reason, message, hint


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end of the socket, from SO_PEERCRED (unix(7)): the kernel says so."""

    pid: int
    uid: int
    gid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


class Control(Protocol):
    """What the control socket needs of the daemon.

    Verbs begin an operation and return its first view; they raise `Refused` (unknown-model,
    does-not-fit, pinned, busy, ...) when nothing was begun. A verb that finds nothing to do returns
    an operation that is already done. `model` is an id or an alias.
    """

    async def status(self) -> wire.StatusView: ...
    async def switch(
        self, caller: Caller, model: str, *, now: bool, force: bool
    ) -> wire.OperationView: ...
    async def sleep(
        self, caller: Caller, model: str, *, level: wire.Level | None
    ) -> wire.OperationView: ...
    async def wake(self, caller: Caller, model: str) -> wire.OperationView: ...
    async def start(self, caller: Caller, model: str) -> wire.OperationView: ...
    async def stop(self, caller: Caller, model: str, *, now: bool) -> wire.OperationView: ...
    async def prove(self, caller: Caller, model: str) -> wire.OperationView: ...
    async def free(self, caller: Caller, gpu: int | None, *, now: bool) -> wire.OperationView: ...
    async def reclaim(self, caller: Caller, gpu: int | None) -> wire.OperationView: ...
    async def reload(self, caller: Caller) -> wire.OperationView: ...

    async def operation(self, operation_id: int) -> wire.OperationView:
        """Raises: Refused("unknown-operation")."""
        ...

    async def cancel(self, caller: Caller, operation_id: int) -> wire.OperationView:
        """Give up what has not begun; raises Refused("unknown-operation" or "busy")."""
        ...

    async def plan(self, model: str) -> wire.PlanView: ...

    async def memory(self, model: str | None) -> wire.MemoryReport:
        """Figures, sums and pressure, and what can be measured at this moment."""
        ...

    async def logs(self, model: str, *, lines: int) -> wire.LogsView:
        """The last lines of the model's engine, and how the caller can follow them."""
        ...

    def operation_updates(self, operation_id: int) -> AsyncGenerator[wire.OperationView, None]:
        """The views of an operation, ending with the final one, at once if it has ended.

        A reader that is slow gets the latest view, not every view.
        """
        ...

    def event_stream(self) -> AsyncGenerator[wire.EventNotice, None]:
        """Events from the moment of this call on; closing the generator ends the subscription.

        Bounded: for a reader that is too slow the oldest are dropped, and it is told so.
        """
        ...


class Session(Protocol):
    """What a handler may use of the connection that called."""

    @property
    def caller(self) -> Caller: ...
    @property
    def control(self) -> Control: ...
    async def notify(self, notice: str, params: Mapping[str, object]) -> None: ...
    def after_reply(self, name: str, follow: Callable[[], Awaitable[None]]) -> None:
        """Run `follow` once the reply is out, as long as the connection lives; once per name."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One call under way: its connection and its id. Nobody waits for a `silent` one."""

    session: Session
    id: str | float | None
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Entry(Generic[P]):
    """One row of the method table."""

    name: str
    summary: str
    params: type[P]
    result: object
    run: Callable[[Request, P], Awaitable[object]]
    changes: bool = False  # logged with the caller's credentials


Table = Mapping[str, Entry[Any]]


def arguments(entry: Entry[P], params: object) -> P:
    """The parameters of a call, checked, by name or by position, with defaults filled in.

    Raises: Refused("bad-request").
    """
    keys = schema.fields(entry.params)
    given = _named(entry.name, params, [key.name for key in keys])
    found = schema.problem(given, entry.params, entry.name)
    if found:
        raise Refused("bad-request", found, hint=f"usage: {signature(entry)}")
    absent = {k.name: k.default.value for k in keys if k.default and k.name not in given}
    checked: Any = absent | given
    return checked  # type: ignore[no-any-return]


def signature(entry: Entry[Any]) -> str:
    """A method and its parameters on one line: `switch(model, wait=true, now=false)`."""
    keys = schema.fields(entry.params)
    shown = (k.name + (f"={schema.word(k.default.value)}" if k.default else "") for k in keys)
    return f"{entry.name}({', '.join(shown)})"


def unknown(table: Table, name: str) -> tuple[str, str | None]:
    """Message and hint for a method that is not in the table."""
    near = difflib.get_close_matches(name[:40], list(table), n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(table)}"
    return f"Method not found: {schema.word(name)}", hint


def _named(method: str, params: object, names: list[str]) -> dict[str, object]:
    match params:
        case dict():
            return params
        case list() if len(params) <= len(names):
            return dict(zip(names, params, strict=False))
        case list():
            message = f"{method} takes {len(names)} parameters, not {len(params)}"
            raise Refused("bad-request", message)
        case _:
            raise Refused("bad-request", f"{method} takes an object or an array")


# Handlers


async def _status(call: Request, _: wire.NoParams) -> wire.StatusView:
    return await call.session.control.status()


async def _switch(call: Request, given: wire.SwitchParams) -> wire.OperationView:
    now, force = given.get("now", False), given.get("force", False)
    control, caller = call.session.control, call.session.caller
    view = await control.switch(caller, given["model"], now=now, force=force)
    return await _ended(call, view, wait=given.get("wait", True))


async def _sleep(call: Request, given: wire.SleepParams) -> wire.OperationView:
    level = given.get("level")
    view = await call.session.control.sleep(call.session.caller, given["model"], level=level)
    return await _ended(call, view, wait=given.get("wait", True))


async def _wake(call: Request, given: wire.ModelParams) -> wire.OperationView:
    view = await call.session.control.wake(call.session.caller, given["model"])
    return await _ended(call, view, wait=given.get("wait", True))


async def _start(call: Request, given: wire.ModelParams) -> wire.OperationView:
    view = await call.session.control.start(call.session.caller, given["model"])
    return await _ended(call, view, wait=given.get("wait", True))


async def _stop(call: Request, given: wire.ModelNowParams) -> wire.OperationView:
    now = given.get("now", False)
    view = await call.session.control.stop(call.session.caller, given["model"], now=now)
    return await _ended(call, view, wait=given.get("wait", True))


async def _prove(call: Request, given: wire.ModelParams) -> wire.OperationView:
    view = await call.session.control.prove(call.session.caller, given["model"])
    return await _ended(call, view, wait=given.get("wait", True))


async def _free(call: Request, given: wire.FreeParams) -> wire.OperationView:
    control, now = call.session.control, given.get("now", False)
    view = await control.free(call.session.caller, given.get("gpu"), now=now)
    return await _ended(call, view, wait=given.get("wait", True))


async def _reclaim(call: Request, given: wire.ReclaimParams) -> wire.OperationView:
    view = await call.session.control.reclaim(call.session.caller, given.get("gpu"))
    return await _ended(call, view, wait=given.get("wait", True))


async def _reload(call: Request, given: wire.WaitParams) -> wire.OperationView:
    view = await call.session.control.reload(call.session.caller)
    return await _ended(call, view, wait=given.get("wait", True))


async def _operation(call: Request, given: wire.OperationParams) -> wire.OperationView:
    view = await call.session.control.operation(given["id"])
    return await _ended(call, view, wait=given.get("wait", False))


async def _cancel(call: Request, given: wire.IdParams) -> wire.OperationView:
    return await call.session.control.cancel(call.session.caller, given["id"])


async def _plan(call: Request, given: wire.PlanParams) -> wire.PlanView:
    return await call.session.control.plan(given["model"])


async def _memory(call: Request, given: wire.MemoryParams) -> wire.MemoryReport:
    return await call.session.control.memory(given.get("model"))


async def _logs(call: Request, given: wire.LogsParams) -> wire.LogsView:
    lines = given.get("lines", 50)
    if not 0 < lines <= 10_000:
        raise Refused("bad-request", f"logs.lines must be between 1 and 10000, not {lines}")
    return await call.session.control.logs(given["model"], lines=lines)


async def _events(call: Request, _: wire.NoParams) -> wire.EventsView:
    session = call.session
    stream = session.control.event_stream()

    async def follow() -> None:
        async with aclosing(stream) as events:
            async for event in events:
                await session.notify(Notice.EVENT, event)

    session.after_reply("events", follow)
    return {}


async def _version(_: Request, __: wire.NoParams) -> wire.VersionView:
    return {"version": __version__, "pid": getpid(), "python": sys.version.split()[0]}


async def _discover(_: Request, __: wire.NoParams) -> dict[str, object]:
    return openrpc(METHODS)


async def _ended(call: Request, view: wire.OperationView, *, wait: bool) -> wire.OperationView:
    """The final view of an operation if the caller waits for it; progress goes out on the way."""
    if call.silent or not wait or view["state"] != "running":
        return view
    session = call.session
    await session.notify(Notice.PROGRESS, {"call": call.id, "operation": view})
    async with aclosing(session.control.operation_updates(view["id"])) as updates:
        async for view in updates:
            if view["state"] == "running":
                await session.notify(Notice.PROGRESS, {"call": call.id, "operation": view})
    return view


_OPERATION = wire.OperationView
_ROWS: tuple[Entry[Any], ...] = (
    Entry(Method.STATUS, "the whole box at one glance", wire.NoParams, wire.StatusView, _status),
    Entry(
        Method.SWITCH, "make a model awake, displacing others where it must",
        wire.SwitchParams, _OPERATION, _switch, changes=True,
    ),
    Entry(Method.SLEEP, "put a model to sleep", wire.SleepParams, _OPERATION, _sleep, changes=True),
    Entry(
        Method.WAKE, "wake a model if it fits beside what is awake",
        wire.ModelParams, _OPERATION, _wake, changes=True,
    ),
    Entry(
        Method.START, "start the engine of a model", wire.ModelParams, _OPERATION, _start,
        changes=True,
    ),
    Entry(
        Method.STOP, "stop the engine of a model", wire.ModelNowParams, _OPERATION, _stop,
        changes=True,
    ),
    Entry(
        Method.PROVE, "prove on this box that a model survives sleep and freezing",
        wire.ModelParams, _OPERATION, _prove, changes=True,
    ),
    Entry(
        Method.FREE, "empty a GPU for something else than models, until it is reclaimed",
        wire.FreeParams, _OPERATION, _free, changes=True,
    ),
    Entry(
        Method.RECLAIM, "let a freed GPU serve models again",
        wire.ReclaimParams, _OPERATION, _reclaim, changes=True,
    ),
    Entry(
        Method.RELOAD, "read the configuration again and apply the difference",
        wire.WaitParams, _OPERATION, _reload, changes=True,
    ),
    Entry(
        Method.OPERATION, "an operation, running or ended",
        wire.OperationParams, _OPERATION, _operation,
    ),
    Entry(
        Method.CANCEL, "give up what an operation has not yet begun",
        wire.IdParams, _OPERATION, _cancel, changes=True,
    ),
    Entry(Method.PLAN, "what a switch would do now", wire.PlanParams, wire.PlanView, _plan),
    Entry(
        Method.MEMORY, "what memory is reckoned with, and what is really held",
        wire.MemoryParams, wire.MemoryReport, _memory,
    ),
    Entry(
        Method.EVENTS, "subscribe to events, which follow as notifications",
        wire.NoParams, wire.EventsView, _events,
    ),
    Entry(Method.LOGS, "the last lines of an engine", wire.LogsParams, wire.LogsView, _logs),
    Entry(Method.VERSION, "the daemon's version", wire.NoParams, wire.VersionView, _version),
    Entry(Method.DISCOVER, "this document", wire.NoParams, dict[str, object], _discover),
)  # fmt: skip
METHODS: Table = {entry.name: entry for entry in _ROWS}
