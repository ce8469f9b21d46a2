"""The short way of a small request whose model is awake and wanted by nobody else.

No task, no turn of the event loop, nothing of aiohttp's: nothing is waited for, unless a connection
to the engine has to be made first. What this is not made for goes the long way (`router`) as it
came: a stream, a body that has to be changed, a name that the engine does not know, a model that
sleeps. So does what could be answered only with an error, and what comes to nothing before its
first byte: it is held to be sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from multidict import CIMultiDictProxy

from homegptd.core.model import ModelId
from homegptd.runtime.scheduler import Scheduler

from . import openai
from .accounts import Accounts
from .ask import Ask, Limits
from .bodies import Bodies
from .clients import Client
from .cuts import reads_more
from .errors import Denied
from .exchange import Exchange, Lane
from .guard import Access, Guard
from .intake import passed_on
from .models import Models
from .outlet import Flows, Outlet
from .plain import Head
from .pool import Address, Pool
from .routes import ROUTES, Route, Where

_LARGEST = 64 * 1024
_ROUTES = {
    route.path: route
    for route in ROUTES
    if route.where is Where.BODY and route.wakes and not (route.once or route.stores)
}


class Known:
    """What is so for all requests that come over the same connection with the same head."""

    __slots__ = ("client", "guard", "head", "headers", "lanes", "outlet", "route")

    def __init__(
        self, head: Head, guard: Guard, client: Client, route: Route, outlet: Outlet
    ) -> None:
        self.head, self.client, self.route, self.outlet = head, client, route, outlet
        self.guard = guard
        """Who let them in. A reload puts another one there, whatever it changes."""
        self.headers = passed_on(head.headers)
        """What the engine gets of theirs."""
        self.lanes: dict[str, Lane] = {}
        """By the name of their model."""


class _Seen(NamedTuple):
    headers: CIMultiDictProxy[str]
    transport: asyncio.Transport


class Express:
    """One for each door."""

    def __init__(
        self,
        scheduler: Scheduler,
        models: Models,
        *,
        guard: Guard,
        addresses: Callable[[ModelId], Address],
        engine_keys: Callable[[ModelId], str | None],
        limits: Callable[[ModelId], Limits],
        bodies: Bodies,
        max_body_bytes: int,
        accounts: Accounts,
        pool: Pool,
    ) -> None:
        self._models, self.guard = models, guard
        self._addresses, self._engine_keys, self._limits = addresses, engine_keys, limits
        self._scheduler, self._bodies, self._accounts = scheduler, bodies, accounts
        self.pool = pool
        self.largest = min(_LARGEST, max_body_bytes)
        """Bytes of a body."""

    def know(self, head: Head, protocol: Flows, transport: asyncio.Transport) -> Known | None:
        """None where requests with this head go the long way."""
        route, guard = _ROUTES.get(head.path), self.guard
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
            client=client,
            models=self._models,
        )
        return Known(head, guard, client, route, outlet)

    def take(self, known: Known, body: bytes) -> Exchange | None:
        """What is to be begun. None where this request goes the long way, as it does too if that
        comes to nothing."""
        name = openai.named_only(body) if len(body) <= self.largest else None
        if name is None:
            return None
        lane = known.lanes.get(name) or self._new_lane(known, name)
        return Exchange(lane, body) if lane is not None else None

    def _new_lane(self, known: Known, name: str) -> Lane | None:
        model = self._models.as_is(name, known.client, known.route.kinds)
        if model is None:
            return None
        ask = Ask(known.route.path, known.headers, b"", known.route.shape)
        ask.engine_key = self._engine_keys(model)
        known.lanes[name] = lane = Lane(
            scheduler=self._scheduler,
            brief=self._scheduler.brief,
            bodies=self._bodies,
            accounts=self._accounts,
            model=model,
            ask=ask,
            begin=ask.begin() + b"Content-Length: ",
            outlet=known.outlet,
            key=known.client.name,
            upstream=self.pool.upstream(self._addresses(model)),
            limits=self._limits(model),
            passes_whole=not (known.client.headers or reads_more(ask.path)),
        )
        return lane
