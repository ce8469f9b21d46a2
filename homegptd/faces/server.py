"""aiohttp's server, bounded: in connections, and in the time one may take to say something."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import http_exceptions, web
from aiohttp.web_protocol import RequestHandler

from . import errors
from .ask import Broken
from .errors import Problem
from .express import Express
from .front import QUIET_TICKS, Front
from .outlet import Tells
from .ticks import Ticks

log = logging.getLogger(__name__)

HEAD_S = 30.0
"""From the connection to the end of the first request's head, in seconds. A client that sends half
a head and waits would otherwise keep a descriptor for as long as it likes."""

_LONGEST_TOLD = 200
_QUIET = logging.getLogger("homegptd.faces.server.peers")
_QUIET.setLevel(logging.CRITICAL + 1)
"""What aiohttp says of peers that do not speak HTTP: a traceback for each, so anybody could fill
the log. Our own defects are told by the door."""


class _Few(list[Any]):
    """As much of a deque as aiohttp uses: an empty one takes 700 bytes, and hardly ever is there
    more than one request that waits for its turn."""

    __slots__ = ()

    def popleft(self) -> Any:
        return self.pop(0)


class _Request(web.BaseRequest):
    """aiohttp keeps what it has found out in a dictionary: 200 bytes for this alone."""

    @property
    def keep_alive(self) -> bool:
        return not self._message.should_close


class Connection(Tells, RequestHandler):
    """aiohttp (3.14) leaves whoever waits for a body waiting when a later piece of it is garbled:
    its parser in C only queues the error, as if it were the next request."""

    __slots__ = ("already", "broken", "flow", "look")

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._messages = _Few()  # type: ignore[assignment]
        self.flow = None
        self.broken: Broken | None = None
        """What came of the next request on the short way, where it comes to be sent again."""
        self.already: Broken | None = None
        """The same for the request that is being answered."""
        self.look: asyncio.TimerHandle | None = None
        """At whether it has said anything."""

    def heard(self) -> None:
        """Its first request has come, so nothing waits for that any longer. A clock is a kilobyte,
        and would stay for as long as a stream lasts."""
        if self.look is not None:
            self.look.cancel()
            self.look = None
            if self._keepalive_handle is not None:
                self._keepalive_handle.cancel()
                self._keepalive_handle = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        request = self._current_request
        if self._messages and request is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("its chunks are garbled"))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp's parser refuses, in the form of all our errors. Closes the connection."""
        reply = super().handle_error(request, status, exc, message)
        if status != 400:
            return reply
        reply = errors.response(_refused(exc, message or ""))
        reply.force_close()
        return reply


class Server(web.Server):
    """When it is full, the silent connection that came first makes room for a new one.

    With `express` connections are `Front`s, which hand over to aiohttp what is not for them.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        most: int | None = None,
        head_s: float = HEAD_S,
        express: Express | None = None,
        keepalive_timeout: float = 75.0,
        **more: Any,
    ) -> None:
        super().__init__(
            self._heard,
            request_factory=self._request,
            logger=_QUIET,
            keepalive_timeout=keepalive_timeout,
            **more,
        )
        self._answer = handler
        self._most = most or _room_for_connections()
        self._head_s = head_s
        self._express = express
        self._silent: dict[Front | RequestHandler, asyncio.Transport] = {}
        self._ticks = Ticks(self._loop)
        self._tick_s = keepalive_timeout / (QUIET_TICKS - 1)

    def __call__(self) -> RequestHandler:
        if self._express is not None:
            # aiohttp asks of it no more than what it has
            return cast("RequestHandler", Front(self, self._express, self._loop))
        return self.handler()

    def handler(self) -> Connection:
        """For a connection, or for what is left of one."""
        return Connection(self, loop=self._loop, **self._kwargs)

    def _request(
        self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any
    ) -> _Request:
        return _Request(message, payload, protocol, writer, task, self._loop)

    def _heard(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        connection = cast("Connection", request.protocol)
        self.heard_of(connection)
        connection.heard()
        connection.already, connection.broken = connection.broken, None
        return self._answer(request)

    def front_made(self, front: Front, transport: asyncio.Transport) -> None:
        self._let_in(cast("RequestHandler", front), transport)
        self._ticks.join(front, self._tick_s)

    def heard_of(self, front: Front | RequestHandler) -> None:
        self._silent.pop(front, None)

    def front_lost(self, front: Front) -> None:
        self._silent.pop(front, None)
        self._ticks.leave(front, self._tick_s)
        self._connections.pop(cast("RequestHandler", front), None)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        self._let_in(handler, transport)
        look = self._loop.call_later(self._head_s, self._look, handler)
        cast("Connection", handler).look = look

    def _let_in(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._silent[handler] = transport
        if len(self._connections) > self._most:
            log.warning("%d connections, as many as may be; a silent one goes", self._most)
            next(iter(self._silent.values())).abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        self._silent.pop(handler, None)
        super().connection_lost(handler, exc)

    def _look(self, handler: Front | RequestHandler) -> None:
        transport = self._silent.pop(handler, None)
        if transport is not None:
            transport.abort()


def _refused(exc: BaseException | None, message: str) -> Problem:
    match exc:
        case http_exceptions.ContentEncodingError():
            text = "its Content-Encoding cannot be read here: gzip and deflate can"
            return errors.bad_request(text, status=415)
        case http_exceptions.LineTooLong():
            return errors.bad_request("a line of its head is too long", status=431)
        case _:
            first = message.strip().partition("\n")[0].rstrip(": ")[:_LONGEST_TOLD]
            return errors.bad_request(f"this is no request of HTTP/1.1: {first}")


def _room_for_connections() -> int:
    """Half of the descriptors: each answer needs one for its engine too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft // 2 - 64, 16)
