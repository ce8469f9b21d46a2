"""What is sent again and what is not, and how often a model that fails is started."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from homegptd.core.commands import Start
from homegptd.core.events import StartEnded
from homegptd.core.model import Act, Awake, Down, Failure, Policy
from homegptd.core.refusals import Reason, Refusal

from . import box
from .box import CHAT, HELLO, SSE, STREAM, Asked, Engine, answer, dying_after, in_turn, saying

GOOD = answer({"choices": []})
RESPONSES = "/v1/responses"
STORED = {"model": "chat", "input": "Hello", "store": True}
"""What the engine keeps: sent twice it would be there twice."""
STAINLESS = "x-stainless-read-timeout: {}\r\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat"


@pytest.mark.parametrize("content", [STORED, {**STORED, "stream": True}], ids=["whole", "stream"])
async def test_what_has_effects_is_not_sent_again(path: Path, content: dict[str, object]) -> None:
    script = in_turn(saying(GOOD), dying_after(), saying(GOOD))
    async with (
        Engine(path, script).running() as engine,
        box.running({"chat": path}, notice_s=0.0) as b,
    ):
        assert (await b.ask(RESPONSES, content)).status == 200
        lost = await b.ask(RESPONSES, content)
        assert (lost.status, lost.error["code"]) == (502, "engine_fault")
        # nor on a connection that may be closing: nobody would know whether it arrived
        assert [each.connection for each in engine.asked] == [1, 2]


async def test_what_has_effects_is_not_sent_again_after_a_cut(path: Path) -> None:
    here = asyncio.Event()

    async def script(asked: Asked) -> None:
        here.set()
        await asked.hung_up()

    policy = Policy(drain_s=0.0, on_deadline=box.core.OnDeadline.CUT)
    running = box.running({"chat": path, "coder": path}, policy=policy, awake_mib=1 << 19)
    async with Engine(path, script).running() as engine, running as b:
        client = await b.connect()
        client.send(RESPONSES, STORED)
        await here.wait()
        b.desk.begin(Act.STOP, "chat", by="test", cut=True)
        assert (await client.reply()).error["code"] == "cut"
        assert len(engine.asked) == 1


@pytest.mark.parametrize("lost_first", [False, True])
async def test_an_operators_cut_is_no_second_loss(path: Path, *, lost_first: bool) -> None:
    """Who was cut to make room and then lost with its engine has been lost once."""
    die = asyncio.Event()

    async def dies(asked: Asked) -> None:
        await die.wait()
        asked.writer.close()

    async def never(asked: Asked) -> None:
        await asked.hung_up()

    scripts = (dies, never) if lost_first else (never, dies)
    script = in_turn(*scripts, saying(answer({"ok": True})))
    async with Engine(path, script).running() as engine:
        async with box.running({"chat": path}, notice_s=0.05) as b:
            client = await b.connect()
            client.send(content=HELLO)
            for number, each in enumerate(scripts, start=1):
                await b.until(lambda number=number: len(engine.asked) == number)  # type: ignore[misc]
                if each is dies:
                    die.set()
                else:
                    await b.until(lambda: b.leases() == 1)
                    for lease in list(b.scheduler._leases.values()):
                        lease.cut.set_result(Refusal(Reason.CUT, "a test", retry_after_s=0.1))
            assert (await client.reply()).json == {"ok": True}
            assert len(engine.asked) == 3
        assert b.accounts.snapshot()[0].retried == 1


async def test_what_did_not_reach_the_engine_had_no_effects(path: Path) -> None:
    """Nobody listens: it is tried again like everything else."""
    async with box.running({"chat": path}) as b:
        up = Engine(path, saying(GOOD)).running()

        async def start(model: str) -> None:
            await up.__aenter__()

        b.hands.on_start = start
        asyncio.get_running_loop().call_later(0.05, b.died, "chat")
        try:
            assert (await b.ask(RESPONSES, STORED)).status == 200
        finally:
            await up.__aexit__(None, None, None)


async def test_a_model_that_fails_is_started_once_for_all_who_wait(path: Path) -> None:
    now = asyncio.get_running_loop().time()
    down, go = {"chat": Down(now)}, asyncio.Event()
    async with box.running({"chat": path}, phases=down) as b:

        async def fails(model: str) -> None:
            await go.wait()
            order = b.hands.given[-1]
            assert isinstance(order, Start)
            b.scheduler.post(StartEnded(order.model, order.order, failure=Failure("no memory")))

        b.hands.on_start = fails
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(b.ask(content=HELLO)) for _ in range(20)]
            await b.until(lambda: len(b.scheduler.state.waiting) == 20)
            go.set()
        for task in asked:
            reply = task.result()
            assert (reply.status, reply.error["code"]) == (503, "model_failed")
            assert "no memory" in reply.error["message"]
            assert 1 <= int(reply.headers["retry-after"]) <= 5
        for _ in range(20):  # during the back-off
            assert (await b.ask(content=HELLO)).status == 503
        assert sum(isinstance(each, Start) for each in b.hands.given) == 1


async def test_a_client_that_says_how_long_it_waits_is_answered_just_before(path: Path) -> None:
    down = {"chat": Down(asyncio.get_running_loop().time())}
    async with box.running({"chat": path}, phases=down) as b:
        b.hands.on_start = lambda model: asyncio.Event().wait()
        reply = await b.ask(content=HELLO, more=STAINLESS.format(0.2))
        assert (reply.status, reply.error["code"]) == (503, "waited_too_long")
        assert reply.headers["x-should-retry"] == "true"
        assert reply.headers["retry-after"] == "60"  # 90 s to go, and SDKs come after 60 at most


@pytest.mark.parametrize("said", ["0", "-1", "nan", "inf", "soon", "", "1e400"])
async def test_a_wait_that_means_nothing_changes_nothing(path: Path, said: str) -> None:
    async with Engine(path, saying(GOOD)).running(), box.running({"chat": path}) as b:
        assert (await b.ask(content=HELLO, more=STAINLESS.format(said))).status == 200
        assert isinstance(b.phase(), Awake)


async def test_a_stream_shows_that_it_lives_and_so_may_take_longer(path: Path) -> None:
    down = {"chat": Down(asyncio.get_running_loop().time())}
    go = asyncio.Event()

    async def start(model: str) -> None:
        await go.wait()

    script = saying(SSE, box.token("a", "stop"), box.DONE, box.END)
    async with Engine(path, script).running(), box.running({"chat": path}, phases=down) as b:
        b.hands.on_start = start
        client = await b.connect()
        client.send(CHAT, STREAM, more=STAINLESS.format(0.1))
        asyncio.get_running_loop().call_later(0.3, go.set)
        assert (await client.reply()).events[-1] == "[DONE]"


@pytest.mark.parametrize("where", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("key", ["finish_reason", "stop_reason"])
async def test_an_answer_that_vllm_cut_itself_is_an_error(path: Path, where: str, key: str) -> None:
    cut, go = b'{"id":"x","%s":"abort"}' % key.encode(), asyncio.Event()

    async def script(asked: Asked) -> None:
        if not asked.json.get("stream"):
            asked.writer.write(answer(cut))
            return
        asked.writer.write(SSE + box.token("a"))
        await go.wait()
        asked.writer.write(box.chunk(b"data: " + cut + b"\n\n") + box.DONE + box.END)

    async with Engine(path, script).running(), box.running({"chat": path}, notice_s=0.0) as b:
        whole = await b.ask(where, HELLO)  # both tries are cut
        assert whole.status == 502
        assert "cut its answer" in whole.error["message"]
        client = await b.connect()
        client.send(where, STREAM)
        assert (await client.head())[0] == 200
        go.set()
        said = await client.reader.readuntil(box.END)
        assert b"cut its answer" in said
        assert b"abort" not in said
        assert b"[DONE]" not in said


WHOLE_MESSAGE = b'{"id":"m","type":"message","role":"assistant","content":[],"model":"chat"%s}'
WHOLE_RESPONSE = b'{"id":"r","object":"response","status":"%s","output":[]}'
MESSAGE_DELTA = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":%s}}\n\n'
)


@pytest.mark.parametrize(
    ("where", "whole", "event"),
    [
        ("/v1/messages", WHOLE_MESSAGE % b"", MESSAGE_DELTA % b"null"),
        (
            "/v1/responses",
            WHOLE_RESPONSE % b"cancelled",
            b"data: %s\n\n" % (WHOLE_RESPONSE % b"cancelled"),
        ),
    ],
    ids=["messages", "responses"],
)
async def test_a_cut_that_vllm_translates_is_an_error_too(
    path: Path, where: str, whole: bytes, event: bytes
) -> None:
    go = asyncio.Event()

    async def script(asked: Asked) -> None:
        if not asked.json.get("stream"):
            asked.writer.write(answer(whole))
            return
        asked.writer.write(SSE + box.token("a"))
        await go.wait()
        asked.writer.write(box.chunk(event) + box.END)

    async with Engine(path, script).running(), box.running({"chat": path}, notice_s=0.0) as b:
        assert "cut its answer" in (await b.ask(where, HELLO)).error["message"]
        client = await b.connect()
        client.send(where, STREAM)
        await client.head()
        go.set()
        said = await client.reader.readuntil(box.END)
        assert b"cut its answer" in said
        assert event not in said


@pytest.mark.parametrize(
    ("where", "whole"),
    [
        ("/v1/messages", WHOLE_MESSAGE % b',"stop_reason":"end_turn"'),
        ("/v1/messages", b'{"type":"error","error":{"message":"no"}}'),
        ("/v1/responses", WHOLE_RESPONSE % b"completed"),
        (CHAT, WHOLE_RESPONSE % b"cancelled"),
        (
            "/v1/responses",
            b'{"id":"r","metadata":{"status":"cancelled","a":{"finish_reason":"abort"}},'
            b'"object":"response","status":"completed","output":[]}',
        ),
        (
            "/v1/messages",
            WHOLE_MESSAGE % b',"input":{"finish_reason":"abort"},"stop_reason":"tool_use"',
        ),
        ("/v1/messages", WHOLE_MESSAGE % (b',"x":"%s","stop_reason":"end_turn"' % (b"x" * 2**21))),
    ],
    ids=["message", "error", "response", "chat", "metadata", "tool", "long message"],
)
async def test_what_is_complete_is_not_taken_for_a_cut(
    path: Path, where: str, whole: bytes
) -> None:
    async with Engine(path, saying(answer(whole))).running(), box.running({"chat": path}) as b:
        assert (await b.ask(where, HELLO)).body == whole


async def test_what_a_client_sent_and_gets_back_in_a_stream_is_no_cut(path: Path) -> None:
    begun = b'data: {"type":"response.created","response":{"metadata":{"status":"cancelled"}}}\n\n'
    end = b'data: {"type":"response.completed","response":{"status":"completed"}}\n\n'
    script = saying(SSE, box.chunk(begun), box.chunk(end), box.END)
    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        client.send("/v1/responses", STREAM)
        await client.head()
        said = await client.reader.readuntil(box.END)
        assert begun in said
        assert end in said
