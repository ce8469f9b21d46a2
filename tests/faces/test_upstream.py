"""What an engine's connection hands on, however its bytes are cut into reads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homegptd.faces.upstream import Connection, Head, Pool, Unchunked

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
LURE = b"3\r\nabc\r\n"
"""A chunk to look at, but a body to who knows where it stands."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Transport:
    """Takes everything, closes when asked."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None: ...

    def set_write_buffer_limits(self, high: int) -> None: ...

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class Sink:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.head: Head | None = None
        self.got: list[tuple[bytes, bool]] = []
        """Pieces of the body, and whether what follows each is a chunk."""
        self.ended = False
        self.lost = ""

    def on_head(self, head: Head) -> None:
        self.head = head

    def on_body(self, data: bytes) -> None:
        self.got.append((data, self.connection.between))

    def on_end(self) -> None:
        self.ended = True

    def on_lost(self, why: str) -> None:
        self.lost = why

    @property
    def body(self) -> bytes:
        return b"".join(data for data, _ in self.got)


class Parsed(Connection):
    """Lets the parser see every byte."""

    def data_received(self, data: bytes) -> None:
        self.between = False
        super().data_received(data)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    async def made() -> Pool:
        return Pool()

    with asyncio.Runner() as runner:
        yield runner.run(made())


def heard(pool: Pool, reads: Sequence[bytes], kind: type[Connection] = Connection) -> Sink:
    connection = kind(pool, "engine")
    transport: Any = Transport()
    connection.connection_made(transport)
    sink = Sink(connection)
    connection.send(sink, b"GET / HTTP/1.1\r\n\r\n", b"")
    for read in reads:
        connection.data_received(read)
    return sink


bodies = st.lists(
    st.one_of(st.binary(min_size=1, max_size=40), st.just(LURE), st.just(b"\r\n"), st.just(b"\n")),
    min_size=1, max_size=6,
)  # fmt: skip


@given(bodies, st.data())
def test_it_is_the_same_with_and_without_the_parser(
    pool: Pool, said: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(map(chunk, said)) + END
    ends = [sum(len(chunk(each)) for each in said[:n]) for n in range(len(said) + 1)]
    places = st.one_of(st.sampled_from(ends), st.integers(0, len(stream)))
    cuts = sorted({*data.draw(st.lists(places, max_size=8)), 0, len(stream)})
    reads = [HEAD, *(stream[a:b] for a, b in pairwise(cuts))]
    short, long = heard(pool, reads), heard(pool, reads, Parsed)
    assert short.got == long.got
    assert short.body == stream
    assert short.ended
    assert long.ended
    for at, (_, between) in zip(cuts[1:], short.got, strict=True):
        assert between == (at in ends[1:])


def test_a_chunk_that_only_looks_whole_is_none(pool: Pool) -> None:
    sink = heard(pool, [HEAD, chunk(b"one"), b"1", LURE, b"x" * (0x13 - 3 - 2), b"\r\n" + END])
    assert sink.ended
    assert [between for _, between in sink.got] == [True, False, False, False, False]


def test_a_body_with_a_length_has_no_chunks(pool: Pool) -> None:
    head = HEAD.replace(b"transfer-encoding: chunked", b"content-length: %d" % (4 + 2 * len(LURE)))
    sink = heard(pool, [head, b"abc\n", LURE, LURE])
    assert sink.ended
    assert not any(between for _, between in sink.got)


@pytest.mark.parametrize("line", [b"00f", b"F", b"f;x=y", b"+f", b"0xf", b"f ", b"10", b"e"])
def test_other_spellings_of_a_size_are_the_parsers_business(pool: Pool, line: bytes) -> None:
    reads = [HEAD, chunk(b"one"), line + b"\r\n" + b"x" * 15 + b"\r\n", END]
    short, long = heard(pool, reads), heard(pool, reads, Parsed)
    assert (short.got, short.ended, short.lost) == (long.got, long.ended, long.lost)


@pytest.mark.parametrize("length", [3, 4, 5, 6, 20, 21, 22, 262, 263, 264])
def test_garbage_is_no_chunk(pool: Pool, length: int) -> None:
    for byte in b"-0?1\r\n ":
        garbage = (bytes([byte]) * length)[: length - 2] + b"\r\n"
        short, long = heard(pool, [HEAD, LURE, garbage]), heard(pool, [HEAD, LURE, garbage], Parsed)
        assert (short.got, short.ended, short.lost) == (long.got, long.ended, long.lost)


def test_nothing_follows_the_end(pool: Pool) -> None:
    sink = heard(pool, [HEAD, chunk(b"one"), END, chunk(b"two")])
    assert sink.ended
    assert b"two" not in sink.body


def test_the_next_answer_begins_with_a_head(pool: Pool) -> None:
    sink = heard(pool, [HEAD, chunk(b"one"), END])
    sink.connection.send(sink, b"", b"")
    sink.connection.data_received(chunk(b"two"))
    assert "not HTTP" in sink.lost


def test_bare_bodies_need_the_parser(pool: Pool) -> None:
    sink = heard(pool, [HEAD, chunk(b"one"), chunk(b"two"), chunk(LURE), END], Unchunked)
    assert sink.body == b"onetwo" + LURE
    assert sink.ended
