"""The short way of a small request whose model is awake and wanted by nobody else.

No task, no turn of the event loop, nothing of aiohttp's: nothing is waited for, unless a connection
to the engine has to be made first. What this is not made for goes the long way (`router`) as it
came: a stream, a body that has to be changed, a name that the engine does not know, a model that
sleeps. So does what could be answered only with an error, and what comes to nothing before its
first byte: it is held to be sent again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from msgspec import Struct
from multidict import CIMultiDictProxy

from homegptd.core.model import ModelId
from homegptd.runtime.lease import Lease
from homegptd.runtime.scheduler import Scheduler

from . import openai
from .accounts import Accounts, End, Record
from .ask import Ask, Broken, Limits, tell
from .bodies import Bodies
from .clients import Client
from .errors import Denied
from .guard import Access, Guard
from .intake import passed_on
from .models import Models
from .outlet import Flows, Outlet
from .plain import Head
from .relay import Answer, connect, fault
from .routes import ROUTES, Route, Where
from .tasks import is_task
from .upstream import Address, Connection, Pool

log = logging.getLogger(__name__)

_LARGEST = 64 * 1024
_ROUTES = {
    route.path: route
    for route in ROUTES
    if route.where is Where.BODY and route.wakes and not (route.once or route.stores)
}


class Known(Struct, frozen=True):
    """What is so for all requests that come over the same connection with the same head."""

    guard: Guard
    """Who let them in. A reload puts another one there."""
    client: Client
    route: Route
    headers: bytes
    """What the engine gets of theirs."""
    outlet: Outlet


class _Seen(NamedTuple):
    headers: CIMultiDictProxy[str]
    transport: asyncio.Transport


class Exchange:
    """One request under way: `begin`, and `end` or `release` when it has told its end or before."""

    __slots__ = (
        "_address", "_answer", "_ask", "_connecting", "_known", "_lease", "_limits", "_means",
        "_record", "_tell", "keep_alive", "problem",
    )  # fmt: skip

    def __init__(
        self, means: Express, known: Known, ask: Ask, lease: Lease, address: Address, limits: Limits
    ) -> None:
        self._means, self._known, self._ask, self._lease = means, known, ask, lease
        self._address, self._limits = address, limits
        self._record = record = Record(known.client.name)
        record.model = lease.ticket.model
        record.granted(lease.ticket.id, 0.0)
        self._answer: Answer | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.keep_alive = True
        self.problem: Broken | None = None
        """How it ended, if not well."""
        means.bodies.take(len(ask.body))

    def begin(self, tell: Callable[[], None]) -> None:
        """`tell` is called once, perhaps before this returns."""
        self._tell = tell
        connection = self._means.pool.take(self._address)
        if connection is None:
            self._begin_anew()
        else:
            self._send(connection)

    def _begin_anew(self) -> None:
        self._connecting = self._means.pool.loop.create_task(self._connect(), name="connect")

    async def _connect(self) -> None:
        try:
            connection = await connect(self._means.pool, self._address, self._lease)
        except Broken as broken:
            self.problem = broken
        except Exception as error:
            log.exception("cannot connect to %s", self._address)
            self.problem = Broken(fault(self._lease, f"cannot be reached ({error})"), sent=False)
        else:
            self._connecting = None
            self._send(connection)
            return
        self._connecting = None
        self._tell()

    def _send(self, connection: Connection) -> None:
        self._answer = Answer(
            self._known.outlet, self._ask, connection, self._lease, self._limits, self._record,
            self._means.pool, None,
        )  # fmt: skip
        self._answer.begin(self._over)

    def _over(self) -> None:
        answer, self._answer = self._answer, None
        if answer is None:
            return
        answer.leave()
        self.problem, self.keep_alive = answer.problem, answer.keep_alive
        if answer.stale:
            self._begin_anew()
        else:
            self._tell()

    @property
    def to_be_sent_again(self) -> bool:
        """The client has heard nothing yet: the long way knows what then."""
        return self.problem is not None and not self.problem.begun

    def end(self, *, answered: bool) -> None:
        """Release it and count it. `answered`: unless there is a `problem`."""
        self.release()
        if self.problem is not None and self.problem.begun:
            self._record.end = End.FAILED
            tell(self.problem)
        elif answered:
            self._record.end = End.ANSWERED
        self._means.accounts.close(self._record)

    def release(self) -> None:
        """Let go of everything. Whoever sends the request again has it in his books."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._answer is not None:
            self._answer.leave()
        self._lease.close()
        self._means.bodies.give_back(len(self._ask.body))


class Express:
    """One for each door."""

    def __init__(
        self,
        scheduler: Scheduler,
        models: Models,
        *,
        guard: Callable[[], Guard],
        addresses: Callable[[ModelId], Address],
        engine_keys: Callable[[ModelId], str | None],
        limits: Callable[[ModelId], Limits],
        bodies: Bodies,
        max_body_bytes: int,
        tasks_switch: bool,
        accounts: Accounts,
        pool: Pool,
    ) -> None:
        self._scheduler, self._models, self._guard = scheduler, models, guard
        self._addresses, self._engine_keys, self._limits = addresses, engine_keys, limits
        self._tasks_switch = tasks_switch
        self.bodies, self.accounts, self.pool = bodies, accounts, pool
        self.largest = min(_LARGEST, max_body_bytes)
        """Bytes of a body."""

    def know(self, head: Head, protocol: Flows, transport: asyncio.Transport) -> Known | None:
        """None where requests with this head go the long way."""
        route, guard = _ROUTES.get(head.path), self._guard()
        seen = _Seen(head.headers, transport)
        client = guard.greet(seen)
        limited = client.key is not None and client.key.concurrency is not None
        if route is None or limited or head.headers.get("Content-Type") != "application/json":
            return None
        try:
            guard.admit(seen, client, Access.USE)
        except Denied:
            return None
        outlet = Outlet(
            protocol,
            transport,
            modern=True,
            keep_alive=True,
            headers=client.headers,
            told=partial(self._models.told, client=client),
        )
        return Known(guard, client, route, passed_on(head.headers), outlet)

    def holds(self, known: Known) -> bool:
        """Whether it is still so: a reload may have changed what clients may do."""
        return known.guard is self._guard()

    def take(self, known: Known, body: bytes) -> Exchange | None:
        """What is to be begun; None where this request goes the long way."""
        name = openai.named_only(body) if len(body) <= self.largest else None
        if name is None or (not self._tasks_switch and is_task(body)):
            return None
        model = self._models.as_is(name, known.client, known.route.kinds)
        if model is None or not self.bodies.fits(len(body)):
            return None
        address, limits = self._addresses(model), self._limits(model)
        headers, key = known.headers, self._engine_keys(model)
        if key is not None:
            headers += b"Authorization: Bearer %s\r\n" % key.encode()
        ask = Ask(known.route.path, headers, body, known.route.shape)
        lease = self._scheduler.lease_at_once(model)  # last: somebody has to close it
        return None if lease is None else Exchange(self, known, ask, lease, address, limits)
