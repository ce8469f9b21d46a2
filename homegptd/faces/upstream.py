"""A connection to an engine: parsed just enough to know where an answer ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import httptools

from .bodies import Body, Spooled
from .heads import Frame, Head, framed

if TYPE_CHECKING:
    from .pool import Upstream

MAX_HEAD = 64 * 1024
EVENT_END = b"\n\n\r\n"
"""With the end of its chunk."""
_ONE_WRITE = 64 * 1024


class Sink(Protocol):
    """Who gets an answer: `on_head`, `on_body`, ..., and then `on_end` or `on_lost`."""

    def on_head(self, head: Head) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_lost(self, why: str) -> None: ...


Whole: TypeAlias = Callable[[bytes, int], bool]
"""Gets a whole answer of JSON, head and body, and where its body starts. Its status is 200, and
nothing in its head is for this connection alone. Returns whether it took the answer; else the sink
gets it."""


class Connection(asyncio.Protocol):
    """One connection to an engine; serves one sink at a time."""

    __slots__ = (
        "_answers", "_choked", "_chunked", "_due", "_frame", "_fresh", "_headed", "_headers",
        "_in_chunk", "_parser", "_paused", "_plain_end", "_raw", "_reason", "_reusable", "_sink",
        "_told", "_transport", "_unsent", "_upstream", "_whole", "between", "complete",
        "idle_since", "silent", "spoke", "straight", "used",
    )  # fmt: skip

    def __init__(self, upstream: Upstream) -> None:
        self.idle_since = 0.0
        self.used = False
        self.silent = True
        """No byte of the answer has come."""
        self.complete = False
        self.between = False
        """What came last ends where a chunk ends, and the next one follows."""
        self.straight: asyncio.Transport | None = None
        """Whoever is to get the next chunk as it comes, if that ends as an event as most are."""
        self.spoke = False
        """Some of its body has come since the sink looked."""
        self._upstream = upstream
        self._sink: Sink | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._unsent: Iterator[bytes] | None = None
        self._choked = self._paused = False
        self._frame: Frame | None = None  # of an answer as most are
        self._whole: Whole | None = None
        self._reusable = False
        self._plain_end = b""
        self._forget()

    def _forget(self) -> None:
        self._raw = b""  # the head as far as it has come
        self._headers: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._headed = self._told = False
        self._due: int | None = None  # bytes of the body that are still to come, where it is known
        self._answers = 0
        self._chunked = self._in_chunk = self.between = False
        self._fresh = True

    # ------------------------------------------------------------ for the relay

    def send(self, sink: Sink, head: bytes, body: Body, whole: Whole | None = None) -> None:
        """Ask; the sink gets what comes back, perhaps before the whole body is out.

        `whole` gets it first where all of it comes in one piece, with a head as before: so vLLM
        answers, whose uvloop collects what uvicorn writes.
        """
        if not self._fresh:
            self._forget()
        self._whole, self._sink = whole if self._frame is not None else None, sink
        self.silent, self.complete, self._reusable, self.spoke = True, False, False, False
        transport = self._transport
        if transport is None or transport.is_closing():
            self._sink = None
            sink.on_lost("closed the connection")
        elif isinstance(body, Spooled):
            transport.write(head)
            self._unsent = body.pieces()
            self._send_on()
        elif len(body) < _ONE_WRITE:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)

    def _send_on(self) -> None:
        """As much of a body on disk as the engine takes now."""
        while self._unsent is not None and not self._choked and self.usable:
            try:
                piece = next(self._unsent, None)
            except OSError as error:
                self._break(f"cannot be sent what was held for it ({error})")
                return
            if piece is None:
                self._unsent = None
            elif self._transport is not None:
                self._transport.write(piece)

    def go_straight(self, client: asyncio.Transport, plain_end: bytes | None) -> None:
        """Chunks that end so go to the client by themselves, up to the first that does not."""
        if plain_end is not None:
            self.straight, self._plain_end = client, plain_end

    def pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._paused = True

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            self._paused = False

    def leave(self) -> None:
        """The sink is done: keep the connection if the answer is complete, else close it."""
        transport, self._sink, self.straight = self._transport, None, None
        if transport is None:
            return
        if self._reusable and self._unsent is None and not transport.get_write_buffer_size():
            self.used = True
            if self._paused:
                self.resume()
            self._upstream.keep(self)
        else:
            self._unsent = None
            transport.abort()  # vLLM aborts a request whose client is gone

    def discard(self) -> None:
        """Close, whatever is under way."""
        self._reusable = False
        self.leave()

    def heard(self) -> None:
        """The engine said something lately."""
        self._upstream.heard()

    def engine_silent_s(self) -> float:
        """How long the engine has said nothing, over any connection, in seconds."""
        return self._upstream.silent_s()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # ------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=0)  # write at once, as to clients

    def data_received(self, data: bytes) -> None:
        client = self.straight
        if client is not None:
            size = len(data)
            if (
                size < _SHORT
                and data.endswith(self._plain_end)
                and data.startswith(_SIZE_LINES[size])
            ):
                self.spoke = True
                if not client.is_closing():  # uvloop raises where asyncio only warns
                    client.write(data)
                return
            self.straight = None
        sink = self._sink
        if sink is None:
            self.discard()  # an answer that nobody asked for
            return
        if self.between and data.startswith(_size_line(len(data))) and data.endswith(b"\r\n"):
            self.spoke = True
            sink.on_body(data)  # one whole chunk: the parser need not see it
            return
        whole, self._whole = self._whole, None
        if whole is not None and self._is_taken(data, whole):
            return
        self.silent = self._fresh = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(f"sent what is not HTTP ({error})")
            return
        if self._answers > 1:
            self._break("sent more than one answer")
            return
        if not self._told:
            rest = self._take_head(data, sink)
            if rest is None:
                return
            data = rest
        if self._is_too_much(data):
            self._break("sent more than one answer")
            return
        self.between = self._chunked and self._is_between(data)
        self._hand_over(data, sink)

    def _is_taken(self, data: bytes, whole: Whole) -> bool:
        """Whether the parser need not see it."""
        frame = self._frame
        split = frame.split(data) if frame is not None else None
        if split is None:
            return False
        size, start = split
        if start + size != len(data):
            return False
        self.silent, self.complete, self._reusable = False, True, True
        return whole(data, start)

    def _is_too_much(self, data: bytes) -> bool:
        """Also by an empty line: the parser skips it, and the client would get it."""
        if self._due is None:
            return self.complete and data.endswith(b"\r\n\r\n\r\n")
        self._due -= len(data)
        return self._due < 0

    def _is_between(self, data: bytes) -> bool:
        return not (self._in_chunk or self.complete) and data.endswith(b"\n")

    def _take_head(self, data: bytes, sink: Sink) -> bytes | None:
        """What follows the head; None if it is not complete, or no good."""
        self._raw += data
        end = self._raw.find(b"\r\n\r\n")
        if (len(self._raw) if end < 0 else end) > MAX_HEAD:
            self._break("sent a head that is too long")
            return None
        if not self._headed:
            return None
        if not self._raw.startswith(b"HTTP/"):
            self._break("sent something before its answer")
            return None
        if end < 0:
            self._break("sent a head that ends in bare line feeds")
            return None
        raw, rest = self._raw[: end + 4], self._raw[end + 4 :]
        self._raw, self._told = b"", True
        head = self._head()
        self._chunked = head.chunked
        if head.length is not None:
            self._due = 0 if head.status in (204, 304) else head.length
            self._frame = framed(raw, head)
        self._headers = []  # a stream is long
        sink.on_head(head)
        return rest

    def _head(self) -> Head:
        chunked, length, kind = False, None, b""
        for key, value in self._headers:
            name = key.lower()
            if name == b"transfer-encoding":
                chunked = value.lower() == b"chunked"
            elif name == b"content-length":
                length = int(value)
            elif name == b"content-type":
                kind = kind or value
        status = self._parser.get_status_code()
        return Head(status, self._reason, self._headers, chunked, length, kind)

    def _hand_over(self, data: bytes, sink: Sink) -> None:
        if data and self._sink is sink:
            self.spoke = True
            sink.on_body(data)
        if self.complete and self._sink is sink:
            sink.on_end()

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self._send_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._upstream.drop(self)
        self._break("closed the connection" if exc is None else f"is gone ({exc})")

    def _break(self, why: str) -> None:
        sink, self._sink, self._unsent, self.straight = self._sink, None, None, None
        self._reusable = False
        if self._transport is not None:
            self._transport.abort()
        if sink is not None:
            sink.on_lost(why)

    # ------------------------------------------------------------ callbacks of httptools

    def on_message_begin(self) -> None:
        self._answers += 1

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._headed = True

    def on_chunk_header(self) -> None:
        self._in_chunk = True

    def on_chunk_complete(self) -> None:
        self._in_chunk = False

    def on_message_complete(self) -> None:
        self.complete = True
        self._reusable = self._parser.should_keep_alive()


@lru_cache(maxsize=1024)
def _size_line(length: int) -> bytes:
    """How so many bytes begin if they are one whole chunk, and not the last one. Any other way to
    write its size is the parser's business."""
    for digits in range(1, 9):
        size = length - digits - 4
        line = b"%x\r\n" % max(size, 0)
        if size > 0 and len(line) == digits + 2:
            return line
    return b"-" * (length + 1)  # there is none of that length


_SHORT = 1024
_SIZE_LINES = [_size_line(length) for length in range(_SHORT)]


class Unchunked(Connection):
    """For clients of HTTP/1.0, who know no transfer coding: the sink gets the bare body."""

    __slots__ = ("_pieces",)

    def __init__(self, upstream: Upstream) -> None:
        self._pieces: list[bytes] = []
        super().__init__(upstream)

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def data_received(self, data: bytes) -> None:
        self.between = False  # the parser takes the bodies out, so it has to see all
        super().data_received(data)

    def _is_between(self, data: bytes) -> bool:
        return not self._in_chunk

    def _hand_over(self, data: bytes, sink: Sink) -> None:
        pieces, self._pieces = b"".join(self._pieces), []
        self._reusable = False
        super()._hand_over(pieces, sink)
