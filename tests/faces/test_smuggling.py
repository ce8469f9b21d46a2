"""Raw bytes that two readers could take for different requests: refused, and the connection closed.

Behind each of them waits a second request. It must never be answered, nor reach an engine, as it
would if the router and whoever stands before or behind it disagreed about where the first one ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import box
from .box import Asked, Engine, answer

BODY = json.dumps({"model": "chat", "messages": []}).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
START = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
SECOND = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SECOND += b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
TE = b"Transfer-Encoding: chunked\r\n"


async def echo(asked: Asked) -> None:
    asked.writer.write(answer({"line": asked.line, "body": asked.body.decode()}))


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[tuple[box.Box, Engine]]:
    engine = Engine(tmp_path / "chat", echo)
    async with engine.running(), box.running({"chat": engine.path}) as b:
        yield b, engine


def head(*lines: bytes) -> bytes:
    return START + b"".join(lines) + b"\r\n"


REFUSED = {
    "length and chunks": head(LENGTH, TE) + CHUNKED,
    "chunks and length": head(TE, LENGTH) + CHUNKED,
    "two lengths": head(LENGTH, b"Content-Length: 0\r\n") + BODY,
    "the same length twice": head(LENGTH, LENGTH) + BODY,
    "a list of lengths": head(b"Content-Length: %d, %d\r\n" % (len(BODY), len(BODY))) + BODY,
    "a length with a sign": head(b"Content-Length: +%d\r\n" % len(BODY)) + BODY,
    "a negative length": head(b"Content-Length: -1\r\n") + BODY,
    "a length in hexadecimal": head(b"Content-Length: 0x%x\r\n" % len(BODY)) + BODY,
    "a length with an underscore": head(b"Content-Length: 3_6\r\n") + BODY,
    "an endless length": head(b"Content-Length: 99999999999999999999999\r\n") + BODY,
    "an empty length": head(b"Content-Length: \r\n") + BODY,
    "a coding nobody knows": head(b"Transfer-Encoding: xchunked\r\n") + CHUNKED,
    "chunked, then identity": head(b"Transfer-Encoding: chunked, identity\r\n") + CHUNKED,
    "gzip alone": head(b"Transfer-Encoding: gzip\r\n") + CHUNKED,
    "identity with a length": head(b"Transfer-Encoding: identity\r\n", LENGTH) + BODY,
    "two codings": head(TE, b"Transfer-Encoding: identity\r\n") + CHUNKED,
    "chunked twice": head(TE, TE) + CHUNKED,
    "chunked in a list twice": head(b"Transfer-Encoding: chunked, chunked\r\n") + CHUNKED,
    "a tab for the coding": head(b"Transfer-Encoding: \x0bchunked\r\n") + CHUNKED,
    "a quoted coding": head(b'Transfer-Encoding: "chunked"\r\n') + CHUNKED,
    "a blank before the colon": head(b"Transfer-Encoding : chunked\r\n", LENGTH) + CHUNKED,
    "a blank before the name": START
    + b" Transfer-Encoding: chunked\r\n"
    + LENGTH
    + b"\r\n"
    + CHUNKED,
    "a NUL in a name": head(b"Transfer-\x00Encoding: chunked\r\n", LENGTH) + CHUNKED,
    "a NUL in a value": head(b"X: a\x00b\r\n", LENGTH) + BODY,
    "a bare CR in a value": head(b"X: a\rTransfer-Encoding: chunked\r\n", LENGTH) + BODY,
    "a folded line": head(b"X: a\r\n Transfer-Encoding: chunked\r\n", LENGTH) + BODY,
    "a folded coding": head(b"Transfer-Encoding:\r\n chunked\r\n", LENGTH) + CHUNKED,
    "a folded first line": START.replace(b"1.1\r\n", b"1.1\r\n ") + LENGTH + b"\r\n" + BODY,
    "bare line feeds": head(LENGTH).replace(b"\r\n", b"\n") + BODY,
    "one bare line feed": head(b"X: a\nTransfer-Encoding: chunked\r\n", LENGTH) + BODY,
    "a head that ends in a bare line feed": START + LENGTH + b"\n" + BODY,
    "a line without a colon": head(b"nothing\r\n", LENGTH) + BODY,
    "no name": head(b": x\r\n", LENGTH) + BODY,
    "chunks in HTTP/1.0": head(TE).replace(b"1.1", b"1.0") + CHUNKED,
    "a version nobody knows": head(LENGTH).replace(b"1.1", b"1.2") + BODY,
    "two hosts": head(b"Host: evil\r\n", LENGTH) + BODY,
    "a chunk with a sign": head(TE) + b"+" + CHUNKED,
    "a chunk in 0x": head(TE) + b"0x" + CHUNKED,
    "a chunk with a blank before it": head(TE) + b" " + CHUNKED,
    "a chunk with a bare line feed": head(TE) + CHUNKED.replace(b"\r\n", b"\n", 1),
    "a chunk that is longer than it says": head(TE) + b"5\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a length in the trailer": head(TE) + CHUNKED[:-2] + b"Content-Length: 99\r\n\r\n",
    "an endless chunk size": head(TE) + b"f" * 17 + b"\r\n" + BODY,
    "a chunk of no size": head(TE) + b"\r\n" + BODY,
    "a long first line": b"POST /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long line": head(b"X: " + b"y" * 10_000 + b"\r\n", LENGTH) + BODY,
    "a long name": head(b"X" * 10_000 + b": y\r\n", LENGTH) + BODY,
    "many lines": head(b"X: y\r\n" * 200, LENGTH) + BODY,
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
async def test_what_could_be_two_requests_is_none(one: tuple[box.Box, Engine], raw: bytes) -> None:
    b, engine = one
    client = await b.connect()
    client.writer.write(raw + SECOND)
    status, _ = await client.head()
    assert 400 <= status < 500 or status == 505
    async with asyncio.timeout(5):
        try:
            rest = await client.reader.read()  # to the end: the connection is closed
        except ConnectionError:
            rest = b""
    assert b"HTTP/1.1 " not in rest
    assert engine.asked == []
    assert (await b.ask("/health", method="GET")).status == 200


@pytest.mark.parametrize(
    ("raw", "status", "word"),
    [(head(b"nothing\r\n", LENGTH) + BODY, 400, "no request of HTTP"),
     (head(b"X: " + b"y" * 10_000 + b"\r\n", LENGTH) + BODY, 431, "too long"),
     (head(b"Content-Encoding: zstd\r\n", LENGTH) + BODY, 415, "gzip and deflate can"),
     (head(b"Content-Encoding: br\r\n", LENGTH) + BODY, 415, "gzip and deflate can")],
)  # fmt: skip
async def test_what_the_parser_refuses_is_an_error_as_any(
    one: tuple[box.Box, Engine], raw: bytes, status: int, word: str
) -> None:
    client = await one[0].connect()
    client.writer.write(raw)
    reply = await client.reply()
    assert (reply.status, reply.error["code"]) == (status, "bad_request")
    assert word in reply.error["message"]
    assert b"yyyy" not in reply.body
    assert await client.closed()


@pytest.mark.parametrize(
    "rest", [b"+5\r\nhello\r\n", b"5\r\nhello!\r\n", b"\r\n", b"f" * 17 + b"\r\n", b"xyz\r\n"]
)
async def test_a_body_that_is_garbled_later_ends_at_once(
    one: tuple[box.Box, Engine], rest: bytes
) -> None:
    b, engine = one
    client = await b.connect()
    client.writer.write(head(TE, b"Expect: 100-continue\r\n"))
    assert (await client.head())[0] == 100  # it waits for the body now
    client.writer.write(CHUNKED[:-5])
    await asyncio.sleep(0.05)  # a packet of its own
    client.writer.write(rest + SECOND)
    async with asyncio.timeout(5):
        reply = await client.reply()
        assert (reply.status, reply.error["code"]) == (400, "bad_request")
        assert b"HTTP/1.1 " not in await client.reader.read()
    assert engine.asked == []


PLAIN = {
    "a length": head(LENGTH) + BODY,
    "chunks": head(TE) + CHUNKED,
    "chunks with extensions": head(TE) + CHUNKED.replace(b"\r\n", b";a=b\r\n", 1),
    "chunks with a trailer": head(TE) + CHUNKED[:-2] + b"X: y\r\n\r\n",
    "capitals": head(b"TRANSFER-ENCODING: Chunked\r\n") + CHUNKED,
    "blanks around a value": head(b"Content-Length: \t%d \t\r\n" % len(BODY)) + BODY,
}


@pytest.mark.parametrize("raw", PLAIN.values(), ids=PLAIN.keys())
async def test_two_plain_requests_are_two(one: tuple[box.Box, Engine], raw: bytes) -> None:
    b, engine = one
    client = await b.connect()
    client.writer.write(raw + SECOND)
    replies = [await client.reply(), await client.reply()]
    assert [(each.status, each.json["line"]) for each in replies] == [
        (200, "POST /v1/chat/completions HTTP/1.1"), (200, "POST /v1/completions HTTP/1.1"),
    ]  # fmt: skip
    assert [each.body for each in engine.asked] == [BODY, BODY]
    assert all("x" not in each.headers for each in engine.asked)


@pytest.mark.parametrize(
    "target",
    [
        "http://evil/sleep", "//sleep", "/%73leep", "*", "http://localhost/sleep",
        "http://localhost/%73leep", "http://localhost/v1/chat/completions/../../sleep",
        "http://localhost/http://localhost/v1/chat/completions",
        "http://localhost/v1/chat/completions\\..\\sleep", "http://localhost/V1/chat/completions",
        "/v1/chat/completions/../../sleep", "/v1/..%2fsleep", "/v1/chat/completions%00",
        "/v1/chat/completions#/sleep", "/v1/chat/completions\\..\\sleep", "/sleep?level=1",
        "/v1/chat/completions/%2e%2e/%2e%2e/sleep", "/collective_rpc", "/invocations", "/metrics",
        "/is_scaling_elastic_ep", "/scale_elastic_ep", "/v1/load_lora_adapter", "/pause", "/load",
        "/v1/unload_lora_adapter", "/inference/v1/generate", "/v1/completions/render",
        "/server_info",
        "/reset_prefix_cache", "/fault_tolerance/apply", "/tokenizer_info", "/version", "/docs",
        "/cohere/v2/chat", "/start_profile", "/update_weights", "/release_kv_cache_memory",
    ],
)  # fmt: skip
async def test_nothing_but_the_table_leads_to_an_engine(
    one: tuple[box.Box, Engine], target: str
) -> None:
    b, engine = one
    for method in ("POST", "GET"):
        reply = await b.ask(target, BODY, method=method)
        assert reply.status in (400, 404)
    assert engine.asked == []


DOUBTFUL = [
    "https://localhost", "ws://localhost", "ftp://localhost", "file://", "http:", "http://",
    "http:///localhost", "http://localhost/", "http://localhost//localhost", "http://a@localhost",
    "http://a:b@localhost", "http://@localhost", "http://localhost:", "http://localhost:x",
    "http://localhost:999999", "http://localhost:80:80", "http://local%68ost", "http://local host",
    "http://localhost\\", "http://localhost\\@evil", "http://localhost,evil", "http://[::1",
    "http://[localhost]", "http://[::1]x", "http://[::1%25lo]", "http://::1", "http://locälhost",
    "http://localhost#", "http://localhost?", "x:http://localhost", "localhost:9000",
]  # fmt: skip


@pytest.mark.parametrize("before", DOUBTFUL)
async def test_doubtful_targets_are_refused(one: tuple[box.Box, Engine], before: str) -> None:
    """`http://localhost//v1/…` is `//v1/…` here and host `v1` elsewhere, and the like."""
    b, engine = one
    for path in ("/v1/chat/completions", "/v1/models"):
        method = "POST" if path.endswith("completions") else "GET"
        reply = await b.ask(before + path, BODY, method=method)
        assert reply.status == 400
    for end in ("#x", "?a#b", "?ä", "\x7f"):
        reply = await b.ask(f"http://localhost/v1/chat/completions{end}", BODY)
        assert reply.status == 400
    assert engine.asked == []


WHOLE = ["http://localhost", "HTTP://localhost:9000", "http://127.0.0.1:80", "http://[::1]:9000"]


@pytest.mark.parametrize("before", WHOLE)
async def test_a_whole_url_is_the_path_it_names(one: tuple[box.Box, Engine], before: str) -> None:
    b, engine = one
    more = "Host: evil.example\r\n"  # the target's counts
    reply = await b.ask(f"{before}/v1/chat/completions?x=/sleep", BODY, more=more)
    assert reply.json["line"] == "POST /v1/chat/completions HTTP/1.1"
    assert [each.headers["host"] for each in engine.asked] == ["engine"]
    assert [each.body for each in engine.asked] == [BODY]
    client = await b.connect()
    client.writer.write(head(LENGTH).replace(b" /", b" %s/" % before.encode(), 1) + BODY + SECOND)
    replies = [await client.reply(), await client.reply()]
    assert [each.json["line"].split()[1] for each in replies] == [
        "/v1/chat/completions", "/v1/completions",
    ]  # fmt: skip
    assert (await b.ask(f"{before}/v1/models", method="GET", more=more)).status == 200


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
async def test_nor_is_what_names_a_whole_url(one: tuple[box.Box, Engine], raw: bytes) -> None:
    await test_what_could_be_two_requests_is_none(
        one, raw.replace(b"POST /", b"POST http://localhost/", 1)
    )


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:9000", "127.0.0.1.evil"])
async def test_a_rebound_name_in_the_target_is_none_of_the_box(
    one: tuple[box.Box, Engine], host: str
) -> None:
    b, engine = one
    for path in ("/v1/chat/completions", "/switch"):
        reply = await b.ask(f"http://{host}{path}", BODY, more="Host: localhost\r\n")
        assert (reply.status, reply.error["code"]) == (403, "forbidden")
    page = f"Host: localhost\r\nOrigin: http://{host}\r\n"
    assert (await b.ask("http://localhost/switch", BODY, more=page)).status == 403
    assert engine.asked == []


async def test_a_whole_url_with_a_header_that_is_no_text_is_refused(
    one: tuple[box.Box, Engine],
) -> None:
    b, engine = one
    client = await b.connect()
    start = START.replace(b"POST ", b"POST http://localhost", 1)
    client.writer.write(start + b"X: \xff\xfe\r\n" + LENGTH + b"\r\n" + BODY)
    assert (await client.reply()).status == 400
    assert engine.asked == []


async def test_no_header_of_a_client_becomes_two_at_the_engine(
    one: tuple[box.Box, Engine],
) -> None:
    b, engine = one
    for value in ("a\r\tX: 1", "a\x0bX: 1", "a\u2028X: 1", "a: b\tc", "\xff\xfe"):
        more = f"Content-Type: application/json\r\nX-Request-Id: {value}\r\n"
        await b.ask(content=BODY, more=more)
    assert all("x" not in each.headers for each in engine.asked)


LINES = [
    b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", LENGTH, TE, b"Transfer-Encoding: gzip\r\n",
    b"Transfer-Encoding: identity\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
    b"Upgrade: h2c\r\n", b"Upgrade: websocket\r\n", b"Connection: Upgrade\r\n", b"X: y\r\n",
    b"Expect: 100-continue\r\n", b" folded\r\n", b"Content-Length : 3\r\n", b"\n", b"\r\n",
    b"Transfer-Encoding: chunked\n", b"Content-Encoding: gzip\r\n", b"Content-Length:4\r\n",
]  # fmt: skip
BODIES = [BODY, CHUNKED, b"0\r\n\r\n", b"5\r\nhello\r\n", b"", b"\r\n", b"GET / HTTP/1.1\r\n\r\n"]


@given(st.lists(st.sampled_from(LINES), max_size=5), st.lists(st.sampled_from(BODIES), max_size=3))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_engine_gets_whole_requests_or_none(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], bodies: list[bytes]
) -> None:
    """Whatever is sent, each request that reaches the engine is one JSON object of the table's."""
    raw = head(*lines) + b"".join(bodies)
    asyncio.run(_whole_or_none(tmp_path_factory.mktemp("box", numbered=True), raw))


async def _whole_or_none(at: Path, raw: bytes) -> None:
    engine = Engine(at / "s", echo)
    async with engine.running(), box.running({"chat": engine.path}) as b:
        client = await b.connect()
        client.writer.write(raw)
        client.writer.write_eof()
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                await client.reader.read()
        assert (await b.ask("/health", method="GET")).status == 200
    for each in engine.asked:
        assert each.line == "POST /v1/chat/completions HTTP/1.1"
        assert isinstance(each.json, dict)
