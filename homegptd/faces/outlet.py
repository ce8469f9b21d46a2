"""Where an answer goes: a client's connection, as much of it as the relay has to know."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from aiohttp import HttpVersion11, web
from aiohttp.base_protocol import BaseProtocol

from .clients import Client, asking
from .errors import Problem
from .models import Models


class Flow(Protocol):
    """Who writes to a client, and has to know when it reads too slowly."""

    def on_full(self) -> None: ...
    def on_drained(self) -> None: ...


class Flows(Protocol):
    """A client's connection, whichever of our two servers has it."""

    flow: Flow | None

    @property
    def writing_paused(self) -> bool: ...


class Tells(BaseProtocol):
    """Tells at once whoever writes to it. aiohttp lets only tasks wait."""

    __slots__ = ()
    flow: Flow | None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.flow is not None:
            self.flow.on_full()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.flow is not None:
            self.flow.on_drained()


class Outlet:
    """One per request, or for all that come over a connection in the same way."""

    __slots__ = ("_models", "client", "keep_alive", "modern", "protocol", "transport")

    def __init__(
        self,
        protocol: Flows,
        transport: asyncio.Transport,
        *,
        modern: bool,
        keep_alive: bool,
        client: Client,
        models: Models,
    ) -> None:
        self.protocol, self.transport, self.client = protocol, transport, client
        self.modern = modern
        """HTTP/1.1, so that it knows chunks."""
        self.keep_alive = keep_alive
        """Whether the client wants to ask more over it."""
        self._models = models

    def told(self, problem: Problem) -> Problem:
        """What the client hears of it."""
        return self._models.told(problem, self.client)


def outlet(request: web.BaseRequest, models: Models) -> Outlet:
    """That of a request which aiohttp has read. Raises: ConnectionResetError."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    return Outlet(
        cast("Flows", request.protocol),
        transport,
        modern=request.version >= HttpVersion11,
        keep_alive=request.keep_alive,
        client=asking(),
        models=models,
    )
