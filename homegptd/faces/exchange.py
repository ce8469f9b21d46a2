"""One request on the short way, with an engine that is awake.

Most answers come whole and go on as they came. Any other is an `Answer`'s, and so is one that is
not there when the core hears of it: soon, or when somebody wants something else of the box.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from msgspec import Struct
from msgspec.structs import replace

from homegptd.core.model import ModelId, TicketId
from homegptd.core.quick import LOOK_AGAIN_S
from homegptd.runtime.brief import Brief
from homegptd.runtime.lease import Lease
from homegptd.runtime.scheduler import Scheduler

from .accounts import Accounts, End, Record
from .ask import Ask, Broken, Limits, tell
from .bodies import Bodies
from .cuts import ABORT
from .heads import Head
from .outlet import Outlet
from .pool import Upstream
from .relay import Answer, connect, fault
from .upstream import Connection

log = logging.getLogger(__name__)


class Lane(Struct, frozen=True):
    """What is so for all that come over one connection, with one head, for one model."""

    scheduler: Scheduler
    brief: Brief
    bodies: Bodies
    accounts: Accounts
    model: ModelId
    ask: Ask
    """Without a body."""
    begin: bytes
    """Its head, but for the length."""
    outlet: Outlet
    key: str
    """The name of who asks; empty without keys."""
    upstream: Upstream
    limits: Limits
    passes_whole: bool
    """Whether an answer can go on as it came."""


class Exchange:
    """`begin`, and `end` or `release` when it has told its end, or before."""

    __slots__ = (
        "_answer", "_asked_at", "_body", "_connecting", "_connection", "_lane", "_lease", "_record",
        "_tell", "_whole", "keep_alive", "model", "problem", "since", "ticket",
    )  # fmt: skip
    ticket: TicketId
    since: float

    def __init__(self, lane: Lane, body: bytes) -> None:
        self.model, self._lane, self._body = lane.model, lane, body
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._lease: Lease | None = None
        self._answer: Answer | None = None
        self._record: Record | None = None
        self._asked_at = 0.0
        self._whole = b""
        self.keep_alive = True
        self.problem: Broken | None = None
        """How it ended, if not well."""

    def begin(self, tell: Callable[[], None]) -> bool:
        """Whether there is room for it, and the model serves. Then it has to be ended, and `tell`
        is called once, perhaps before this returns."""
        lane, size = self._lane, len(self._body)
        if not lane.bodies.take(size):
            return False
        if not lane.brief.hold(self):
            lane.bodies.give_back(size)
            return False
        self._tell = tell
        connection = lane.upstream.take()
        if connection is None:
            self._begin_anew()
        else:
            self._send(connection)
        return True

    def _begin_anew(self) -> None:
        loop = self._lane.upstream.pool.loop
        self._connecting = loop.create_task(self._connect(), name="connect")

    async def _connect(self) -> None:
        lane, pool = self._lane, self._lane.upstream.pool
        try:
            connection = await connect(lane.upstream, lane.model)
        except Broken as broken:
            self.problem = broken
        except Exception as error:
            log.exception("cannot connect to %s", lane.upstream.address)
            self.problem = Broken(fault(lane.model, f"cannot be reached ({error})"), sent=False)
        else:
            self._connecting, self._asked_at = None, pool.loop.time()
            self._send(connection)
            return
        self._connecting = None
        self._tell()

    def _send(self, connection: Connection) -> None:
        lane, body, self._connection = self._lane, self._body, connection
        if self._lease is not None:
            self._answers()
        whole = self._pass_on if lane.passes_whole else None
        connection.send(self, b"%s%d\r\n\r\n" % (lane.begin, len(body)), body, whole)

    def _pass_on(self, data: bytes, start: int) -> bool:
        client = self._lane.outlet.transport
        if client.is_closing() or data.rfind(ABORT, start) >= 0:
            return False
        client.write(data)
        if not client.is_closing():  # by now uvloop knows of one that is gone
            self._whole = data
        self._tell()
        return True

    # ------------------------------------------------------------ what takes more than that

    def noticed(self, lease: Lease) -> None:
        """From now on it can be cut, once it is connected, and time counts."""
        self._lease = lease
        if self._connection is not None:
            self._answers()

    def _answers(self) -> Answer:
        lane, pool = self._lane, self._lane.upstream.pool
        if self._lease is None:
            lane.scheduler.tell_core()  # which calls `noticed`
        if self._answer is None:
            connection = cast("Connection", self._connection)  # or nobody would have called
            self._answer = Answer(
                lane.outlet, replace(lane.ask, body=self._body), connection,
                cast("Lease", self._lease), lane.limits, self._in_the_books(), pool, None,
            )  # fmt: skip
            waited_s = pool.loop.time() - (self._asked_at or self.since)
            self._answer.take_over(self._over, min(waited_s, LOOK_AGAIN_S))  # or time stood still
        return self._answer

    def on_head(self, head: Head) -> None:
        self._answers().on_head(head)

    def on_body(self, data: bytes) -> None:
        self._answers().on_body(data)

    def on_end(self) -> None:
        self._answers().on_end()

    def on_lost(self, why: str) -> None:
        self._answers().on_lost(why)

    def _over(self) -> None:
        answer, self._answer, self._connection = self._answer, None, None
        if answer is None:
            return
        answer.leave()
        self.problem, self.keep_alive = answer.problem, answer.keep_alive
        if answer.stale:
            self._begin_anew()
        else:
            self._tell()

    # ------------------------------------------------------------ the end

    def end(self, *, answered: bool) -> None:
        """Release it and count it. `answered`: unless there is a `problem`."""
        self.release()
        lane = self._lane
        if self._whole:
            lane.accounts.close_at_once(lane.model, lane.key, self._whole)
            return
        record = self._in_the_books()
        if self.problem is not None and self.problem.begun:
            record.end = End.FAILED
            tell(self.problem)
        elif answered:
            record.end = End.ANSWERED
        lane.accounts.close(record)

    def release(self) -> None:
        """Let go of everything. Whoever sends the request again has it in his books."""
        lane, lease = self._lane, self._lease
        if self._answer is not None:
            self._answer.leave()
        elif self._connection is not None:
            self._connection.leave()
        elif self._connecting is not None:
            self._connecting.cancel()
        if lease is None:
            lane.brief.let_go(self, served=self._whole != b"")
        else:
            if self._whole:
                lease.served()
            lease.close()
        lane.bodies.give_back(len(self._body))

    def _in_the_books(self) -> Record:
        if self._record is None:
            self._record = record = Record(self._lane.key)
            record.model = self._lane.model
            record.granted(self.ticket, 0.0)
            record.arrived -= self._lane.upstream.pool.loop.time() - self.since
        return self._record
