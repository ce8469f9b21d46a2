"""Bodies of requests: read within limits, held until their request ends, the big ones on disk.

A request that waits may have to be sent twice, so its whole body is kept. Small bodies stay in
memory; a bigger one moves to an unlinked file once it, or all of them together, take too much. What
reads a body takes `Body`: bytes, or a `Spooled` that looks like them to the scanner.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeAlias

from aiohttp import web

from homegptd.core.refusals import Reason, Refusal

from . import errors
from .errors import Denied

_PIECE_S = 60.0
"""Between two pieces of a request's body, in seconds."""
_SMALL = 256 * 1024
"""A body up to this size stays in memory, whatever the others take."""
_ALONE = 16 << 20
"""A body beyond this goes to disk although there would be room: memory is for many."""
_READ = 256 * 1024

Text: TypeAlias = bytes | mmap.mmap
"""A body to be searched: what both have is slices, `find` and `rfind`."""


class Spooled:
    """A body in a file; after edits, stretches of the file with bytes between them."""

    __slots__ = ("_file", "_parts", "_size")

    def __init__(self, file: BinaryIO, parts: Sequence[bytes | range]) -> None:
        """A range is what lies there in the file."""
        self._file, self._parts = file, tuple(parts)
        self._size = sum(map(len, self._parts))

    def __len__(self) -> int:
        return self._size

    def pieces(self) -> Iterator[bytes]:
        """The body from its beginning, in pieces; as often as it has to be sent.

        Read where it is needed: what was written a moment ago lies in the page cache.
        """
        for part in self._parts:
            if isinstance(part, range):
                yield from self._stretch(part)
            elif part:
                yield part

    def _stretch(self, part: range) -> Iterator[bytes]:
        at = part.start
        while at < part.stop:
            piece = os.pread(self._file.fileno(), min(_READ, part.stop - at), at)
            if not piece:
                raise OSError(f"a held body ends at {at}, before {part.stop}")
            at += len(piece)
            yield piece

    @contextmanager
    def text(self) -> Iterator[Text]:
        """The body, to be searched without a copy of it in memory; if edited, with one."""
        if self._parts == (range(os.fstat(self._file.fileno()).st_size),):
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                yield text
        else:
            yield b"".join(self.pieces())

    def cut(self, start: int, end: int) -> Iterator[bytes | range]:
        """The parts between two places of the body."""
        at = 0
        for part in self._parts:
            low, high = max(start - at, 0), min(end - at, len(part))
            at += len(part)
            if low < high:
                yield part[low:high]

    def edited(self, edits: Sequence[Edit]) -> Spooled:
        parts: list[bytes | range] = []
        at = 0
        for start, end, new in edits:
            parts += [*self.cut(at, start), new]
            at = end
        return Spooled(self._file, [*parts, *self.cut(at, self._size)])


Body: TypeAlias = bytes | Spooled
Edit: TypeAlias = tuple[int, int, bytes]
"""From where to where in a body, and what stands there instead."""


@contextmanager
def reading(body: Body) -> Iterator[Text]:
    """The text of a body, for the block."""
    if isinstance(body, bytes):
        yield body
    else:
        with body.text() as text:
            yield text


def edited(body: Body, *edits: Edit) -> Body:
    """The same body with `edits`, which follow one another."""
    if isinstance(body, Spooled):
        return body.edited(edits)
    pieces: list[bytes] = []
    at = 0
    for start, end, new in edits:
        pieces += [body[at:start], new]
        at = end
    return b"".join([*pieces, body[at:]])


_NOTHING_LEFT: deque[bytes] = deque(maxlen=0)


class Bodies:
    """What the bodies of all requests take; one for all doors of the daemon."""

    def __init__(
        self,
        most: int = 256 << 20,
        *,
        in_memory: int = 32 << 20,
        directory: Path | None = None,
    ) -> None:
        """`most` bounds memory and disk together, in bytes; `in_memory` the bigger ones there.

        `directory` is for the files, which nobody sees; None: where the system has its own.
        """
        self.most, self.in_memory, self.directory = most, in_memory, directory
        self.held_in_memory = self.held_on_disk = 0
        self.again_s: Callable[[], float | None] = lambda: None
        """When there may be room again, in seconds: the router's guess."""

    def hold(self) -> Hold:
        """`with bodies.hold() as hold`: room for one body, given back at the end of the block."""
        return Hold(self)

    @property
    def held(self) -> int:
        return self.held_in_memory + self.held_on_disk

    def take(self, size: int) -> bool:
        """Whether there is room for a small body beside all others. Then it is to be given back."""
        size += self.held_in_memory
        if size > self.in_memory or size + self.held_on_disk > self.most:
            return False
        self.held_in_memory = size
        return True

    def give_back(self, size: int) -> None:
        self.held_in_memory -= size

    def full(self, text: str) -> Denied:
        refusal = Refusal(Reason.QUEUE_FULL, text, retry_after_s=self.again_s())
        return Denied(errors.refused(refusal))


class Hold:
    """The room that one request's body takes."""

    __slots__ = ("_bodies", "_file", "_pieces", "_size")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._pieces: list[bytes] = []
        self._file: BinaryIO | None = None
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is None:
            self._bodies.held_in_memory -= self._size
        else:
            self._bodies.held_on_disk -= self._size
            self._file.close()

    async def receive(self, request: web.BaseRequest, limit: int) -> Body:
        """The whole body. Raises: Denied over `limit` bytes (413), and where all together take too
        much (503), both before reading where the length is known."""
        announced = request.content_length or 0
        if announced > limit:
            raise _too_large(limit)
        self._must_fit(announced)
        _invite(request)
        while piece := await _next_piece(request):
            self._take(piece, limit)
            if request.content.at_eof():
                request.content._buffer = _NOTHING_LEFT  # noqa: SLF001  its own takes 700 bytes
                break
        if self._file is not None:
            return Spooled(self._file, [range(self._size)])
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def rewritten(self, body: bytes) -> Body:
        """The body that was received, written anew: it lies where that one did."""
        if self._file is None:
            return body
        self._file.seek(0)
        self._file.truncate()
        self._write(self._file, body)
        return Spooled(self._file, [range(len(body))])

    def _take(self, piece: bytes, limit: int) -> None:
        size, bodies = self._size + len(piece), self._bodies
        if size > limit:
            raise _too_large(limit)
        self._must_fit(len(piece))
        self._size = size
        if self._file is not None:
            bodies.held_on_disk += len(piece)
            self._write(self._file, piece)
            return
        bodies.held_in_memory += len(piece)
        self._pieces.append(piece)
        if size > _SMALL and (size > _ALONE or bodies.held_in_memory > bodies.in_memory):
            self._to_disk()

    def _must_fit(self, more: int) -> None:
        """One alone always does, within its own limit."""
        bodies = self._bodies
        if bodies.held + more > bodies.most and bodies.held > self._size:
            text = f"requests that wait hold {bodies.held >> 20} MiB already"
            raise bodies.full(text)

    def _to_disk(self) -> None:
        try:
            file = tempfile.TemporaryFile(dir=self._bodies.directory, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._no_disk(error) from None
        self._file = file
        self._bodies.held_in_memory -= self._size
        self._bodies.held_on_disk += self._size
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            self._write(file, piece)

    def _write(self, file: BinaryIO, piece: bytes) -> None:
        """Into the page cache; nobody waits for the disk itself."""
        try:
            written = file.write(piece)
        except OSError as error:
            raise self._no_disk(error) from None
        if written != len(piece):
            raise self._no_disk(OSError("the disk is full"))

    def _no_disk(self, error: OSError) -> Denied:
        return self._bodies.full(f"cannot keep a large body: {error.strerror or error}")


async def read_body(request: web.BaseRequest, limit: int) -> bytes:
    """The whole of a small body. Raises: Denied (413) over `limit` bytes."""
    with Bodies(limit, in_memory=limit).hold() as hold:
        body = await hold.receive(request, limit)
        return body if isinstance(body, bytes) else b"".join(body.pieces())


def _invite(request: web.BaseRequest) -> None:
    if request.headers.get("Expect", "").lower() != "100-continue":
        return
    transport = request.transport
    if transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _next_piece(request: web.BaseRequest) -> bytes:
    """Raises: Denied where the client stops in the middle of its body (408), or garbles it."""
    try:
        if request.content.is_eof():  # all of it is here, as with most requests
            return request.content.read_nowait()
        async with asyncio.timeout(_PIECE_S):
            return await request.content.readany()
    except TimeoutError:
        text = f"no more of the body came for {_PIECE_S:.0f} s"
        raise Denied(errors.bad_request(text, status=408)) from None
    except web.RequestPayloadError as error:
        raise Denied(errors.bad_request(f"the body cannot be read: {error}")) from None


def _too_large(limit: int) -> Denied:
    return Denied(errors.of_reason("too-large", f"the body is larger than {limit} bytes"))
