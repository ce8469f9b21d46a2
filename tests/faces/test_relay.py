"""The relay against engines that do anything, seen by a client that sees every byte."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from . import box
from .box import (
    DONE,
    END,
    HELLO,
    SSE,
    STREAM,
    Asked,
    Engine,
    answer,
    chunk,
    dying_after,
    in_turn,
    saying,
    token,
)

FINE = (SSE, token("a"), token("b"), token("", "stop"), DONE, END)
GOOD = answer({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.sock"


async def test_an_unstreamed_answer_comes_as_it_was_sent(path: Path) -> None:
    said = answer({"choices": [{"finish_reason": "stop"}]}, more=b"x-own: 1\r\n")
    async with Engine(path, saying(said)).running() as engine, box.running({"chat": path}) as b:
        more = "Authorization: Bearer secret\r\nX-Request-Id: r1\r\nTE: x\r\nCookie: c=1\r\n"
        reply = await b.ask(content=HELLO, more=more)
    assert reply.status == 200
    assert reply.body == said.partition(b"\r\n\r\n")[2]
    assert reply.headers["x-own"] == "1"
    asked = engine.asked[0]
    assert asked.line == "POST /v1/chat/completions HTTP/1.1"
    assert asked.json == HELLO
    assert set(asked.headers) == {"host", "content-type", "content-length", "x-request-id"}


async def test_a_stream_comes_event_by_event_and_the_connection_serves_the_next(path: Path) -> None:
    go = asyncio.Event()

    async def script(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await go.wait()
        asked.writer.writelines(FINE[2:])

    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=STREAM)
        status, headers = await client.head()
        first = await client.reader.readuntil(b"\n\n\r\n")
        assert (status, headers["transfer-encoding"]) == (200, "chunked")
        assert b'"a"' in first
        assert b.leases() == 1
        go.set()
        assert await client.reader.readuntil(END) == b"".join(FINE[2:])
        again = await client.ask(content=STREAM)
        assert again.events[-1] == "[DONE]"
        await b.until(lambda: b.leases() == 0)
    assert [each.connection for each in engine.asked] == [1, 1]


async def test_bytes_that_dribble_arrive_whole(path: Path) -> None:
    async def script(asked: Asked) -> None:
        for byte in b"".join(FINE):
            asked.writer.write(bytes([byte]))
            await asyncio.sleep(0)  # each byte its own read

    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        reply = await b.ask(content=STREAM)
    assert reply.complete
    assert reply.events[-1] == "[DONE]"
    assert [json.loads(e)["choices"][0]["delta"]["content"] for e in reply.events[:2]] == ["a", "b"]


async def test_pipelined_requests_are_answered_in_order(path: Path) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(answer({"echo": asked.json["n"]}))

    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        for n in range(30):
            client.send(content=HELLO | {"n": n})
        assert [(await client.reply()).json["echo"] for _ in range(30)] == list(range(30))


async def test_a_client_of_http_1_0_gets_the_bare_body_and_the_end(path: Path) -> None:
    async with Engine(path, saying(*FINE)).running(), box.running({"chat": path}) as b:
        reply = await b.ask(content=STREAM, version="1.0")
    assert "transfer-encoding" not in reply.headers
    assert reply.headers["connection"] == "close"
    assert reply.body.startswith(b"data: {")
    assert reply.body.endswith(b"data: [DONE]\n\n")


async def test_a_client_of_http_1_0_may_keep_its_connection(path: Path) -> None:
    async with Engine(path, saying(GOOD)).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        for _ in range(2):
            reply = await client.ask(
                content=HELLO, version="1.0", more="Connection: keep-alive\r\n"
            )
            assert reply.headers["connection"] == "keep-alive"
            assert reply.json["choices"]


async def test_a_client_that_wants_to_close_is_told_so_and_closed(path: Path) -> None:
    async with Engine(path, saying(GOOD)).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        reply = await client.ask(content=HELLO, more="Connection: close\r\n")
        assert reply.headers["connection"] == "close"
        assert await client.closed()


async def test_an_idle_connection_that_the_engine_closed_is_no_news(path: Path) -> None:
    async def script(asked: Asked) -> None:
        if asked.number == 2:
            asked.writer.transport.abort()  # at the moment the second request comes in
        else:
            asked.writer.write(GOOD)

    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        assert (await client.ask(content=HELLO)).status == 200
        assert (await client.ask(content=HELLO)).status == 200
    assert [each.connection for each in engine.asked] == [1, 1, 2]
    assert b.hands.given == []


@pytest.mark.parametrize("phase", ["before the head", "in the middle of the stream"])
async def test_a_client_that_hangs_up_is_gone_at_the_engine_at_once(path: Path, phase: str) -> None:
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[float] = loop.create_future()
    here = asyncio.Event()

    async def script(asked: Asked) -> None:
        if phase != "before the head":
            asked.writer.write(SSE + token("a"))
        here.set()
        await asked.hung_up()
        gone.set_result(loop.time())

    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=STREAM)
        await here.wait()
        if phase != "before the head":
            await client.head()
        began = loop.time()
        client.hang_up()
        assert await gone - began < 0.25  # a loaded machine; some ms as a rule
        await b.until(lambda: b.leases() == 0)


async def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(path: Path) -> None:
    now = asyncio.get_running_loop().time()
    down = box.core.Down(now)
    async with box.running({"chat": path}, phases={"chat": down}) as b:
        b.hands.on_start = lambda model: asyncio.Event().wait()
        client = await b.connect()
        client.send(content=HELLO)
        await b.until(lambda: len(b.scheduler.state.waiting) == 1)
        client.hang_up()
        await b.until(lambda: not b.scheduler.state.waiting)


async def test_a_client_that_hangs_up_in_its_body_asks_for_nothing(path: Path) -> None:
    async with Engine(path, saying(GOOD)).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        await client.writer.drain()
        client.hang_up()
        assert (await b.ask(content=HELLO)).status == 200
        assert len(engine.asked) == 1


async def test_200_streams_at_once_keep_apart(path: Path) -> None:
    everybody = asyncio.Event()
    asked_by: list[int] = []

    async def script(asked: Asked) -> None:
        asked_by.append(asked.json["n"])
        asked.writer.write(SSE)
        if len(asked_by) == 200:
            everybody.set()
        await everybody.wait()
        for part in range(5):
            asked.writer.write(token(f"{asked.json['n']}.{part}"))
            await asked.writer.drain()
        asked.writer.write(DONE + END)

    pace = box.Pace(early_head_s=60.0)  # everybody waits for the last one
    async with Engine(path, script).running(), box.running({"chat": path}, pace=pace) as b:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(b.ask(content=STREAM | {"n": n})) for n in range(200)]
        for n, task in enumerate(tasks):
            said = [
                json.loads(e)["choices"][0]["delta"]["content"] for e in task.result().events[:-1]
            ]
            assert said == [f"{n}.{part}" for part in range(5)]
        await b.until(lambda: b.leases() == 0)


@pytest.mark.parametrize("head", [SSE, b"HTTP/1.1 200 OK\r\ncontent-length: 52428800\r\n\r\n"])
async def test_a_client_that_does_not_read_stops_the_engine_not_the_daemon(
    path: Path, head: bytes
) -> None:
    stuck: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    piece, whole = b"x" * 65536, 50 << 20

    async def script(asked: Asked) -> None:
        asked.writer.write(head)
        for sent in range(0, whole, len(piece)):
            asked.writer.write(chunk(piece) if head is SSE else piece)
            try:
                async with asyncio.timeout(None if stuck.done() else 0.3):
                    await asked.writer.drain()
            except TimeoutError:
                stuck.set_result(sent)
                await asked.writer.drain()
        if head is SSE:
            asked.writer.write(END)

    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        client = await b.connect(limit=65536)
        client.send(content=STREAM)
        assert await stuck < 16 << 20
        client.reader._limit = 1 << 30  # now it reads
        reply = await client.reply()
        assert reply.complete
        assert len(reply.body) == whole


async def test_a_client_that_never_reads_loses_its_lease(path: Path) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(SSE)
        for _ in range(800):
            asked.writer.write(chunk(b"x" * 65000))
            await asked.writer.drain()

    limits = box.Limits(client_s=0.2)
    async with Engine(path, script).running(), box.running({"chat": path}, limits=limits) as b:
        client = await b.connect(limit=1024)
        client.send(content=STREAM)
        await b.until(lambda: b.leases() == 1)
        await b.until(lambda: b.leases() == 0)


# ---------------------------------------------------------------- engines that break


def restarting(b: box.Box) -> None:
    """As soon as the relay waits for news, the watch of the process brings them."""

    def tell() -> None:
        b.died("chat")

    asyncio.get_running_loop().call_later(0.05, tell)


@pytest.mark.parametrize(
    "death",
    [
        dying_after(),
        dying_after(b"HTTP/1.1 200 OK\r\ncontent-ty"),
        dying_after(SSE),
        dying_after(SSE, token("a")[:30]),
        dying_after(GOOD[:-5]),
        saying(answer({"error": {"message": "EngineCore encountered an issue."}}, "500 Error")),
        saying(SSE, chunk(b'data: {"error":{"message":"EngineDeadError"}}\n\n'), DONE, END),
        saying(SSE, DONE, END),
        saying(answer(b'{"choices":[{"finish_reason":"abort"}]}')),
        saying(SSE, token("", "abort"), DONE, END),
        dying_after(b"garbage\r\n\r\n"),
        dying_after(b"HTTP/1.1 200 OK\r\n\r\nno length"),
        dying_after(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70000),
    ],
    ids=[
        "silent", "half head", "head", "half event", "half body", "500", "error event",
        "bare done", "abort", "abort in first event", "garbage", "no length", "long head",
    ],
)  # fmt: skip
async def test_an_engine_lost_before_the_answer_gets_the_request_again_once(
    path: Path, death: box.Script
) -> None:
    async with (
        Engine(path, in_turn(death, saying(*FINE))).running() as engine,
        box.running({"chat": path}) as b,
    ):
        restarting(b)
        reply = await b.ask(content=STREAM)
        assert (reply.status, reply.complete, reply.events[-1]) == (200, True, "[DONE]")
        counted = STREAM | {"stream_options": {"include_usage": True}}
        assert [each.json for each in engine.asked] == [counted, counted]
        assert any(isinstance(each, box.Start) for each in b.hands.given)
        await b.until(lambda: b.leases() == 0)


async def test_a_connection_that_broke_while_the_engine_lives_is_tried_again(path: Path) -> None:
    script = in_turn(dying_after(), saying(GOOD))
    async with Engine(path, script).running(), box.running({"chat": path}, notice_s=0.0) as b:
        assert (await b.ask(content=HELLO)).status == 200
        assert b.hands.given == []


async def test_wherever_an_engine_dies_before_the_answer_it_is_an_honest_502(path: Path) -> None:
    said = b""

    async def script(asked: Asked) -> None:
        asked.writer.write(said)
        asked.writer.close()

    async with Engine(path, script).running(), box.running({"chat": path}, notice_s=0.0) as b:
        for whole in (GOOD, SSE + token("a")):
            for position in range(len(whole)):
                said = whole[:position]
                reply = await b.ask(content=STREAM)
                assert (reply.status, reply.error["code"]) == (502, "engine_fault")
        await b.until(lambda: b.leases() == 0)


async def test_wherever_an_engine_dies_in_a_stream_it_ends_in_an_error_frame(path: Path) -> None:
    first, rest = SSE + token("a"), b"".join(FINE[2:])
    dies_at, go = 0, asyncio.Event()

    async def script(asked: Asked) -> None:
        asked.writer.write(first)
        await go.wait()
        asked.writer.write(rest[:dies_at])
        asked.writer.close()

    async with Engine(path, script).running(), box.running({"chat": path}, notice_s=0.0) as b:
        for position in range(len(rest)):
            dies_at = position
            go.clear()
            client = await b.connect()
            client.send(content=STREAM)
            await client.head()
            go.set()
            *events, end, _ = (await client.reader.readuntil(END)).split(b"\n\n\r\n")
            assert b"engine_fault" in end
            for event in events:
                data = event.partition(b"data: ")[2]
                assert data == b"[DONE]" or json.loads(data)["choices"]
        await b.until(lambda: b.leases() == 0)


async def test_an_engine_that_is_lost_twice_is_an_honest_502(path: Path) -> None:
    async with Engine(path, dying_after()).running() as engine, box.running({"chat": path}) as b:
        restarting(b)
        reply = await b.ask(content=STREAM)
        assert reply.status == 502
        assert reply.error["code"] == "engine_fault"
        assert '"chat"' in reply.error["message"]
        assert len(engine.asked) == 2
        await b.until(lambda: b.leases() == 0)


async def test_a_refused_connection_waits_for_the_engine_that_comes_back(path: Path) -> None:
    async with box.running({"chat": path}) as b:
        engine = Engine(path, saying(GOOD))
        up = engine.running()

        async def start(model: str) -> None:
            await up.__aenter__()

        b.hands.on_start = start
        restarting(b)
        try:
            reply = await b.ask(content=HELLO)
        finally:
            await up.__aexit__(None, None, None)
        assert reply.status == 200
        assert len(engine.asked) == 1


def after_a_first_event(*pieces: bytes, dies: bool) -> tuple[box.Script, asyncio.Event]:
    """A stream that goes on as said once the event is set."""
    go = asyncio.Event()

    async def script(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await go.wait()
        asked.writer.writelines(pieces)
        if dies:
            asked.writer.close()

    return script, go


@pytest.mark.parametrize("rest", [b"", token("b")[:20], b"4"], ids=["between", "event", "size"])
async def test_an_engine_that_dies_in_a_stream_is_an_error_frame(path: Path, rest: bytes) -> None:
    script, go = after_a_first_event(token("b"), rest, dies=True)
    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=STREAM)
        assert (await client.head())[0] == 200
        go.set()
        body = await client.reader.readuntil(END)
        assert (await client.ask("/v1/models", method="GET")).status == 200
        assert len(engine.asked) == 1
    error = json.loads(body.split(b"\n\n\r\n")[-2].partition(b"data: ")[2])["error"]
    assert error["code"] == "engine_fault"
    assert "in the middle of an answer" in error["message"]
    assert body.count(b"data: ") == 3


async def test_an_aborted_stream_is_an_error_frame_and_never_done(path: Path) -> None:
    script, go = after_a_first_event(token("b") + token("c", "abort") + DONE + END, dies=False)
    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=STREAM)
        assert (await client.head())[0] == 200
        go.set()
        body = await client.reader.readuntil(END)
        assert (await client.ask("/v1/models", method="GET")).status == 200
    assert body.count(b'"content":') == 2
    assert b"cut its answer" in body.split(b"\n\n\r\n")[-2]
    assert b"abort" not in body
    assert b"[DONE]" not in body


@pytest.mark.parametrize(
    ("where", "frame"),
    [
        ("/v1/messages", b'event: error\ndata: {"type": "error", "error": {"type": "api_error"'),
        ("/v1/responses", b'event: error\ndata: {"type": "error", "code": "engine_fault"'),
        ("/v1/completions", b'data: {"error": {"message"'),
    ],
)
async def test_the_error_frame_is_of_the_protocol(path: Path, where: str, frame: bytes) -> None:
    script, go = after_a_first_event(dies=True)
    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(where, STREAM)
        await client.head()
        go.set()
        body = await client.reader.readuntil(END)
    assert body.split(b"\r\n")[-4].startswith(frame)


async def test_a_long_unstreamed_answer_that_breaks_is_visibly_broken(path: Path) -> None:
    script = dying_after(b"HTTP/1.1 200 OK\r\ncontent-length: 4000000\r\n\r\n", b"x" * 2_000_000)
    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        reply = await b.ask(content=HELLO)
        assert not reply.complete
        assert len(engine.asked) == 1


async def test_text_that_speaks_of_aborting_passes(path: Path) -> None:
    words = 'say {"finish_reason":"abort"} and data: {"error": 1} or data: [DONE]'
    for script in (
        saying(answer({"choices": [{"text": words, "finish_reason": "stop"}]})),
        saying(SSE, token(words), token("", "stop"), DONE, END),
    ):
        async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
            reply = await b.ask(content=STREAM)
            assert json.dumps(words).encode() in reply.body
            assert len(engine.asked) == 1


async def test_a_fault_of_the_request_passes_as_it_is(path: Path) -> None:
    for status in ("400 Bad Request", "500 Internal Server Error", "503 Service Unavailable"):
        script = saying(answer({"error": {"message": "no", "code": 1}}, status))
        async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
            reply = await b.ask(content=HELLO)
            assert (reply.status, reply.error["message"]) == (int(status[:3]), "no")
            assert len(engine.asked) == 1


async def test_what_follows_an_answer_never_reaches_a_client(path: Path) -> None:
    async with (
        Engine(path, in_turn(saying(GOOD + GOOD), saying(GOOD))).running() as engine,
        box.running({"chat": path}) as b,
    ):
        restarting(b)
        client = await b.connect()
        assert (await client.ask(content=HELLO)).status == 200
        assert (await client.ask("/health", method="GET")).json["status"] == "ok"
    assert len(engine.asked) == 2


async def test_an_engine_may_listen_on_a_port(path: Path) -> None:
    engine = Engine(path, saying(*FINE))
    server = await asyncio.start_server(engine._serve, "127.0.0.1", 0)
    where = server.sockets[0].getsockname()
    async with engine.running(), server, box.running({"chat": where}) as b:
        assert (await b.ask(content=STREAM)).events[-1] == "[DONE]"


async def test_bytes_that_are_no_json_are_not_held_back(path: Path) -> None:
    go = asyncio.Event()

    async def script(asked: Asked) -> None:
        kind = b"content-type: audio/wav\r\ntransfer-encoding: chunked\r\n\r\n"
        asked.writer.write(b"HTTP/1.1 200 OK\r\n" + kind + chunk(b"RIFF"))
        await go.wait()
        asked.writer.write(END)

    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=HELLO)
        await client.head()
        assert await client.reader.readuntil(b"RIFF\r\n") == chunk(b"RIFF")
        go.set()
        assert await client.reader.readuntil(END) == END


async def test_a_daemon_that_is_out_of_patience_breaks_streams_visibly(path: Path) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await asked.hung_up()

    async with Engine(path, script).running():
        async with box.running({"chat": path}) as b:
            client = await b.connect()
            client.send(content=STREAM)
            await client.head()
            await client.reader.readuntil(b"\n\n\r\n")
            b.clients.clear()
        rest = await client.reader.read()
        assert not rest.endswith(END)
        client.hang_up()


# ---------------------------------------------------------------- ends by decision, and limits


async def test_an_answer_that_is_cut_says_so(path: Path) -> None:
    async def script(asked: Asked) -> None:
        if "early" not in asked.json:
            asked.writer.write(SSE + token("a"))
        await asked.hung_up()

    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        early, late = await b.connect(), await b.connect()
        early.send(content=STREAM | {"early": True})
        late.send(content=STREAM)
        await late.head()
        await b.until(lambda: b.leases() == 2)
        b.desk.begin(box.core.Act.STOP, "chat", by="test", cut=True)
        refused = await early.reply()
        assert refused.status == 502
        assert refused.error["code"] == "cut"
        assert b'"code": "cut"' in await late.reader.readuntil(END)
        assert (await late.ask("/v1/models", method="GET")).status == 200
        await b.until(lambda: b.leases() == 0)


async def test_a_cut_does_not_wait_for_a_client_that_does_not_read(path: Path) -> None:
    full = asyncio.Event()

    async def script(asked: Asked) -> None:
        asked.writer.write(SSE)
        for _ in range(800):
            asked.writer.write(chunk(b"x" * 65000))
            try:
                async with asyncio.timeout(0.2):
                    await asked.writer.drain()
            except TimeoutError:
                full.set()
                await asked.hung_up()

    limits = box.Limits(linger_s=0.1)
    async with Engine(path, script).running(), box.running({"chat": path}, limits=limits) as b:
        client = await b.connect(limit=1024)
        client.send(content=STREAM)
        await full.wait()
        b.desk.begin(box.core.Act.STOP, "chat", by="test", cut=True)
        await b.until(lambda: b.leases() == 0)
        await b.until(lambda: not b.clients_served())


async def test_a_silent_engine_is_given_up(path: Path) -> None:
    async def script(asked: Asked) -> None:
        if "late" in asked.json:
            asked.writer.write(SSE + token("a"))
        await asked.hung_up()

    limits = box.Limits(first_byte_s=0.2, between_bytes_s=0.2)
    async with Engine(path, script).running(), box.running({"chat": path}, limits=limits) as b:
        first = await b.ask(content=STREAM)
        assert first.status == 502
        assert "said nothing for 0.2" in first.error["message"]
        later = await b.ask(content=STREAM | {"late": True})
        assert "said nothing for 0.2" in json.loads(later.events[-1])["error"]["message"]
        await b.until(lambda: b.leases() == 0)


def suspected(b: box.Box) -> int:
    return sum(isinstance(each, box.Probe) for each in b.hands.given)


async def test_an_engine_that_says_nothing_to_anybody_is_asked_for_a_word(path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asked.hung_up()

    limits = box.Limits(first_byte_s=0.2)
    async with Engine(path, script).running(), box.running({"chat": path}, limits=limits) as b:
        assert (await b.ask(content=HELLO)).status == 502
        assert suspected(b) == 1


async def test_an_engine_that_answers_others_is_not_suspected(path: Path) -> None:
    async def script(asked: Asked) -> None:
        if not asked.json.get("stream"):
            await asked.hung_up()
            return
        asked.writer.write(SSE)
        while not asked.writer.is_closing():
            asked.writer.write(token("a"))
            await asyncio.sleep(0.01)

    limits = box.Limits(first_byte_s=0.4)
    async with Engine(path, script).running(), box.running({"chat": path}, limits=limits) as b:
        client = await b.connect()
        client.send(content=STREAM)
        await client.head()
        assert (await b.ask(content=HELLO)).status == 502
        assert suspected(b) == 0


async def test_time_spent_frozen_is_no_silence(path: Path) -> None:
    go = asyncio.Event()

    async def script(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await go.wait()
        asked.writer.writelines(FINE[2:])

    # longer than the least drain (0.5 s), in which silence does count
    limits = box.Limits(first_byte_s=0.8, between_bytes_s=0.8, client_s=0.8)
    freezing = box.core.Policy(drain_s=0.0, on_deadline=box.core.OnDeadline.FREEZE)
    box_ = box.running({"chat": path}, limits=limits, policy=freezing)
    async with Engine(path, script).running(), box_ as b:
        client = await b.connect()
        client.send(content=STREAM)
        await client.head()
        b.desk.begin(box.core.Act.SLEEP, "chat", by="test")
        frozen = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(2.4, frozen.set_result, None)
        await b.until(lambda: not isinstance(b.phase(), box.core.Awake | box.core.Draining))
        await frozen  # three limits long
        go.set()
        assert (await client.reader.readuntil(END)).endswith(DONE + END)


@pytest.mark.parametrize(
    "check",
    [
        test_a_stream_comes_event_by_event_and_the_connection_serves_the_next,
        test_pipelined_requests_are_answered_in_order,
        test_a_client_of_http_1_0_gets_the_bare_body_and_the_end,
        test_an_idle_connection_that_the_engine_closed_is_no_news,
        test_200_streams_at_once_keep_apart,
        test_an_aborted_stream_is_an_error_frame_and_never_done,
        test_a_long_unstreamed_answer_that_breaks_is_visibly_broken,
        test_a_client_that_never_reads_loses_its_lease,
        test_an_answer_that_is_cut_says_so,
        test_a_daemon_that_is_out_of_patience_breaks_streams_visibly,
        test_a_cut_does_not_wait_for_a_client_that_does_not_read,
    ],
)
def test_the_same_holds_on_uvloop(path: Path, check) -> None:  # type: ignore[no-untyped-def]
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check(path))
