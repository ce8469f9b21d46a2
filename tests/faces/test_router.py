"""Which requests reach an engine, which do not, and what their clients hear."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from homegptd.core.events import ShutdownAsked
from homegptd.core.model import Asleep, Down, Failure, ModelId, Policy, SleepLevel
from homegptd.faces.routes import ROUTES, Where

from . import box
from .box import CHAT, HELLO, Asked, Engine, answer


async def echo(asked: Asked) -> None:
    asked.writer.write(
        answer(
            {"asked": asked.json, "line": asked.line, "by": asked.writer.get_extra_info("sockname")}
        )
    )


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[box.Box]:
    """Two models, awake both."""
    one, other = Engine(tmp_path / "chat", echo), Engine(tmp_path / "coder", echo)
    models = {"chat": one.path, "coder": other.path}
    async with one.running(), other.running(), box.running(models) as b:
        yield b


@pytest.mark.parametrize("path", [r.path for r in ROUTES if r.where is Where.BODY])
async def test_every_route_reaches_the_model_it_names(two: box.Box, path: str) -> None:
    for model, socket in (("coder", "coder"), ("talk", "chat"), ("lab/Chat-7B", "chat")):
        reply = await two.ask(path, {"model": model})
        assert reply.json["line"] == f"POST {path} HTTP/1.1"
        assert reply.json["asked"] == {"model": model}
        assert reply.json["by"].endswith(socket)


async def test_an_engine_that_others_start_is_asked_by_its_id(two: box.Box) -> None:
    two.desk.by_id_only = frozenset({box.ModelId("chat")})
    for name in ("talk", "lab/Chat-7B"):
        asked = (await two.ask(content={"model": name, "messages": []})).json["asked"]
        assert asked["model"] == "chat"


async def test_without_a_model_the_default_is_asked_by_name(two: box.Box) -> None:
    for content in ({"messages": []}, {}, {"messages": [{"model": "coder"}]}):
        reply = await two.ask(content=content)
        assert reply.json["asked"] == content | {"model": "chat"}


async def test_without_a_default_a_request_must_name_a_model(tmp_path: Path) -> None:
    async with box.running({"chat": tmp_path / "s"}, policy=Policy(default=None)) as b:
        reply = await b.ask(content={"messages": []})
    assert (reply.status, reply.error["param"]) == (400, "model")


async def test_an_unknown_model_is_told_what_is_near(two: box.Box) -> None:
    reply = await two.ask(content={"model": "chatt"})
    assert reply.status == 404
    assert reply.error == {
        "message": 'there is no model "chatt" (did you mean chat)',
        "type": "invalid_request_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip
    assert reply.headers["x-should-retry"] == "false"
    far = await two.ask(content={"model": "zzzz" * 100})
    assert "known are chat, talk, lab/Chat-7B, coder" in far.error["message"]
    assert len(far.body) < 600


async def test_anthropics_clients_hear_anthropics_words(two: box.Box) -> None:
    reply = await two.ask("/v1/messages", {"model": "nothing"})
    assert reply.status == 404
    assert reply.json["type"] == "error"
    assert reply.error["type"] == "not_found_error"


async def test_a_refusal_at_the_end_ends_the_connection_too(two: box.Box) -> None:
    """Or its client sends the next request to nobody."""
    client = await two.connect()
    two.scheduler.post(ShutdownAsked())
    reply = await client.ask(content=HELLO)
    assert (reply.status, reply.error["code"]) == (503, "shutting_down")
    assert reply.headers["connection"] == "close"
    assert await client.closed()


@pytest.mark.parametrize(
    ("content", "more", "status"),
    [
        (b"{", "", 400),
        (b"", "", 400),
        (b"[]", "", 400),
        (b'{"model": 3}', "", 400),
        (b"{}", "Content-Type: text/plain\r\n", 415),
        (b"{}", "Content-Type: application/x-www-form-urlencoded\r\n", 415),
    ],
)
async def test_bodies_that_cannot_be_routed(
    two: box.Box, content: bytes, more: str, status: int
) -> None:
    client = await two.connect()
    reply = await client.ask(content=content, more=more)
    assert reply.status == status
    assert reply.error["type"] == "invalid_request_error"
    assert (await client.ask(content=HELLO)).status == 200  # and the connection goes on


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions",
        "/v1/%63hat/completions", "/v1/chat%2Fcompletions", "/v1/./chat/completions",
        "/x/../v1/chat/completions", "/V1/chat/completions", "/v1/chat", "/%2F", "/sleep",
        "/wake_up", "/collective_rpc", "/invocations", "/v1/load_lora_adapter", "/metrics",
        "/scale_elastic_ep", "/docs", "/v1/chat/completions;x",
        "/v1/chat/completions/render",
    ],
)  # fmt: skip
async def test_what_is_not_in_the_table_is_not_there(two: box.Box, path: str) -> None:
    reply = await two.ask(path, HELLO)
    assert reply.status == 404
    assert reply.error["code"] == "not_found"


async def test_a_query_does_not_change_the_path_and_does_not_travel(two: box.Box) -> None:
    reply = await two.ask(CHAT + "?x=/sleep", HELLO)
    assert reply.json["line"] == f"POST {CHAT} HTTP/1.1"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_other_methods_are_refused_with_the_right_one(two: box.Box, method: str) -> None:
    reply = await two.ask(CHAT, method=method)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")


async def test_a_body_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    async with box.running({"chat": tmp_path / "s"}, max_body_bytes=1000) as b:
        client = await b.connect()
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n"
        )
        reply = await client.reply()
        assert (reply.status, reply.error["code"]) == (413, "too_large")
        packed = gzip.compress(json.dumps({"pad": "x" * 5000}).encode())
        assert len(packed) < 1000
        bomb = await b.ask(
            content=packed, more="Content-Encoding: gzip\r\nContent-Type: application/json\r\n"
        )
        assert bomb.status == 413


async def test_bodies_may_be_chunked_or_compressed(two: box.Box) -> None:
    packed = gzip.compress(json.dumps(HELLO).encode())
    more = "Content-Encoding: gzip\r\nContent-Type: application/json\r\n"
    assert (await two.ask(content=packed, more=more)).json["asked"] == HELLO
    client = await two.connect()
    plain = json.dumps(HELLO).encode()
    client.writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    client.writer.write(box.chunk(plain[:10]) + box.chunk(plain[10:]) + box.END)
    assert (await client.reply()).json["asked"] == HELLO


async def test_a_body_that_is_not_compressed_as_it_says_is_refused(two: box.Box) -> None:
    more = "Content-Encoding: gzip\r\nContent-Type: application/json\r\n"
    reply = await two.ask(content=b"this is no gzip", more=more)
    assert (reply.status, reply.error["code"]) == (400, "bad_request")


async def test_a_client_that_expects_100_is_told_to_go_on(two: box.Box) -> None:
    client = await two.connect()
    body = json.dumps(HELLO).encode()
    client.writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    assert (await client.head())[0] == 100
    client.writer.write(body)
    assert (await client.reply()).json["asked"] == HELLO


async def test_a_big_body_with_the_model_last_goes_to_the_right_one(two: box.Box) -> None:
    image = "x" * 5_000_000
    tools = [{"function": {"parameters": {"properties": {"model": {"enum": ["chat"]}}}}}] * 50
    content = {"messages": [{"content": image}], "tools": tools, "model": "coder"}
    reply = await two.ask(content=content)
    assert reply.json["by"].endswith("coder")
    assert reply.json["asked"] == content


async def test_a_request_wakes_its_model_and_waits_for_it(tmp_path: Path) -> None:
    now = asyncio.get_running_loop().time()
    asleep = Asleep(SleepLevel.ONE, now)
    engine = Engine(tmp_path / "chat", echo)
    async with (
        engine.running(),
        box.running({"chat": engine.path}, phases={"chat": asleep}) as b,
    ):
        assert (await b.ask(content=HELLO)).status == 200
        assert any(isinstance(each, box.Wake) for each in b.hands.given)


async def test_bodies_that_wait_are_bounded_together(tmp_path: Path) -> None:
    big = {**HELLO, "pad": "x" * 800}
    go = asyncio.Event()

    async def slow(asked: Asked) -> None:
        await go.wait()
        await echo(asked)

    engine = Engine(tmp_path / "chat", slow)
    async with engine.running(), box.running({"chat": engine.path}, max_held_bytes=1500) as b:
        first = asyncio.get_running_loop().create_task(b.ask(content=big))
        await b.until(lambda: b.leases() == 1)
        second = await b.ask(content=big)
        assert (second.status, second.error["code"]) == (503, "queue_full")
        go.set()
        assert (await first).status == 200
        assert (await b.ask(content=big)).status == 200


async def test_a_task_that_a_model_is_not_for_wakes_nobody(tmp_path: Path) -> None:
    asleep = Asleep(SleepLevel.ONE, asyncio.get_running_loop().time())
    paths = {"chat": tmp_path / "chat"}
    async with box.running(paths, phases={"chat": asleep}, kinds={"chat": "generate"}) as b:
        reply = await b.ask(path="/v1/embeddings", content={"model": "chat", "input": "x"})
        assert reply.status == 400
        assert "engine.kind is generate" in reply.error["message"]
        assert not b.hands.given


async def test_no_get_wakes_a_model(tmp_path: Path) -> None:
    asleep = Asleep(SleepLevel.ONE, asyncio.get_running_loop().time())
    async with box.running({"chat": tmp_path / "s"}, phases={"chat": asleep}) as b:
        for path in ("/v1/models", "/v1/models/chat", "/models", "/health", CHAT, "/nothing"):
            await b.ask(path, method="GET")
        assert b.hands.given == []


async def test_a_model_that_failed_is_refused_with_its_reason_and_a_time(tmp_path: Path) -> None:
    now = asyncio.get_running_loop().time()
    down = Down(now, Failure("CUDA out of memory", "homegptctl logs chat"), retry_at=now + 30)
    async with box.running({"chat": tmp_path / "s"}, phases={"chat": down}) as b:
        reply = await b.ask(content=HELLO)
    assert reply.status == 503
    assert "CUDA out of memory" in reply.error["message"]
    assert (reply.headers["retry-after"], reply.headers["x-should-retry"]) == ("30", "true")


async def test_the_model_list_comes_from_memory(two: box.Box) -> None:
    listed = (await two.ask("/v1/models", method="GET")).json
    assert listed["object"] == "list"
    assert [(each["id"], each["object"]) for each in listed["data"]] == [
        ("chat", "model"), ("coder", "model"),
    ]  # fmt: skip
    assert listed["data"][0]["homegpt"]["status"] == "active"
    for name in ("chat", "talk", "lab/Chat-7B", "lab%2FChat-7B"):
        entry = await two.ask(f"/v1/models/{name}", method="GET")
        assert entry.json == listed["data"][0]
    missing = await two.ask("/v1/models/nothing", method="GET")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")
    assert two.scheduler.state.engines[ModelId("chat")].last_used == 0.0
