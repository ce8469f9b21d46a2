"""One request on the short way, with an engine that is awake.

Most answers come whole and go on as they came. Any other is an `Answer`'s, and so is one that is
not there when the clock ticks, or when somebody wants something else of the box.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from msgspec import Struct
from msgspec.structs import replace

from homegptd.core.model import ModelId
from homegptd.runtime.lease import Lease
from homegptd.runtime.scheduler import Scheduler

from .accounts import Accounts, End, Record
from .ask import Ask, Broken, Limits, tell
from .bodies import Bodies
from .cuts import ABORT
from .heads import Head
from .outlet import Outlet
from .relay import Answer, connect, fault
from .upstream import Address, Connection, Pool

log = logging.getLogger(__name__)


class Means(Struct, frozen=True):
    """What all of them share."""

    scheduler: Scheduler
    bodies: Bodies
    accounts: Accounts
    pool: Pool


class Lane(Struct, frozen=True):
    """What is so for all that come over one connection, with one head, for one model."""

    means: Means
    model: ModelId
    ask: Ask
    """Without a body."""
    begin: bytes
    """Its head, but for the length."""
    outlet: Outlet
    key: str
    """The name of who asks; empty without keys."""
    address: Address
    limits: Limits
    tick_s: float
    passes_whole: bool
    """Whether an answer can go on as it came."""


class Exchange:
    """`enter` and `begin`, and `end` or `release` when it has told its end, or before."""

    __slots__ = (
        "_answer", "_body", "_connecting", "_connection", "_lane", "_lease", "_noticed", "_record",
        "_since", "_tell", "_whole", "keep_alive", "problem",
    )  # fmt: skip

    def __init__(self, lane: Lane, body: bytes) -> None:
        self._lane, self._body = lane, body
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._noticed = False
        self._answer: Answer | None = None
        self._record: Record | None = None
        self._whole = b""
        self.keep_alive = True
        self.problem: Broken | None = None
        """How it ended, if not well."""

    def enter(self) -> bool:
        """Whether there is room for it, and the model serves. Then it has to be ended."""
        lane, bodies = self._lane, self._lane.means.bodies
        if not bodies.take(len(self._body)):
            return False
        lease = lane.means.scheduler.lease_at_once(lane.model, self.noticed)
        if lease is None:
            bodies.give_back(len(self._body))
            return False
        self._lease: Lease = lease
        self._since = lease.ticket.since
        lane.means.pool.ticks.join(self, lane.tick_s)
        return True

    def begin(self, tell: Callable[[], None]) -> None:
        """`tell` is called once, perhaps before this returns."""
        self._tell = tell
        connection = self._lane.means.pool.take(self._lane.address)
        if connection is None:
            self._begin_anew()
        else:
            self._send(connection)

    def _begin_anew(self) -> None:
        loop = self._lane.means.pool.loop
        self._connecting = loop.create_task(self._connect(), name="connect")

    async def _connect(self) -> None:
        lane = self._lane
        try:
            connection = await connect(lane.means.pool, lane.address, self._lease)
        except Broken as broken:
            self.problem = broken
        except Exception as error:
            log.exception("cannot connect to %s", lane.address)
            self.problem = Broken(fault(self._lease, f"cannot be reached ({error})"), sent=False)
        else:
            self._connecting = None
            self._since = lane.means.pool.loop.time()
            self._send(connection)
            return
        self._connecting = None
        self._tell()

    def _send(self, connection: Connection) -> None:
        lane, body, self._connection = self._lane, self._body, connection
        if self._noticed:
            self._answers()
        whole = self._pass_on if lane.passes_whole else None
        connection.send(self, b"%s%d\r\n\r\n" % (lane.begin, len(body)), body, whole)

    def _pass_on(self, data: bytes, start: int) -> bool:
        client = self._lane.outlet.transport
        if client.is_closing() or data.rfind(ABORT, start) >= 0:
            return False
        client.write(data)
        self._whole = data
        if not client.is_closing():  # by now uvloop knows of one that is gone
            self._lease.served()
        self._tell()
        return True

    # ------------------------------------------------------------ what takes more than that

    def noticed(self) -> None:
        """From now on it can be cut, and time counts."""
        self._noticed = True
        if self._connection is not None:
            self._answers()

    def tick(self) -> None:
        self._noticed = True
        if self._connection is not None:
            self._answers(self._lane.tick_s)  # the next tick comes only after that

    def _answers(self, more_s: float = 0.0) -> Answer:
        if self._answer is None:
            lane, pool = self._lane, self._lane.means.pool
            connection = cast("Connection", self._connection)  # or nobody would have called
            self._answer = Answer(
                lane.outlet, replace(lane.ask, body=self._body), connection, self._lease,
                lane.limits, self._in_the_books(), pool, None,
            )  # fmt: skip
            waited_s = min(pool.loop.time() - self._since, lane.tick_s)  # or time stood still
            self._answer.take_over(self._over, waited_s + more_s)
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

    @property
    def to_be_sent_again(self) -> bool:
        """The client has heard nothing yet: the long way knows what then."""
        return self.problem is not None and not self.problem.begun

    def end(self, *, answered: bool) -> None:
        """Release it and count it. `answered`: unless there is a `problem`."""
        self.release()
        lane, accounts = self._lane, self._lane.means.accounts
        if self._whole and answered:
            accounts.close_at_once(lane.model, lane.key, self._whole)
            return
        record = self._in_the_books()
        if self.problem is not None and self.problem.begun:
            record.end = End.FAILED
            tell(self.problem)
        elif answered:
            record.end = End.ANSWERED
        accounts.close(record)

    def release(self) -> None:
        """Let go of everything. Whoever sends the request again has it in his books."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._answer is not None:
            self._answer.leave()
        elif self._connection is not None:
            self._connection.leave()
        self._lease.close()
        means = self._lane.means
        means.bodies.give_back(len(self._body))
        means.pool.ticks.leave(self, self._lane.tick_s)

    def _in_the_books(self) -> Record:
        if self._record is None:
            self._record = record = Record(self._lane.key)
            record.model = self._lane.model
            record.granted(self._lease.ticket.id, 0.0)
            record.arrived -= self._lane.means.pool.loop.time() - self._lease.ticket.since
        return self._record
