"""Streams that wait: what they hear, and how the answer, or the error, goes on from there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homegptd.core.model import Act, Awake, Down, Draining, Failure, OnDeadline, Policy
from homegptd.faces.early import Pace

from . import box
from .box import (
    CHAT,
    DONE,
    END,
    HELLO,
    SSE,
    STREAM,
    Asked,
    Client,
    Engine,
    answer,
    dying_after,
    in_turn,
    saying,
    token,
)

FINE = (SSE, token("a"), token("", "stop"), DONE, END)
QUICK = Pace(early_head_s=0.02, comment_s=0.02, status_s=0.02)
WEBUI = "X-HomeGPT-Client: open-webui\r\n"
COMMENT = b": homegpt\n"


@asynccontextmanager
async def waking(
    path: Path, script: box.Script, **given: Any
) -> AsyncIterator[tuple[box.Box, asyncio.Event]]:
    """A model that is down. It is up once the event is set."""
    go = asyncio.Event()

    async def start(model: str) -> None:
        await go.wait()

    down = {"chat": Down(asyncio.get_running_loop().time())}
    given = {"pace": QUICK, "phases": down, **given}
    async with Engine(path, script).running(), box.running({"chat": path}, **given) as b:
        b.hands.on_start = start
        yield b, go


async def begun(client: Client, *, comments: int = 2) -> bytes:
    """The head is there and so many signs of life; returns them."""
    status, headers = await client.head()
    assert (status, headers["transfer-encoding"]) == (200, "chunked")
    assert headers["content-type"].startswith("text/event-stream")
    return b"".join([await one_chunk(client) for _ in range(1 + comments)])


async def one_chunk(client: Client) -> bytes:
    size = int(await client.reader.readuntil(b"\r\n"), 16)
    return (await client.reader.readexactly(size + 2))[:-2]


async def rest(client: Client) -> bytes:
    """What the rest of the stream says, up to its proper end."""
    found = b""
    while piece := await one_chunk(client):
        found += piece
    return found


def events(said: bytes) -> list[Any]:
    """The data of each event, as a careful parser reads it: comments are none."""
    lines = [line for line in said.decode().split("\n") if not line.startswith(":")]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


@pytest.mark.parametrize(
    ("where", "opening"),
    [
        (CHAT, {"delta": {"content": ""}, "index": 0, "finish_reason": None, "logprobs": None}),
        ("/v1/completions", {"text": "", "index": 0, "finish_reason": None, "logprobs": None}),
    ],
)
async def test_a_stream_that_waits_begins_with_an_event_that_says_nothing(
    tmp_path: Path, where: str, opening: dict[str, Any]
) -> None:
    async with waking(tmp_path / "chat", saying(*FINE)) as (b, go):
        client = await b.connect()
        client.send(where, STREAM)
        said = await begun(client)
        first, *more = said.split(b"\n\n")
        assert events(first)[0]["choices"] == [opening]
        assert events(first)[0]["model"] == "chat"
        assert b"".join(more) == 2 * COMMENT
        go.set()
        end = await rest(client)
        assert end.replace(COMMENT, b"") == b"".join(
            piece.split(b"\r\n")[1] for piece in FINE[1:4]
        )  # fmt: skip
        again = await client.ask("/v1/models", method="GET")
        assert again.status == 200  # the connection goes on
        await b.until(lambda: b.leases() == 0)


async def test_anthropics_clients_are_pinged_and_responses_clients_get_comments(
    tmp_path: Path,
) -> None:
    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    async with waking(tmp_path / "chat", saying(*FINE)) as (b, go):
        claude, codex = await b.connect(), await b.connect()
        claude.send("/v1/messages", STREAM)
        codex.send("/v1/responses", STREAM)
        assert await begun(claude) == 3 * ping
        assert await begun(codex) == 3 * COMMENT
        go.set()
        for client in (claude, codex):
            assert (await rest(client)).endswith(b"data: [DONE]\n\n")


async def test_what_is_no_stream_waits_for_its_status(tmp_path: Path) -> None:
    script = saying(answer({"data": []}))
    async with waking(tmp_path / "chat", script) as (b, go):
        asked = [await b.connect() for _ in range(3)]
        asked[0].send(CHAT, HELLO)
        asked[1].send("/v1/embeddings", STREAM)  # vLLM does not know streams there
        asked[2].send(CHAT, STREAM)
        await begun(asked[2])  # later than the others would have been
        go.set()
        for client in asked[:2]:
            assert (await client.reply()).json == {"data": []}


async def test_faults_of_the_request_are_found_before_the_head(tmp_path: Path) -> None:
    async with waking(tmp_path / "chat", saying(*FINE), pace=Pace(early_head_s=0.0)) as (b, _):
        unknown = await b.ask(content=STREAM | {"model": "nothing"})
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
        assert (await b.ask(content=b'{"stream": true, "model": 3}')).status == 400


async def test_a_model_that_is_awake_and_quick_is_not_announced(tmp_path: Path) -> None:
    path, pace = tmp_path / "chat", Pace(early_head_s=0.0)
    async with (
        Engine(path, saying(*FINE)).running(),
        box.running({"chat": path}, pace=pace) as b,
    ):
        reply = await b.ask(content=STREAM)
    assert reply.headers["server"] == "uvicorn"
    assert b"homegpt" not in reply.body


async def test_an_engine_that_is_awake_and_reads_long_is_spoken_for(tmp_path: Path) -> None:
    path, go = tmp_path / "chat", asyncio.Event()

    async def script(asked: Asked) -> None:
        await go.wait()
        asked.writer.writelines(FINE)

    limits = box.Limits(between_bytes_s=0.4)  # hence a look every 50 ms
    running = box.running({"chat": path}, pace=QUICK, limits=limits)
    async with Engine(path, script).running(), running as b:
        client = await b.connect()
        client.send(content=STREAM)
        await begun(client)
        go.set()
        assert events(await rest(client))[-1] == "[DONE]"


async def test_a_client_of_http_1_0_hears_it_without_chunks(tmp_path: Path) -> None:
    async with waking(tmp_path / "chat", saying(*FINE)) as (b, go):
        client = await b.connect()
        client.send(content=STREAM, version="1.0")
        status, headers = await client.head()
        assert (status, headers["connection"]) == (200, "close")
        await client.reader.readuntil(COMMENT)
        go.set()
        said = await client.reader.read()
        assert said.replace(COMMENT, b"").startswith(b"data: {")
        assert said.endswith(b"data: [DONE]\n\n")


# ---------------------------------------------------------------- Open WebUI


def statuses(said: bytes) -> list[dict[str, Any]]:
    found = [each for each in events(said) if isinstance(each, dict) and "event" in each]
    assert all(each["choices"] == [] for each in found)
    assert all(each["event"]["type"] == "status" for each in found)
    return [each["event"]["data"] for each in found]


async def test_open_webui_gets_its_own_status_line(tmp_path: Path) -> None:
    timed = {"chat": Down(asyncio.get_running_loop().time())}
    async with waking(tmp_path / "chat", saying(*FINE), phases=timed) as (b, go):
        client = await b.connect()
        client.send(content=STREAM, more=WEBUI)
        told = statuses(await begun(client))
        assert len(told) == 3
        assert all(not each["done"] for each in told)
        assert told[0]["description"].startswith("Starting chat: 0 % (90 s left)")
        go.set()
        end = await rest(client)
        *_, last = statuses(end)
        assert last["done"]
        assert last["description"].startswith("chat answers after ")
        spoken = [each for each in events(end) if "event" not in each]
        assert [each["choices"][0]["delta"]["content"] for each in spoken[:-1]] == ["a", ""]


async def test_others_than_open_webui_never_see_a_status(tmp_path: Path) -> None:
    async with waking(tmp_path / "chat", saying(*FINE)) as (b, go):
        client, odd = await b.connect(), await b.connect()
        client.send(content=STREAM, more="X-HomeGPT-Client: other\r\n")
        odd.send("/v1/completions", STREAM, more=WEBUI)
        for each in (client, odd):
            assert statuses(await begun(each)) == []
        go.set()
        for each in (client, odd):
            assert statuses(await rest(each)) == []


# ---------------------------------------------------------------- errors after the head


def failure(said: bytes, where: str = CHAT) -> dict[str, Any]:
    """The error that ends a stream; it is the last event, and none says that all is well."""
    assert b"[DONE]" not in said
    last = events(said)[-1]
    if where != CHAT:
        assert said.rstrip(b"\n").split(b"\n")[-2] == b"event: error"
    error: dict[str, Any] = last["error"]
    return error


@pytest.mark.parametrize("where", [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"])
async def test_a_wake_that_fails_is_an_error_of_the_protocol(tmp_path: Path, where: str) -> None:
    async with waking(tmp_path / "chat", saying(*FINE)) as (b, _):
        client = await b.connect()
        client.send(where, STREAM)
        await begun(client)
        b.desk.begin(Act.STOP, "chat", by="test")
        assert '"chat" is being stopped' in failure(await rest(client), CHAT)["message"]
        assert (await client.ask("/health", method="GET")).status == 200


async def test_a_stream_that_fails_is_a_whole_message_whoever_closes_it(tmp_path: Path) -> None:
    async with waking(tmp_path / "chat", saying(*FINE)) as (b, _):
        client = await b.connect()
        client.send(content=STREAM, more="Connection: close\r\n")
        await begun(client)
        b.desk.begin(Act.STOP, "chat", by="test")
        async with asyncio.timeout(5):
            assert (await client.reader.read()).endswith(b"\r\n0\r\n\r\n")


async def test_a_failed_start_closes_the_status_line_too(tmp_path: Path) -> None:
    async with waking(tmp_path / "chat", saying(*FINE)) as (b, _):
        client = await b.connect()
        client.send(content=STREAM, more=WEBUI)
        await begun(client)
        b.desk.begin(Act.STOP, "chat", by="test")
        said = await rest(client)
        assert statuses(said)[-1]["done"]
        assert failure(said)["code"] == "cancelled"


@pytest.mark.parametrize(
    ("said", "message", "code"),
    [
        (
            answer({"error": {"message": "too long", "type": "BadRequestError", "code": 400}},
                   "400 Bad Request"),
            "too long", "400",
        ),
        (
            answer({"type": "error", "error": {"type": "not_found_error", "message": "what?"}},
                   "404 Not Found"),
            "what?", "404",
        ),
        (answer(b"oops", "500 Internal Server Error"), "the engine answered 500", "500"),
        (answer({"choices": []}), 'the engine of "chat" answered without a stream', "engine_fault"),
        (answer(b""), 'the engine of "chat" answered without a stream', "engine_fault"),
    ],
    ids=["400", "404", "500", "json", "nothing"],
)  # fmt: skip
async def test_what_is_no_stream_becomes_an_error_of_the_stream(
    tmp_path: Path, said: bytes, message: str, code: str
) -> None:
    async with waking(tmp_path / "chat", saying(said)) as (b, go):
        client = await b.connect()
        client.send(content=STREAM)
        await begun(client)
        go.set()
        error = failure(await rest(client))
        assert (error["message"], error["code"]) == (message, code)
        assert (await client.ask("/v1/models", method="GET")).status == 200
        await b.until(lambda: b.leases() == 0)


@pytest.mark.parametrize(
    "death",
    [
        dying_after(),
        dying_after(SSE, token("a")[:30]),
        saying(SSE, DONE, END),
        saying(SSE, END),
        saying(SSE, token("", "abort"), DONE, END),
        saying(answer({"error": {"message": "EngineCore encountered an issue."}}, "500 Error")),
    ],
    ids=["silent", "half event", "bare done", "no event", "abort", "500"],
)
async def test_an_engine_lost_before_its_first_event_is_asked_again(
    tmp_path: Path, death: box.Script
) -> None:
    script = in_turn(death, saying(*FINE))
    async with waking(tmp_path / "chat", script, notice_s=0.0) as (b, go):
        client = await b.connect()
        client.send(content=STREAM)
        await begun(client)
        go.set()
        said = events(await rest(client))
        assert said[-1] == "[DONE]"
        assert said[0]["choices"][0]["delta"]["content"] == "a"


async def test_wherever_the_engine_dies_the_stream_ends_in_an_error(tmp_path: Path) -> None:
    whole, dies_at = b"".join(FINE), 0

    async def script(asked: Asked) -> None:
        asked.writer.write(whole[:dies_at])
        asked.writer.close()

    path, limits = tmp_path / "chat", box.Limits(between_bytes_s=0.4)
    pace = Pace(early_head_s=0.0, comment_s=0.01)
    async with (
        Engine(path, script).running(),
        box.running({"chat": path}, pace=pace, limits=limits, notice_s=0.0) as b,
    ):
        for position in range(0, len(whole), 3):
            dies_at = position
            client = await b.connect()
            client.send(content=STREAM | {"model": "chat"})
            status, headers = await client.head()
            if status == 502:  # it died before the head was due
                await client.reader.readexactly(int(headers["content-length"]))
                continue
            said = await rest(client)
            assert "error" in events(said)[-1]
            assert b"[DONE]" not in said or position > whole.index(b"[DONE]")
        await b.until(lambda: b.leases() == 0)


async def test_a_client_that_hangs_up_after_the_head_leaves_the_queue(tmp_path: Path) -> None:
    async with waking(tmp_path / "chat", saying(*FINE)) as (b, _):
        client = await b.connect()
        client.send(content=STREAM)
        await begun(client)
        assert len(b.scheduler.state.waiting) == 1
        client.hang_up()
        await b.until(lambda: not b.scheduler.state.waiting)


async def test_a_failed_model_is_refused_with_its_status_where_the_head_is_not_out(
    tmp_path: Path,
) -> None:
    now = asyncio.get_running_loop().time()
    failed = {"chat": Down(now, Failure("CUDA out of memory"), retry_at=now + 30)}
    async with box.running({"chat": tmp_path / "s"}, phases=failed, pace=QUICK) as b:
        reply = await b.ask(content=STREAM)
    assert (reply.status, reply.error["code"]) == (503, "model_failed")


# ---------------------------------------------------------------- frozen answers


@pytest.mark.parametrize("more", ["", WEBUI], ids=["others", "Open WebUI"])
@pytest.mark.parametrize("held", [20, 0], ids=["half of one is held", "none is held"])
async def test_a_frozen_answer_shows_that_it_lives_between_its_events(
    tmp_path: Path, more: str, held: int
) -> None:
    path, seen, go = tmp_path / "chat", asyncio.Event(), asyncio.Event()
    half = token("b")

    async def script(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await seen.wait()
        asked.writer.write(half[:held])
        await go.wait()
        asked.writer.write(half[held:])
        await asyncio.sleep(0.05)  # a packet of its own
        asked.writer.writelines(FINE[2:])

    freezing = Policy(drain_s=0.0, on_deadline=OnDeadline.FREEZE)
    limits = box.Limits(between_bytes_s=0.4)
    running = box.running({"chat": path}, pace=QUICK, limits=limits, policy=freezing)
    async with Engine(path, script).running(), running as b:
        client = await b.connect()
        client.send(content=STREAM, more=more)
        await client.head()
        assert b'"a"' in await one_chunk(client)
        seen.set()
        b.desk.begin(Act.SLEEP, "chat", by="test")
        await b.until(lambda: not isinstance(b.phase(), Awake | Draining))
        signs = b""
        while not (statuses(signs) if more else signs.count(COMMENT) > 20):
            signs += await one_chunk(client)
        go.set()
        said = signs + await rest(client)
        texts = [e["choices"][0]["delta"]["content"] for e in events(said)[:-1] if e["choices"]]
        assert texts == ["b", ""]
        assert events(said)[-1] == "[DONE]"
        if more:
            assert [each["done"] for each in statuses(said)][-2:] == [False, True]
            assert said.index(b"goes on after") < said.index(b'"b"')


async def test_an_answer_with_an_early_head_may_be_silent_as_long_as_any(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asyncio.sleep(0.3)  # the head is out
        asked.writer.write(SSE + token("a"))
        await asked.hung_up()

    path, limits = tmp_path / "chat", box.Limits(first_byte_s=60.0, between_bytes_s=0.4)
    running = box.running({"chat": path}, pace=QUICK, limits=limits)
    async with Engine(path, script).running(), running as b, asyncio.timeout(10):
        reply = await b.ask(content=STREAM)
        assert b"said nothing for 0.4" in reply.body


async def test_an_answer_that_pauses_has_no_status_line(tmp_path: Path) -> None:
    """Its model is awake: a tool call is being written, say."""
    path, go = tmp_path / "chat", asyncio.Event()

    async def script(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await go.wait()
        asked.writer.writelines(FINE[2:])

    limits = box.Limits(between_bytes_s=0.4)
    running = box.running({"chat": path}, pace=QUICK, limits=limits)
    async with Engine(path, script).running(), running as b:
        client = await b.connect()
        client.send(content=STREAM, more=WEBUI)
        await client.head()
        assert b'"a"' in await one_chunk(client)
        assert [await one_chunk(client) for _ in range(3)] == [COMMENT] * 3
        go.set()
        assert statuses(await rest(client)) == []


async def test_a_client_that_leaves_a_frozen_answer_is_gone_at_the_engine(tmp_path: Path) -> None:
    path, gone = tmp_path / "chat", asyncio.Event()

    async def script(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await asked.hung_up()
        gone.set()

    freezing = Policy(drain_s=0.0, on_deadline=OnDeadline.FREEZE)
    async with Engine(path, script).running(), box.running({"chat": path}, policy=freezing) as b:
        client = await b.connect()
        client.send(content=STREAM)
        await client.head()
        b.desk.begin(Act.SLEEP, "chat", by="test")
        await b.until(lambda: not isinstance(b.phase(), Awake | Draining))
        assert b.leases() == 1
        client.hang_up()
        await gone.wait()
        await b.until(lambda: b.leases() == 0)


@pytest.mark.parametrize(
    "check",
    [
        test_what_is_no_stream_waits_for_its_status,
        test_a_client_of_http_1_0_hears_it_without_chunks,
        test_open_webui_gets_its_own_status_line,
        test_a_failed_start_closes_the_status_line_too,
        test_a_client_that_hangs_up_after_the_head_leaves_the_queue,
    ],
)
def test_the_same_holds_on_uvloop(tmp_path: Path, check) -> None:  # type: ignore[no-untyped-def]
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check(tmp_path))
