"""The one owner of the state: takes events, calls `step`, has the commands carried out.

`post` runs `step` at once and never awaits, so a lease on an awake model costs one call and no turn
of the event loop.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol, cast

from homegptd.core.commands import Command, Cut, Finish, Grant, Order, Probe, Refuse, Watch
from homegptd.core.events import (
    CancelAsked,
    EngineSilent,
    Event,
    OperationAsked,
    RequestArrived,
    TicketClosed,
    TimePassed,
)
from homegptd.core.invariants import held
from homegptd.core.machine import step
from homegptd.core.model import (
    Act,
    Ended,
    Gpu,
    ModelId,
    Operation,
    OperationId,
    SleepLevel,
    State,
    Ticket,
    TicketId,
)
from homegptd.core.quick import LOOK_AGAIN_S, quick, serves
from homegptd.core.refusals import NEXT_LIFE_S, Reason, Refusal
from homegptd.core.story import Line, tell

from .brief import Brief
from .lease import Lease

log = logging.getLogger(__name__)

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_REMEMBERED = 500
"""Ended operations that can still be asked for."""


class _OverError(Exception):
    """Ends the task group: its other tasks are cancelled."""


class Carrier(Protocol):
    """Carries out orders as tasks of the group it is given; each ends in one event."""

    def carry_out(self, command: Order | Watch | Probe, group: asyncio.TaskGroup) -> None: ...


class Scheduler:
    """Owns the state. Everything that changes it goes through `post`."""

    def __init__(self, state: State, carrier: Carrier, *, max_wait_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self._state = state
        self._calm = False
        """Whether the last step was a quick one."""
        self._carrier = carrier
        self._max_wait_s = max_wait_s
        self._inbox: deque[Event] = deque()
        self._stepping = False
        self._timer: asyncio.Handle | None = None
        self._rings_at: float | None = None
        self._group: asyncio.TaskGroup | None = None
        self._broken: asyncio.Future[None] = self.loop.create_future()
        self._leases: dict[TicketId, Lease] = {}
        """Those that the core knows of."""
        self._tickets = cast("Iterator[TicketId]", itertools.count(1))
        self.brief = Brief(self._tickets, self.loop.time, self._begin_serving)
        self._operations = itertools.count(1)
        self._ended: dict[OperationId, Ended] = {}
        self._emptied: asyncio.Future[None] | None = None
        self._watchers: set[Callable[[tuple[Line, ...]], None]] = set()

    @property
    def state(self) -> State:
        """The newest snapshot; never changes under the reader."""
        if self.brief.serving:
            self.tell_core()
        return self._state

    @property
    def models(self) -> Collection[ModelId]:
        """All there are. Requests change nothing about that, so this is no look at the state."""
        return self._state.engines

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Scheduler"]:
        """Carry out orders for the duration of the block; then cancel what is still under way.

        A defect in `step` ends the block with that exception: the process is to end, systemd
        starts it again, and the engines are adopted.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._guard(), name="guard")
                try:
                    yield self
                finally:
                    self._group = None
                    if self._timer is not None:
                        self._timer.cancel()
                raise _OverError
        except* _OverError:
            pass

    def beside(self, work: Coroutine[object, object, None], name: str) -> None:
        """Run it for as long as the scheduler runs. What it raises is a defect, and ends that."""
        if self._group is not None:
            self._group.create_task(work, name=name)

    async def _guard(self) -> None:
        await self._broken

    # ------------------------------------------------------------ events

    def post(self, event: Event) -> None:
        """Take one step. Events posted from inside a step follow it in order.

        Nothing is taken any more after a defect: the state may be half of two.
        """
        self._inbox.append(event)
        if self._stepping or self._broken.done():
            return
        self._stepping = True
        try:
            while self._inbox:
                self._take(self._inbox.popleft())
        except BaseException as error:
            self._defect(error)
            raise
        finally:
            self._stepping = False

    def _defect(self, error: BaseException) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)

    def _take(self, event: Event) -> None:
        if self.brief.serving:
            self.tell_core()
        before, now, rings_at = self._state, self.loop.time(), self._rings_at
        short = quick(before, event, now, calm=self._calm)
        outcome = short or step(before, event, now)
        self._state, self._calm = outcome.state, short is not None
        if short is None:
            self._rearm(outcome.wake_at)
        elif short.wake_at is not None and (rings_at is None or short.wake_at < rings_at):
            self._rearm(short.wake_at)
        for command in outcome.commands:
            self._carry_out(command)
        if self._emptied is not None and not outcome.state.granted and not self._emptied.done():
            self._emptied.set_result(None)
        if short is None:
            lines = tell(before, event, outcome, now)
            if lines:
                self._publish(lines)

    def tell_core(self) -> None:
        """Of what has been brief until now. It has changed nothing, so all of it is still quick."""
        events, running = self.brief.take(self._max_wait_s)
        holders = [(who, Lease(self, ticket)) for who, ticket in running]
        self._leases.update((lease.ticket.id, lease) for _, lease in holders)
        try:
            try:
                for at, event in events:
                    outcome = quick(self._state, event, at, calm=True)
                    if outcome is None:
                        raise AssertionError(f"{event} came to a model that does not serve")
                    self._state = outcome.state
            finally:
                for who, lease in holders:
                    who.noticed(lease)
        except BaseException as error:
            self._defect(error)
            raise

    def _rearm(self, at: float | None) -> None:
        """The instant is kept here: uvloop's handle of a timer that is all but due knows none."""
        if at == self._rings_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if at is None else self.loop.call_at(at, self._ring)
        self._rings_at = at

    def _ring(self) -> None:
        self._timer = self._rings_at = None
        self.post(TimePassed())

    def _carry_out(self, command: Command) -> None:
        match command:
            case Grant(ticket):
                if (lease := self._leases.get(ticket)) is not None:
                    lease.settle(outcome=True)
            case Refuse(ticket, refusal):
                if (lease := self._leases.get(ticket)) is not None:
                    lease.settle(refusal)
            case Cut(ticket, refusal):
                lease = self._leases.get(ticket)
                if lease is not None and not lease.cut.done():
                    lease.cut.set_result(refusal)
            case Finish(ended):
                self._remember(ended)
            case _:
                if self._group is not None:
                    self._carrier.carry_out(command, self._group)

    # ------------------------------------------------------------ requests

    def lease(
        self,
        model: ModelId,
        *,
        freezable: bool,
        may_switch: bool = True,
        priority: int = 0,
        max_wait_s: float | None = None,
        replay: bool = False,
    ) -> Lease:
        """`async with scheduler.lease(model, freezable=…)` holds the model awake for the block.

        `freezable`: the answer is a stream. `replay`: second try of a request whose engine died.
        Raises Refused on entering.
        """
        now = self.loop.time()
        limit = self._max_wait_s if max_wait_s is None else min(max_wait_s, self._max_wait_s)
        ticket = Ticket(
            id=next(self._tickets),
            model=model,
            since=now,
            until=now + limit,
            freezable=freezable,
            may_switch=may_switch,
            priority=priority,
            replay=replay,
        )
        return Lease(self, ticket)

    def _begin_serving(self, model: ModelId) -> bool:
        """Whether tickets for it would be granted at once. Then the core is told before long."""
        if self._stepping or self._emptied is not None or self._broken.done():
            return False
        if not serves(self._state, model, calm=self._calm):
            return False
        self._calm = True
        look_at = self.loop.time() + LOOK_AGAIN_S
        if self._rings_at is None or self._rings_at > look_at:
            self._rearm(look_at)
        return True

    def open(self, lease: Lease) -> None:
        self._leases[lease.ticket.id] = lease
        self.post(RequestArrived(lease.ticket))

    def close(self, ticket: TicketId, *, served: bool) -> None:
        if self._leases.pop(ticket, None) is not None:
            self.post(TicketClosed(ticket, served))

    async def idle(self) -> None:
        """Return once no answer is running or frozen any more. For one waiter at a time."""
        if self.state.granted:
            self._emptied = self.loop.create_future()
            try:
                await self._emptied
            finally:
                self._emptied = None

    def cut_all(self, why: str) -> int:
        """Tell every running answer to end now, honestly; how many there were."""
        refusal = Refusal(Reason.SHUTTING_DOWN, why, retry_after_s=NEXT_LIFE_S)
        self.tell_core()
        for lease in self._leases.values():
            if not lease.cut.done():
                lease.cut.set_result(refusal)
        return len(self._leases)

    def is_frozen(self, ticket: Ticket) -> bool:
        engine = self.state.engines.get(ticket.model)
        return (
            engine is not None and ticket.id in held(engine) and not hasattr(engine.phase, "leases")
        )

    def suspect(self, ticket: Ticket, seconds: float) -> None:
        engine = self.state.engines.get(ticket.model)
        if engine is not None and ticket.id in held(engine):
            self.post(EngineSilent(ticket.model, engine.incarnation, seconds))

    # ------------------------------------------------------------ operations

    def operate(
        self,
        act: Act,
        model: ModelId,
        *,
        by: str,
        cut: bool = False,
        force: bool = False,
        level: SleepLevel | None = None,
        gpus: tuple[Gpu, ...] = (),
    ) -> Operation:
        """Begin an operation. It may have ended already when this returns: see `ended`."""
        operation = Operation(
            id=OperationId(next(self._operations)),
            act=act,
            model=model,
            by=by,
            since=self.loop.time(),
            cut=cut,
            force=force,
            level=level,
            gpus=gpus,
        )
        self.post(OperationAsked(operation))
        return operation

    def cancel(self, operation: OperationId) -> None:
        self.post(CancelAsked(operation))

    def ended(self, operation: OperationId) -> Ended | None:
        """How it ended; None while it runs, or if it is unknown or long gone."""
        return self._ended.get(operation)

    def _remember(self, ended: Ended) -> None:
        self._ended[ended.operation.id] = ended
        while len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]

    # ------------------------------------------------------------ watching

    def _publish(self, lines: tuple[Line, ...]) -> None:
        for line in lines:
            log.log(_LEVELS[line.level], "%s", line.text, extra={"journal": _fields(line)})
        for watcher in list(self._watchers):
            watcher(lines)

    @contextmanager
    def watched(self, watcher: Callable[[tuple[Line, ...]], None]) -> Iterator[None]:
        """Call `watcher` with the story of each step that has one, for the duration of the block.

        It must be quick and must not raise.
        """
        self._watchers.add(watcher)
        try:
            yield
        finally:
            self._watchers.discard(watcher)


def _fields(line: Line) -> dict[str, object]:
    """For journald, so that `journalctl MODEL_ID=…` tells the story of one model."""
    told: dict[str, object] = {name.upper(): value for name, value in line.fields.items()}
    if "OPERATION" in told:
        told["OPERATION_ID"] = told.pop("OPERATION")
    if "PHASE" in told:
        told["WAS"], _, told["PHASE"] = str(told["PHASE"]).partition(" → ")
    return {"MODEL_ID": line.model, "KIND": line.kind, **told}
