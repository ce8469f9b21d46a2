"""A request as the engine gets it, how long it may take, and the ways in which it can end."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web
from msgspec import Struct

from homegptd.core.refusals import Reason, Refusal

from . import errors
from .bodies import Body
from .errors import Shape

log = logging.getLogger(__name__)

_TICK_S = 5.0


class Limits(Struct, frozen=True):
    """Seconds. They do not run while the answer is frozen."""

    first_byte_s: float = 600.0
    between_bytes_s: float = 120.0
    client_s: float = 120.0
    """How long a client may take none of what waits for it."""
    linger_s: float = 10.0
    """How long a client that reads slowly gets to read the end of an answer that failed."""

    @property
    def tick_s(self) -> float:
        """From one look at whether an answer goes on to the next, and so from one comment to the
        next. No limit is overrun by more than two of them, a quarter of it, but for limits of less
        than 0.2 s: nobody looks at a small request before (`exchange`)."""
        return min(self.first_byte_s / 8, self.between_bytes_s / 8, self.client_s / 8, _TICK_S)


class Ask(Struct):
    """A request as the engine gets it. `headers` are lines that end in CRLF."""

    path: str
    headers: bytes
    body: Body
    shape: Shape
    method: str = "POST"
    learn: Callable[[bytes], None] | None = None
    """Gets the first bytes of an answer that is none of an error."""
    strip_usage: bool = False
    """Whether the usage of a stream came because we asked, so that the client must not see it."""
    replayable: bool = True
    """Whether sending it twice does no harm. Otherwise it is sent once, on a new connection."""
    engine_key: str | None = None
    """The engine's own, where it asks for one. The client's has stayed at the door."""

    def forget(self) -> None:
        """Its answer has begun, so it is not sent again: the body may go."""
        self.body = b""

    def head(self) -> bytes:
        if self.method == "GET":
            return self.begin() + b"\r\n"
        return b"%sContent-Length: %d\r\n\r\n" % (self.begin(), len(self.body))

    def begin(self) -> bytes:
        """The head but for the length."""
        head = f"{self.method} {self.path} HTTP/1.1\r\nHost: engine\r\n"
        if self.engine_key is not None:
            head += f"Authorization: Bearer {self.engine_key}\r\n"
        return head.encode() + self.headers


class Broken(Exception):
    """The answer did not come to its end.

    `sent`: the engine may have got the request. `begun`: the client has got a part of the answer,
    an error frame, and, unless `kept`, a closed connection. `again`: the request is worth sending
    once more.
    """

    def __init__(
        self, refusal: Refusal, *, begun: bool = False, again: bool = False, sent: bool = True
    ) -> None:
        super().__init__(refusal.message)
        self.refusal, self.begun, self.again, self.sent = refusal, begun, again, sent
        self.kept = False
        self.problem = errors.refused(refusal)
        """What the client hears."""


class Relayed(web.StreamResponse):
    """What a handler returns when the client's transport already has the answer."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._open = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._open

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing: the head is out."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing: the body is out."""


KEPT = Relayed(keep_alive=True)
CLOSED = Relayed(keep_alive=False)


def tell(broken: Broken) -> None:
    """A cut the machine has told of itself, and what vLLM says of a request is the client's."""
    if broken.refusal.reason is not Reason.CUT and broken.problem.status >= 500:
        log.warning("%s", broken.refusal.message)
