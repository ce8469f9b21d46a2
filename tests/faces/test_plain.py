"""What is read as plain is read as aiohttp reads it, byte by byte; all else is left to aiohttp."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage
from hypothesis import example, given, settings
from hypothesis import strategies as st

from homegptd.faces import plain

BODY = b'{"model":"chat"}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
START = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:9000\r\n"
COMMON = (
    b"Accept: */*\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
    b"User-Agent: OpenAI/Python 2.1.0\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer sk-1\r\nx-stainless-lang: python\r\n"
)


def request(*lines: bytes, body: bytes = BODY) -> bytes:
    return START + b"".join(lines) + b"\r\n" + body


def known(head: plain.Head, data: bytes) -> tuple[int, bytes] | None:
    found = head.split(data)
    return None if found is None else (found[0], data[found[1] :])


def split(data: bytes) -> tuple[plain.Head, int, bytes] | None:
    head = plain.read(data)
    found = None if head is None else known(head, data)
    return None if head is None or found is None else (head, *found)


def test_what_clients_send_is_plain() -> None:
    found = split(request(COMMON, LENGTH))
    assert found is not None
    head, size, body = found
    assert (head.path, size, body) == ("/v1/chat/completions", len(BODY), BODY)
    assert head.headers["authorization"] == "Bearer sk-1"


def test_a_head_is_known_again_whatever_the_length() -> None:
    head = plain.read(request(COMMON, LENGTH))
    assert head is not None
    other = b'{"model":"chat","messages":[]}'
    again = request(COMMON, b"Content-Length: %d\r\n" % len(other), body=other)
    assert known(head, again) == (len(other), other)
    assert known(head, again[:-3]) == (len(other), other[:-3])
    assert known(head, again + b"POST") == (len(other), other + b"POST")


@pytest.mark.parametrize(
    "other",
    [
        request(LENGTH, COMMON),
        request(COMMON.replace(b"sk-1", b"sk-2"), LENGTH),
        request(COMMON, LENGTH.replace(b": ", b": +")),
        request(COMMON, b"Content-Length: 12345678\r\n"),
        request(COMMON, b"Content-Length: \r\n"),
        request(COMMON, LENGTH, b"X: y\r\n"),
        request(COMMON)[:-20],
    ],
)
def test_another_head_is_not_taken_for_it(other: bytes) -> None:
    head = plain.read(request(COMMON, LENGTH))
    assert head is not None
    assert known(head, other) is None


NOT_PLAIN = {
    "no length": request(COMMON),
    "chunks": request(b"Transfer-Encoding: chunked\r\n"),
    "both": request(LENGTH, b"Transfer-Encoding: chunked\r\n"),
    "two lengths": request(LENGTH, LENGTH),
    "a field twice": request(LENGTH, b"Host: other\r\n"),
    "the last request": request(LENGTH, b"Connection: close\r\n"),
    "an upgrade": request(LENGTH, b"Connection: upgrade\r\n", b"Upgrade: websocket\r\n"),
    "a question first": request(LENGTH, b"Expect: 100-continue\r\n"),
    "a coded body": request(LENGTH, b"Content-Encoding: gzip\r\n"),
    "a folded line": request(LENGTH, b"X: y\r\n z\r\n"),
    "a bare line feed": request(LENGTH, b"X: y\n"),
    "a bare return": request(LENGTH, b"X: y\rz\r\n"),
    "a tab": request(LENGTH, b"X:\ty\r\n"),
    "no space": request(LENGTH, b"X:y\r\n"),
    "a space before the colon": request(LENGTH, b"X : y\r\n"),
    "an empty value": request(LENGTH, b"X: \r\n"),
    "a space behind": request(LENGTH, b"X: y \r\n"),
    "a zero byte": request(LENGTH, b"X: y\0\r\n"),
    "not ASCII": request(LENGTH, "X: ü\r\n".encode()),
    "another method": b"PUT" + request(LENGTH)[4:],
    "an old version": request(LENGTH).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "a query": request(LENGTH).replace(b"/completions", b"/completions?a=b"),
    "a coded path": request(LENGTH).replace(b"/v1/", b"/%761/"),
    "a whole URL": request(LENGTH).replace(b"/v1/", b"http://localhost/v1/"),
    "a line before": b"\r\n" + request(LENGTH),
    "half a head": START + LENGTH,
    "a long head": request(LENGTH, b"X: %s\r\n" % (b"y" * plain.LARGEST_HEAD)),
    "an endless length": request(b"Content-Length: 100000000000\r\n"),
    "no host": request(LENGTH).replace(b"Host", b"Hots"),
    "too many fields": request(LENGTH, *(b"X-%d: y\r\n" % number for number in range(100))),
    "nothing": b"",
}


@pytest.mark.parametrize("data", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_all_else_is_not(data: bytes) -> None:
    assert split(data) is None


# ---------------------------------------------------------------- as aiohttp reads it

PIECES = [
    b"POST ", b"GET ", b"/v1/chat/completions", b"/", b"//", b"?x", b" HTTP/1.1", b" HTTP/1.0",
    b"\r\n", b"\n", b"\r", b": ", b":", b" ", b"\t", b",", b"Host", b"Content-Length", b"X",
    b"content-length: 16\r\n", b"Content-Length: 5\r\n", b"Content-Length: 016\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: keep-alive\r\n", b"Connection: close\r\n",
    b"Upgrade: h2c\r\n", b"a: b\r\n", b"a: c\r\n", b"A: c d\r\n", b"\0", b"\xfc", b"16", b"0", BODY,
    b"5\r\nhello\r\n0\r\n\r\n",
]  # fmt: skip
messages = st.builds(
    lambda lines, at, more, body: b"".join([START, *lines[:at], more, *lines[at:], b"\r\n", body]),
    st.lists(st.sampled_from([piece for piece in PIECES if piece.endswith(b"\r\n")]), max_size=6),
    st.integers(0, 6),
    st.one_of(st.just(LENGTH), st.sampled_from(PIECES), st.binary(max_size=8)),
    st.sampled_from([BODY, b"", b"hello", BODY + BODY]),
)
soup = st.lists(st.sampled_from(PIECES), max_size=25).map(b"".join)


def lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@given(st.one_of(messages, soup))
@example(request(COMMON, LENGTH))
@settings(max_examples=1500, deadline=None)
def test_what_is_plain_is_one_message_for_aiohttp_too(
    loop: asyncio.AbstractEventLoop, data: bytes
) -> None:
    found = split(data)
    if found is None or found[1] != len(found[2]):
        return
    head, size, body = found
    parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16)
    try:
        told, upgraded, tail = parser.feed_data(data)
    except HttpProcessingError as error:
        raise AssertionError(f"aiohttp refuses {data!r}: {error}") from None
    [(message, payload)] = told
    assert isinstance(message, RawRequestMessage)
    assert (message.method, message.path, message.version) == ("POST", head.path, (1, 1))
    assert lower(message.headers) == lower(head.headers)
    assert (message.should_close, message.upgrade, message.chunked) == (False, False, False)
    assert (upgraded, tail) == (False, b"")
    assert payload.is_eof()
    assert (payload.read_nowait() if size else b"") == body
