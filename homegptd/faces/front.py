"""A client's connection, for as long as all its requests go the short way.

The first that does not, and all that follows it, is aiohttp's: the transport is handed over with
every byte that was not answered. So this knows nothing of HTTP but what `plain` reads.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from aiohttp.tcp_helpers import tcp_keepalive

from . import plain
from .ask import Broken
from .exchange import Exchange
from .express import Express, Known
from .outlet import Tells

if TYPE_CHECKING:
    from .server import Connection, Server

log = logging.getLogger(__name__)

_LATER = 64 * 1024
"""Bytes that a client may send before it has its answer; then it is not read."""
QUIET_TICKS = 6
"""Of the server's clock, until a connection that was used has been idle for too long. The first
may come at once."""
_SILENT_TICKS = 3
"""Until one that has never said anything has."""


class Front(Tells):
    """One connection."""

    def __init__(self, server: Server, express: Express, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.flow = None
        self._server, self._express = server, express
        self._known: Known | None = None
        self._exchange: Exchange | None = None
        self.held = b""
        """The request under way, or the begin of one, and what came after it."""
        self.reads = True
        """Whether it takes more of what the client sends."""
        self._asked = 0
        """How many of these bytes are the request under way."""
        self._closing = False
        self._quiet = 0
        self._idle: asyncio.Future[None] | None = None
        self._handed: Connection | None = None

    # ------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        made = cast("asyncio.Transport", transport)
        tcp_keepalive(made)
        # uvloop else keeps what is written until all has been read that came in the same turn
        made.set_write_buffer_limits(high=0)
        self._server.front_made(self, made)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._forget()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.end(answered=False)
        self._tell_idle()

    def data_received(self, data: bytes) -> None:
        self._quiet = 0
        self.held = self.held + data if self.held else data
        if self._exchange is None:
            self._look()
        elif self.reads and len(self.held) > self._asked + _LATER:
            self._read(go_on=False)

    # ------------------------------------------------------------ requests

    def _look(self) -> None:
        """Begin what has come, if it goes the short way and is there as a whole."""
        held, known, split = self.held, self._known, None
        if known is not None and known.guard is self._express.guard:
            split = known.head.split(held)
        if split is None:
            known = self._new_head()
            split = known.head.split(held) if known is not None else None
        if split is None or known is None or self.writing_paused:
            self._hand_over()
            return
        size, start = split
        missing = start + size - len(held)
        if missing > 0 and size <= self._express.largest:
            return  # until the rest of it comes, or `tick`
        exchange = None
        if not missing:
            try:
                exchange = self._express.take(known, held[start:])
            except Exception:
                log.exception("%s failed on the short way", known.route.path)
        if exchange is not None:
            self._exchange, self._asked = exchange, len(held)
            if exchange.begin(self._ended):
                return
            self._exchange = None
        self._hand_over()

    def _new_head(self) -> Known | None:
        head, transport = plain.read(self.held), self.transport
        if head is None or transport is None:
            return None
        self._server.heard_of(self)
        self._known = self._express.know(head, self, transport)
        return self._known

    def _ended(self) -> None:
        exchange, self._exchange = self._exchange, None
        self._quiet = 0
        if exchange is None:
            return
        gone = self.transport is None or self.transport.is_closing()
        problem = exchange.problem
        again = problem is not None and not problem.begun  # the client has heard nothing yet
        if again and not gone:
            exchange.release()
            self._hand_over(problem)
        else:
            exchange.end(answered=not (again or gone))
            self.held = self.held[self._asked :]
            if self._closing or not exchange.keep_alive:
                self._close()
            elif self.held and not gone:
                self._read(go_on=True)
                self._look()
        if self._idle is not None:
            self._tell_idle()

    def _read(self, *, go_on: bool) -> None:
        transport = self.transport
        if transport is not None and not transport.is_closing() and self.reads != go_on:
            self.reads = go_on
            (transport.resume_reading if go_on else transport.pause_reading)()

    def _hand_over(self, broken: Broken | None = None) -> None:
        """Everything from here on is aiohttp's. `broken`: what came of the first request."""
        transport, data, self.held = self.transport, self.held, b""
        if transport is None or transport.is_closing():
            return
        handler = self._server.handler()
        handler.broken = broken
        self._forget()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        if self.writing_paused:
            handler.pause_writing()
        self._read(go_on=True)
        handler.data_received(data)
        if self._closing:
            handler.close()
        self._handed, self.transport = handler, None

    def _forget(self) -> None:
        self._server.front_lost(self)
        self._known = None  # which knows this connection

    def tick(self) -> None:
        """Nobody is silent for long: neither between two requests, nor within one."""
        self._quiet += 1
        if self._exchange is not None:
            return
        if self.held:
            self._hand_over()
        elif self._quiet >= (QUIET_TICKS if self._asked else _SILENT_TICKS):
            self._close()

    # ------------------------------------------------------------ the end, as aiohttp's server asks

    def close(self) -> None:
        """After the answer under way, if there is one."""
        self._closing = True
        if self._exchange is None:
            self._close()

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  aiohttp's
        """`close`, and wait up to `timeout` seconds for it; then cut."""
        self.close()
        if self._exchange is not None:
            self._idle = self._loop.create_future()
            await asyncio.wait([self._idle], timeout=timeout)
        if self._handed is not None:
            await self._handed.shutdown(timeout)
        elif self._exchange is not None and self.transport is not None:
            self.transport.abort()

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def _tell_idle(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
