"""aiohttp's server, bounded: in connections, and in the time one may take to say something."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from .outlet import Tells

log = logging.getLogger(__name__)

HEAD_S = 30.0
"""From the connection to the end of the first request's head, in seconds. A client that sends half
a head and waits would otherwise keep a descriptor for as long as it likes."""

_QUIET = logging.getLogger("homegptd.faces.server.peers")
_QUIET.setLevel(logging.CRITICAL + 1)
"""What aiohttp says of peers that do not speak HTTP: a traceback for each, so anybody could fill
the log. Our own defects are told by the door."""


class Connection(Tells, RequestHandler):
    """aiohttp (3.14) leaves whoever waits for a body waiting when a later piece of it is garbled:
    its parser in C only queues the error, as if it were the next request."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        request = self._current_request
        if self._messages and request is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("its chunks are garbled"))


class Server(web.Server):
    """When it is full, the silent connection that came first makes room for a new one."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        most: int | None = None,
        head_s: float = HEAD_S,
        **more: Any,
    ) -> None:
        super().__init__(self._heard, logger=_QUIET, **more)
        self._answer = handler
        self._most = most or _room_for_connections()
        self._head_s = head_s
        self._silent: dict[RequestHandler, asyncio.Transport] = {}

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    def _heard(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        self._silent.pop(request.protocol, None)
        return self._answer(request)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._silent[handler] = transport
        if len(self._connections) > self._most:
            log.warning("%d connections, as many as may be; a silent one goes", self._most)
            next(iter(self._silent.values())).abort()
        self._loop.call_later(self._head_s, self._look, handler)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        self._silent.pop(handler, None)
        super().connection_lost(handler, exc)

    def _look(self, handler: RequestHandler) -> None:
        transport = self._silent.pop(handler, None)
        if transport is not None:
            transport.abort()


def _room_for_connections() -> int:
    """Half of the descriptors: each answer needs one for its engine too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft // 2 - 64, 16)
