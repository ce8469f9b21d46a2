"""What an engine's connection hands on, however its bytes are cut into reads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homegptd.faces.heads import HOP_BY_HOP, Head
from homegptd.faces.pool import Pool
from homegptd.faces.upstream import Connection, Unchunked

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
        self.wants_whole = True
        self.whole = 0

    def take(self, data: bytes, start: int) -> bool:
        """A whole answer, if that is wanted."""
        if self.wants_whole:
            self.whole += 1
            self.got.append((data[start:], False))
            self.ended = True
        return self.wants_whole

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
    connection = kind(pool.upstream("engine"))
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


# ---------------------------------------------------------------- whole answers

JSON = b"content-type: application/json"
ODD = st.sampled_from(
    [b"Content-Type: application/json", b"content-type: text/plain", b"x-note: content-length: 7",
     b"connection: close", b"Connection: keep-alive", b"transfer-encoding: chunked", b"te: x",
     b"content-length: 4", b"content-length:4", b"x: y\nz: content-length: 4", b"x: y\r\n z"]
)  # fmt: skip
fields = st.tuples(
    st.sampled_from(
        [[JSON], [JSON], [JSON, b"server: uvicorn"], [b"content-type: text/plain"], []]
    ),
    st.one_of(st.just([]), st.lists(ODD, max_size=2)),
).map(lambda parts: parts[0] + parts[1])


def said(status: int, more: list[bytes], at: int, body: bytes, spelled: bytes = b"%d") -> bytes:
    lines = [b"HTTP/1.1 %d OK" % status, *more]
    lines.insert(1 + at % len(lines), b"content-length: " + spelled % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def asks(connection: Connection, *, whole: bool, wants_whole: bool = True) -> Sink:
    sink = Sink(connection)
    sink.wants_whole = wants_whole
    connection.send(sink, b"", b"", sink.take if whole else None)
    return sink


def second(
    pool: Pool, first: bytes, reads: list[bytes], *, whole: bool, wants_whole: bool = True
) -> Sink | None:
    """What is heard of an answer after another over the same connection; None: of that none was."""
    connection = Connection(pool.upstream("engine"))
    connection.connection_made(Transport())  # type: ignore[arg-type]
    sink = asks(connection, whole=whole, wants_whole=wants_whole)
    connection.data_received(first)
    if not sink.ended or not connection._reusable:
        return None
    sink = asks(connection, whole=whole, wants_whole=wants_whole)
    for read in reads:
        connection.data_received(read)
    return sink


@given(
    st.sampled_from([200] * 6 + [201, 204, 304, 500]),
    fields,
    st.integers(0, 5),
    st.sampled_from([b"", b"{}"]),
    st.binary(max_size=30),
    st.sampled_from([b"%d", b"%d", b"%d", b"+%d", b"0%d", b"%d ", b"1_%d", b"%d;"]),
    st.sampled_from([b"", b"", b"", b"x", b"HTTP/1.1 200 OK\r\n\r\n"]),
    st.data(),
)
@settings(max_examples=500)
def test_a_whole_answer_is_what_the_parser_would_have_made_of_it(
    pool: Pool, status: int, more: list[bytes], at: int, one: bytes, two: bytes, spelled: bytes,
    rest: bytes, data: st.DataObject,
) -> None:  # fmt: skip
    then = data.draw(st.sampled_from([status] * 4 + [200, 500]))
    again = data.draw(st.sampled_from([more] * 4 + [more[::-1], [JSON]]))
    other = said(then, again, at, two, spelled) + rest
    places = st.lists(st.integers(0, len(other)), max_size=2)
    cuts = sorted({*data.draw(st.one_of(st.just([]), places)), 0, len(other)})
    reads = [other[a:b] for a, b in pairwise(cuts)]
    first = said(status, more, at, one)
    wants_whole = data.draw(st.sampled_from([True, True, True, False]))
    short = second(pool, first, reads, whole=True, wants_whole=wants_whole)
    long = second(pool, first, reads, whole=False)
    assert (short is None) == (long is None)
    if short is None or long is None:
        return
    assert (short.ended, short.lost) == (long.ended, long.lost)
    if long.lost:
        assert long.body.startswith(short.body)  # what waited for its rest is handed to nobody
    else:
        assert short.body == long.body
    if long.ended:
        assert short.connection._reusable == long.connection._reusable
    if short.whole:
        assert long.head is not None
        assert (long.head.status, long.head.kind) == (200, b"application/json")
        assert HOP_BY_HOP.isdisjoint(name.lower() for name, _ in long.head.headers)


LIKE_VLLM = [b"date: Thu, 26 Nov 2026 10:00:00 GMT", b"server: uvicorn", JSON]


@pytest.mark.parametrize(
    "other",
    [said(500, LIKE_VLLM, 2, b"{}"), said(200, LIKE_VLLM, 1, b"{}"),
     said(200, [b"date: Thu, 26 Nov 2026 10:00:01 GMT", *LIKE_VLLM[1:]], 2, b"{}"),
     said(200, [*LIKE_VLLM, b"x: y"], 2, b"{}")],
)  # fmt: skip
def test_another_head_is_parsed(pool: Pool, other: bytes) -> None:
    sink = second(pool, said(200, LIKE_VLLM, 2, b"{}"), [other], whole=True)
    assert sink is not None
    assert sink.head is not None
    assert (sink.ended, sink.whole, sink.body) == (True, 0, b"{}")


@pytest.mark.parametrize("cut", [1, 20, 100, 130, 140])
def test_an_answer_in_pieces_is_heard_piece_by_piece(pool: Pool, cut: int) -> None:
    answer = said(200, LIKE_VLLM, 2, b"{}" * 10)
    sink = second(pool, answer, [answer[:cut], answer[cut:-1]], whole=True)
    assert sink is not None
    assert sink.body == b"{}" * 9 + b"{"
    assert not sink.connection.silent
    sink.connection.connection_lost(None)
    assert sink.lost == "closed the connection"


def test_an_answer_in_the_body_of_another_is_none(pool: Pool) -> None:
    inner = said(200, LIKE_VLLM, 2, b"{}")
    outer = said(200, LIKE_VLLM, 2, inner)
    sink = second(pool, inner, [outer[: -len(inner)], inner], whole=True)
    assert sink is not None
    assert (sink.body, sink.ended, sink.whole) == (inner, True, 0)


@pytest.mark.parametrize("lead", [b"\r\n", b"\r\n\r\n"])
def test_an_answer_begins_with_its_head(pool: Pool, lead: bytes) -> None:
    answer = said(200, LIKE_VLLM, 2, b"{}")
    sink = heard(pool, [lead + answer])
    assert "before its answer" in sink.lost
    assert sink.head is None
    later = second(pool, answer, [lead + answer], whole=True)
    assert later is not None
    assert "before its answer" in later.lost


@pytest.mark.parametrize("more", [b"\r\n", b"\r\n\r\n"])
@pytest.mark.parametrize("reads", [[said(200, LIKE_VLLM, 2, b"{}")], [HEAD, chunk(b"one"), END]])
def test_empty_lines_after_an_answer_are_too_much(
    pool: Pool, reads: list[bytes], more: bytes
) -> None:
    sink = heard(pool, [*reads[:-1], reads[-1] + more])
    assert "more than one" in sink.lost
    assert not sink.ended


@pytest.mark.parametrize("status", [204, 304])
def test_an_empty_line_after_no_body_is_too_much(pool: Pool, status: int) -> None:
    answer = said(status, LIKE_VLLM, 2, b"123456789")[:-9]
    assert heard(pool, [answer]).ended
    assert "more than one" in heard(pool, [answer + b"\r\n"]).lost


def test_what_comes_after_a_whole_answer_is_nobodys(pool: Pool) -> None:
    answer = said(200, LIKE_VLLM, 2, b"{}" * 10)
    sink = second(pool, answer, [answer + b"x"], whole=True)
    assert sink is not None
    assert not sink.whole
