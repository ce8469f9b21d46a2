"""The short way: what goes it, what does not, and that no client can tell the difference."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from homegptd.config.keys import Key, digest
from homegptd.core.model import Asleep, ModelId, SleepLevel
from homegptd.core.quick import LOOK_AGAIN_S
from homegptd.core.refusals import Reason, Refusal
from homegptd.faces import front
from homegptd.faces.ask import Limits
from homegptd.faces.bodies import Bodies
from homegptd.faces.clients import Keyring
from homegptd.faces.guard import Guard
from homegptd.faces.pool import Upstream
from homegptd.faces.upstream import Connection

from . import box
from .box import (
    CHAT,
    DONE,
    END,
    HELLO,
    SSE,
    STREAM,
    Asked,
    Box,
    Engine,
    Script,
    answer,
    dying_after,
    in_turn,
    saying,
    token,
)

GOOD = answer({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]})
BODY = json.dumps(HELLO).encode()
HEAD = (
    f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n"
).encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.sock"


async def echo(asked: Asked) -> None:
    asked.writer.write(answer({"number": asked.number, "body": asked.json}))


def echo_after(go: asyncio.Event) -> Script:
    async def script(asked: Asked) -> None:
        await go.wait()
        await echo(asked)

    return script


async def never(asked: Asked) -> None:
    await asked.hung_up()


async def settled(b: Box, requests: int) -> None:
    """Nothing is held any more, and each request is in the books once."""
    await b.until(lambda: b.leases() == 0 and b.accounts.snapshot() != ())
    assert sum(each.requests for each in b.accounts.snapshot()) == requests
    assert b.door.express._bodies.held == b.door.express._bodies.held_in_memory == 0


def cut(b: Box) -> None:
    assert b.leases()  # whoever looks makes them known to the core
    for lease in list(b.scheduler._leases.values()):
        lease.cut.set_result(Refusal(Reason.CUT, "for a test", retry_after_s=0.1))


# ---------------------------------------------------------------- who goes it


async def test_a_small_request_goes_it_from_the_first_on(path: Path) -> None:
    async with Engine(path, echo).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        for number in range(1, 4):
            reply = await client.ask(content=HELLO | {"max_tokens": 10**number})
            assert reply.json == {"number": number, "body": HELLO | {"max_tokens": 10**number}}
        assert b.fronts() == 1
        assert engine.connections == 1
        account = b.accounts.snapshot()[0]
        assert (account.model, account.answered, account.waited.count) == ("chat", 3, 3)
        await settled(b, 3)


LONG_WAY: dict[str, tuple[str, Any, str]] = {
    "a stream": (CHAT, STREAM, ""),
    "another name": (CHAT, HELLO | {"model": "talk"}, ""),
    "no name": (CHAT, {"messages": []}, ""),
    "no such model": (CHAT, HELLO | {"model": "x"}, ""),
    "no JSON": (CHAT, b"{", ""),
    "another kind": (CHAT, HELLO, "Content-Type: text/plain\r\n"),
    "a large body": (CHAT, HELLO | {"user": "x" * 70_000}, ""),
    "what the engine keeps": ("/v1/responses", {"model": "chat", "input": "x"}, ""),
    "what wakes nothing": ("/tokenize", HELLO, ""),
    "the last request": (CHAT, HELLO, "Connection: close\r\n"),
    "a name that is not ours": (CHAT, HELLO, "Host: example.com\r\n"),
    "another site": (CHAT, HELLO, "Origin: http://example.com\r\n"),
}


@pytest.mark.parametrize(("where", "content", "more"), LONG_WAY.values(), ids=LONG_WAY)
async def test_what_is_not_for_it_is_handed_over_whole(
    path: Path, where: str, content: Any, more: str
) -> None:
    async with Engine(path, echo).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        await client.ask(content=HELLO)
        assert b.fronts() == 1
        reply = await client.ask(where, content, more=more)
        assert b.fronts() == 0
        fresh = await b.ask(where, content, more=more)
        assert (reply.status, reply.complete) == (fresh.status, True)
        if reply.status == 200:
            assert reply.json["body"] == fresh.json["body"]


async def test_a_model_that_sleeps_is_woken_the_long_way(path: Path) -> None:
    asleep = {"chat": Asleep(SleepLevel.ONE, 0.0)}
    async with Engine(path, echo).running(), box.running({"chat": path}, phases=asleep) as b:
        client = await b.connect()
        assert (await client.ask(content=HELLO)).status == 200
        assert b.fronts() == 0
        other = await b.connect()
        assert (await other.ask(content=HELLO)).status == 200
        assert b.fronts() == 1
        await settled(b, 2)


async def test_a_body_that_is_too_large_is_so_here_too(path: Path) -> None:
    async with Engine(path, echo).running(), box.running({"chat": path}, max_body_bytes=99) as b:
        client = await b.connect()
        assert (await client.ask(content=HELLO | {"user": "x" * 99})).status == 413


async def test_no_more_bodies_are_held_than_may_be(path: Path) -> None:
    bodies = Bodies(in_memory=len(BODY) - 1)
    async with Engine(path, echo).running(), box.running({"chat": path}, bodies=bodies) as b:
        client = await b.connect()
        assert (await client.ask(content=HELLO)).status == 200
        assert b.fronts() == 0


# ---------------------------------------------------------------- packets


@pytest.mark.parametrize(
    "at", [1, 20, len(HEAD) - 1, len(HEAD), len(HEAD) + 1, len(HEAD + BODY) - 1]
)
async def test_a_request_may_come_in_two_packets(path: Path, at: int) -> None:
    async with Engine(path, echo).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        for number in (1, 2):
            client.writer.write((HEAD + BODY)[:at])
            await client.writer.drain()
            assert (await b.ask("/health", method="GET")).status == 200  # so the first is read
            client.writer.write((HEAD + BODY)[at:])
            assert (await client.reply()).json == {"number": number, "body": HELLO}
        assert b.fronts() == (at >= len(HEAD))


async def test_requests_that_come_before_the_answer_follow_it(path: Path) -> None:
    go = asyncio.Event()
    async with Engine(path, echo_after(go)).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.writer.write(HEAD + BODY)
        await b.until(lambda: len(engine.asked) == 1)
        client.writer.write(HEAD + BODY)
        client.writer.write(HEAD + BODY[:5])
        assert (await b.ask("/health", method="GET")).status == 200
        client.writer.write(BODY[5:] + HEAD + BODY)
        assert b.leases() == 1
        go.set()
        for number in range(1, 5):
            assert (await client.reply()).json["number"] == number
        await settled(b, 4)


async def test_who_asks_without_end_is_not_read_without_end(path: Path) -> None:
    go = asyncio.Event()
    count = 20_000
    async with Engine(path, echo_after(go)).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.writer.write(HEAD + BODY)
        await b.until(lambda: len(engine.asked) == 1)
        client.writer.write((HEAD + BODY) * count)
        [connection] = b.server.connections
        assert isinstance(connection, front.Front)
        await b.until(lambda: not connection.reads)
        assert len(connection.held) < 1 << 20
        go.set()
        for number in range(1, 101):
            assert (await client.reply()).json["number"] == number


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("phase", ["asked", "headed", "nearly all", "begun"])
async def test_who_leaves_is_gone_at_the_engine_and_in_the_books(
    path: Path, phase: str, *, first: bool
) -> None:
    said = {"asked": b"", "headed": GOOD[:60], "nearly all": GOOD[:-1],
            "begun": answer(b"x" * (2 << 20))[: 3 << 19]}  # fmt: skip
    left = asyncio.Event()

    async def script(asked: Asked) -> None:
        asked.writer.write(said[phase])
        await asked.hung_up()
        left.set()

    scripts = script if first else after_a_good_one(script)
    async with Engine(path, scripts).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        if not first:
            await client.ask(content=HELLO)
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == (1 if first else 2))
        if phase == "begun":
            await client.reader.readexactly(1 << 20)
        client.hang_up()
        async with asyncio.timeout(5):
            await left.wait()
        await settled(b, 1 if first else 2)
        assert b.accounts.snapshot()[0].aborted == 1
        assert b.clients_served() == 0


async def test_an_idle_connection_that_the_engine_closed_is_no_news(path: Path) -> None:
    script = in_turn(saying(GOOD), dying_after(GOOD), saying(GOOD))
    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        for _ in range(3):
            assert (await client.ask(content=HELLO)).status == 200
        assert b.fronts() == 1
        await settled(b, 3)
    assert [each.connection for each in engine.asked] == [1, 1, 2]


async def test_an_engine_lost_before_the_answer_gets_the_request_again_once(path: Path) -> None:
    async with box.running({"chat": path}, notice_s=0.1) as b:
        async with Engine(path, in_turn(dying_after(), saying(GOOD))).running() as engine:
            client = await b.connect()
            assert (await client.ask(content=HELLO)).status == 200
            assert [each.json for each in engine.asked] == [HELLO, HELLO]
            await settled(b, 1)
            assert b.accounts.snapshot()[0].retried == 1
            assert (await client.ask(content=HELLO)).status == 200
            assert (await client.ask(content=b"{")).status == 400
            assert len(engine.asked) == 3
        async with Engine(path, dying_after()).running() as engine:
            assert (await b.ask(content=HELLO)).status == 502
            assert len(engine.asked) == 2


async def test_an_engine_that_cannot_be_reached_is_waited_for(path: Path) -> None:
    async with box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=HELLO)
        await b.until(lambda: b.fronts() == 0)

        async def start(model: str) -> None:
            await engine.__aenter__()

        engine = Engine(path, echo).running()
        b.hands.on_start = start
        b.died("chat")
        assert (await client.reply()).json["body"] == HELLO
        await engine.__aexit__(None, None, None)


async def test_an_answer_that_breaks_is_visibly_broken(path: Path) -> None:
    half = dying_after(answer(b"x" * (2 << 20))[: 3 << 19])
    async with Engine(path, half).running(), box.running({"chat": path}) as b:
        assert not (await b.ask(content=HELLO)).complete
        await settled(b, 1)
        assert b.accounts.snapshot()[0].failed == 1


async def test_a_client_that_does_not_read_stops_the_engine_not_the_daemon(path: Path) -> None:
    size = 32 << 20
    big = answer(b"x" * size)
    done = asyncio.Event()

    async def script(asked: Asked) -> None:
        asked.writer.write(big)
        await asked.writer.drain()
        done.set()

    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect(limit=1 << 16)
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 1)
        assert (await b.ask("/health", method="GET")).status == 200
        assert not done.is_set()
        assert b.leases() == 1
        assert (await client.reply()).body == b"x" * size
        assert done.is_set()
        assert (await client.ask(content=HELLO)).body == b"x" * size
        await settled(b, 2)


async def test_a_client_that_never_reads_loses_its_lease(path: Path) -> None:
    limits, script = Limits(client_s=0.1), saying(answer(b"x" * (32 << 20)))
    async with Engine(path, script).running(), box.running({"chat": path}, limits=limits) as b:
        client = await b.connect(limit=1 << 16)
        client.send(content=HELLO)
        await settled(b, 1)


@pytest.mark.parametrize("begun", [False, True])
async def test_an_operator_may_cut_it(path: Path, *, begun: bool) -> None:
    said = answer(b"x" * (2 << 20))[: 3 << 19] if begun else b""

    async def script(asked: Asked) -> None:
        if asked.number > 1:
            await echo(asked)
            return
        asked.writer.write(said)
        await asked.hung_up()

    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 1)
        if begun:
            await client.reader.readexactly(1 << 20)
        cut(b)
        if begun:
            with pytest.raises(asyncio.IncompleteReadError):
                await client.reader.readexactly(1 << 20)
        else:
            assert (await client.reply()).json["body"] == HELLO
        await settled(b, 1)


async def test_nothing_is_begun_behind_an_answer_that_broke(path: Path) -> None:
    break_now = asyncio.Event()

    async def script(asked: Asked) -> None:
        if asked.number == 2:
            await echo(asked)
            return
        asked.writer.write(answer(b"x" * (2 << 20))[: 3 << 19])
        await break_now.wait()
        asked.writer.transport.abort()

    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=HELLO)
        await client.reader.readexactly(1 << 20)
        assert (await b.ask(content=HELLO)).status == 200  # its connection is free for another
        [connection] = [each for each in b.server.connections if isinstance(each, front.Front)][:1]
        client.send(content=HELLO)
        await b.until(lambda: bool(connection.held.endswith(BODY + HEAD + BODY)))
        break_now.set()
        while await client.reader.read(1 << 20):
            pass
        await settled(b, 2)
        assert len(engine.asked) == 2


async def full(port_of: socket.socket) -> list[socket.socket]:
    """Connections that nobody accepts, until the next one hangs."""
    taken = []
    for _ in range(3):
        taken.append(socket.socket())
        taken[-1].setblocking(False)
        taken[-1].connect_ex(port_of.getsockname())
    return taken


async def test_who_leaves_while_the_engine_is_reached_anew_is_in_the_books(path: Path) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        listener.setblocking(False)
        at: Any = {"chat": listener.getsockname()}
        async with box.running(at, limits=Limits(first_byte_s=0.08)) as b:
            client = await b.connect()
            client.send(content=HELLO)
            with (await loop.sock_accept(listener))[0] as engine:
                await loop.sock_recv(engine, 65536)
                await loop.sock_sendall(engine, GOOD)
                assert (await client.reply()).status == 200
                waiting = await full(listener)
                client.send(content=HELLO)
                await loop.sock_recv(engine, 65536)
            [connection] = b.server.connections
            assert isinstance(connection, front.Front)
            exchange = connection._exchange
            assert exchange is not None
            await b.until(lambda: exchange._connecting is not None)
            assert b.leases() == 1
            client.hang_up()
            await settled(b, 2)
            for each in waiting:
                each.close()


async def test_an_engine_that_cannot_be_named_is_an_error(path: Path) -> None:
    async with box.running({"chat": ("a" * 70 + ".example", 80)}, notice_death_s=0.1) as b:
        assert (await b.ask(content=HELLO)).status in (500, 502)
        await settled(b, 1)


async def test_a_defect_on_the_short_way_holds_nothing(path: Path) -> None:
    def fails(model: str) -> Any:
        raise KeyError(model)

    async with Engine(path, echo).running(), box.running({"chat": path}, engine_keys=fails) as b:
        assert (await b.ask(content=HELLO)).status == 500
        await settled(b, 1)


async def test_what_is_cut_when_its_client_has_just_left_is_in_the_books(path: Path) -> None:
    async with Engine(path, never).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 1)
        [connection] = b.server.connections
        assert connection.transport is not None
        cut(b)
        connection.transport.abort()  # heard of in the next turn of the loop, as the cut is
        await settled(b, 1)
        assert b.accounts.snapshot()[0].aborted == 1


# ---------------------------------------------------------------- whole answers


async def test_answers_that_come_whole_go_on_as_they_came(path: Path) -> None:
    """From the second on: the head of the first one is known then."""
    usage = {"prompt_tokens": 30, "completion_tokens": 4}
    said = answer({"choices": [{"finish_reason": "stop"}], "usage": usage}, more=b"x-Odd: YES\r\n")

    async with Engine(path, saying(said)).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        for _ in range(3):
            client.send(content=HELLO)
            assert await client.reader.readexactly(len(said)) == said
        await settled(b, 3)
        account = b.accounts.snapshot()[0]
        assert (account.tokens_read, account.tokens_written) == (90, 12)
        assert (account.answered, account.waited.count, account.uncounted) == (3, 3, 0)
    assert engine.connections == 1


def after_a_good_one(script: Script) -> Script:
    return in_turn(saying(GOOD), script, saying(GOOD))


ABORTED = answer({"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]})
DIED = answer({"error": {"message": "EngineCore encountered an issue"}}, "500 Internal")
NO_GOOD: dict[str, Script] = {
    "cut by vLLM": saying(ABORTED),
    "cut by vLLM, in two packets": saying(ABORTED[:-9], ABORTED[-9:]),
    "a dying engine": saying(DIED),
    "half an answer": dying_after(GOOD[:-1]),
    "half a head": dying_after(GOOD[:60]),
    "nothing": dying_after(),
    "an answer and a half": dying_after(GOOD + GOOD[:9]),
}


@pytest.mark.parametrize("script", NO_GOOD.values(), ids=NO_GOOD)
async def test_what_is_no_good_answer_is_asked_for_again(path: Path, script: Script) -> None:
    async with (
        Engine(path, after_a_good_one(script)).running() as engine,
        box.running({"chat": path}, notice_s=0.05) as b,
    ):
        client = await b.connect()
        for _ in range(2):
            reply = await client.ask(content=HELLO)
            assert (reply.status, reply.body) == (200, GOOD.partition(b"\r\n\r\n")[2])
        await settled(b, 2)
        assert len(engine.asked) == 3


async def test_a_silent_engine_is_given_up_in_time(path: Path) -> None:
    limits, loop = Limits(first_byte_s=0.4), asyncio.get_running_loop()
    script = after_a_good_one(never)
    async with Engine(path, script).running(), box.running({"chat": path}, limits=limits) as b:
        client = await b.connect()
        await client.ask(content=HELLO)
        began = loop.time()
        reply = await client.ask(content=HELLO)
        assert reply.status == 502
        assert "said nothing for 0.4" in reply.error["message"]
        assert loop.time() - began > 0.3
        await settled(b, 2)


async def test_an_engine_that_speaks_slowly_is_not_silent(path: Path) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(GOOD[:-8])
        for at in range(len(GOOD) - 8, len(GOOD)):
            await asyncio.sleep(0.1)
            asked.writer.write(GOOD[at : at + 1])

    limits = Limits(first_byte_s=0.5, between_bytes_s=0.5)
    scripts = after_a_good_one(script)
    async with Engine(path, scripts).running(), box.running({"chat": path}, limits=limits) as b:
        client = await b.connect()
        for _ in range(2):
            assert (await client.ask(content=HELLO)).status == 200


async def test_after_a_head_it_may_be_silent_as_long_as_between_two_pieces(path: Path) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(GOOD[:-8])
        await asked.hung_up()

    limits = Limits(first_byte_s=60.0, between_bytes_s=0.2)
    scripts = after_a_good_one(script)
    async with Engine(path, scripts).running(), box.running({"chat": path}, limits=limits) as b:
        client = await b.connect()
        await client.ask(content=HELLO)
        reply = await client.ask(content=HELLO)
        assert "said nothing for 0.2" in reply.error["message"]


async def test_a_connection_made_anew_has_all_its_time(path: Path) -> None:
    async def closes_late(asked: Asked) -> None:
        await asyncio.sleep(0.5)
        asked.writer.close()

    async def late(asked: Asked) -> None:
        await asyncio.sleep(0.65)
        asked.writer.write(GOOD)

    script, limits = in_turn(saying(GOOD), closes_late, late), Limits(first_byte_s=0.7)
    async with Engine(path, script).running(), box.running({"chat": path}, limits=limits) as b:
        client = await b.connect()
        for _ in range(2):
            assert (await client.ask(content=HELLO)).status == 200


async def test_the_first_event_of_a_stream_nobody_asked_for_is_timed(path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asyncio.sleep(0.3)
        asked.writer.write(SSE + token("x", "stop") + DONE + END)

    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        await b.ask(content=HELLO)
        await settled(b, 1)
        assert b.accounts.snapshot()[0].first_token.sum_s > 0.25


async def test_who_was_noticed_once_can_be_cut_on_another_connection(path: Path) -> None:
    close = asyncio.Event()

    async def closes(asked: Asked) -> None:
        await close.wait()
        asked.writer.close()

    script = in_turn(saying(GOOD), closes, never, echo)
    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        await client.ask(content=HELLO)
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 2)
        assert b.leases() == 1
        close.set()
        await b.until(lambda: len(engine.asked) == 3)
        cut(b)
        assert (await client.reply()).json["body"] == HELLO
        await settled(b, 2)


class Gone:
    """A client of which uvloop learns when it writes to it that it is gone."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def is_closing(self) -> bool:
        return self.transport.is_closing()

    def write(self, data: bytes) -> None:
        self.transport.abort()


async def test_who_turns_out_to_be_gone_has_no_answer(path: Path) -> None:
    go = asyncio.Event()
    script = after_a_good_one(echo_after(go))
    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        await client.ask(content=HELLO)
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 2)
        [connection] = b.server.connections
        assert isinstance(connection, front.Front)
        exchange = connection._exchange
        assert exchange is not None
        outlet: Any = exchange._lane.outlet
        outlet.transport = Gone(outlet.transport)
        go.set()
        await settled(b, 2)
        assert b.accounts.snapshot()[0].aborted == 1


def has_failed(b: Box) -> None:
    state = b.scheduler.state
    chat = replace(state.engines[ModelId("chat")], failures=1)
    b.scheduler._state = replace(state, engines={**state.engines, ModelId("chat"): chat})


@pytest.mark.parametrize("noticed", [False, True])
@pytest.mark.parametrize("served", [False, True])
async def test_who_was_served_proves_that_the_engine_is_well(
    path: Path, *, noticed: bool, served: bool
) -> None:
    go = asyncio.Event()
    script = after_a_good_one(echo_after(go))
    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        await client.ask(content=HELLO)
        has_failed(b)
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 2)
        if noticed:
            assert b.leases() == 1
        if served:
            go.set()
            assert (await client.reply()).status == 200
        else:
            client.hang_up()
            await b.until(lambda: b.clients_served() == 0)
        await b.until(lambda: b.leases() == 0)
        assert b.scheduler.state.engines[ModelId("chat")].failures == (0 if served else 1)


async def test_who_leaves_while_connecting_reaches_no_engine(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, connected, connect = asyncio.Event(), asyncio.Event(), Upstream.connect

    async def slow(upstream: Upstream) -> Connection:
        await go.wait()
        connected.set()
        return await connect(upstream)

    async with Engine(path, echo).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        monkeypatch.setattr(Upstream, "connect", lambda upstream, **_: slow(upstream))
        client.send(content=HELLO)
        await b.until(lambda: b.leases() == 1)
        client.hang_up()
        await settled(b, 1)
        go.set()
        assert (await (await b.connect()).ask(content=HELLO)).status == 200
        assert len(engine.asked) == 1


async def test_a_connection_that_is_closing_is_not_used(path: Path) -> None:
    async with Engine(path, echo).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        for _ in range(2):
            await client.ask(content=HELLO)
        [connection] = b.server.connections
        assert isinstance(connection, front.Front)
        [upstream] = b.door.express.pool._upstreams.values()
        transport = upstream._idle[0]._transport
        assert transport is not None
        transport.close()  # as when its end was read in this turn of the loop
        connection.data_received(HEAD + BODY)
        assert (await client.reply()).json["number"] == 3
        assert engine.connections == 2
        await settled(b, 3)


async def test_heads_that_differ_each_time_leave_nothing(path: Path) -> None:
    async with Engine(path, saying(GOOD)).running(), box.running({"chat": path}) as b:
        client, ticks = await b.connect(), b.door.express.pool.ticks
        for number in range(20):
            await client.ask(content=HELLO, more=f"X-Request-Id: {number}\r\n")
        assert sum(map(len, ticks._counting.values())) == 0
        assert b.fronts() == 1


async def test_an_idle_connection_knows_nothing_of_who_used_it(path: Path) -> None:
    async with Engine(path, saying(GOOD)).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        for _ in range(3):
            await client.ask(content=HELLO)
            [upstream] = b.door.express.pool._upstreams.values()
            [idle] = upstream._idle
            assert (idle._whole, idle._sink, idle._raw) == (None, None, b"")


@pytest.mark.parametrize("first", [True, False])
async def test_who_has_just_left_has_no_answer(path: Path, *, first: bool) -> None:
    script = never if first else after_a_good_one(never)
    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        if not first:
            await client.ask(content=HELLO)
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == (1 if first else 2))
        [connection] = b.server.connections
        assert isinstance(connection, front.Front)
        assert connection._exchange is not None
        up = connection._exchange._connection
        assert up is not None
        assert connection.transport is not None
        connection.transport.abort()  # heard of in the next turn of the loop
        up.data_received(GOOD)
        await settled(b, 1 if first else 2)
        assert b.accounts.snapshot()[0].aborted == 1


async def test_the_clock_stops_when_nothing_runs(path: Path) -> None:
    async def slow(asked: Asked) -> None:
        await asyncio.sleep(2 * LOOK_AGAIN_S)
        await echo(asked)

    limits = Limits(first_byte_s=2.0)
    async with Engine(path, slow).running(), box.running({"chat": path}, limits=limits) as b:
        client, ticks = await b.connect(), b.door.express.pool.ticks
        for _ in range(2):
            await client.ask(content=HELLO)
            assert ticks._counting
            await b.until(lambda: not ticks._counting)
        [connection] = b.server.connections
        assert connection.flow is None


@pytest.mark.parametrize("looked", [False, True])
async def test_one_that_takes_its_time_is_an_answer_as_any(path: Path, *, looked: bool) -> None:
    """It has become one soon, or when somebody looks at the box."""
    go = asyncio.Event()
    script = after_a_good_one(echo_after(go))
    async with Engine(path, script).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        await client.ask(content=HELLO)
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 2)
        [connection] = b.server.connections
        assert isinstance(connection, front.Front)
        exchange = connection._exchange
        assert exchange is not None
        if looked:
            assert b.leases() == 1
        await b.until(lambda: exchange._answer is not None)
        go.set()
        assert (await client.reply()).json["body"] == HELLO
        await settled(b, 2)
        assert b.fronts() == 1


async def test_a_page_that_may_read_answers_is_told_so_each_time(path: Path) -> None:
    guard = Guard(cors=frozenset({"http://page.example"}))
    async with Engine(path, echo).running(), box.running({"chat": path}, guard=guard) as b:
        client = await b.connect()
        for _ in range(3):
            reply = await client.ask(content=HELLO, more="Origin: http://page.example\r\n")
            assert reply.headers["access-control-allow-origin"] == "http://page.example"
        assert b.fronts() == 1


@pytest.mark.parametrize("where", ["/v1/messages", "/v1/completions"])
async def test_a_cut_that_takes_more_to_see_is_seen(path: Path, where: str) -> None:
    said = answer(
        b'{"type":"message","content":[]}'
        if "messages" in where
        else b'{"choices":[{"finish_reason":"abort"}]}'
    )
    script = after_a_good_one(saying(said))
    async with Engine(path, script).running(), box.running({"chat": path}, notice_s=0.05) as b:
        client = await b.connect()
        for _ in range(2):
            assert (await client.ask(where, HELLO)).body == GOOD.partition(b"\r\n\r\n")[2]


# ---------------------------------------------------------------- keys


def keys(*names: str, **more: Any) -> tuple[Key, ...]:
    return tuple(Key(name, digest(f"sk-{name}"), **more) for name in names)


async def test_a_key_that_is_taken_away_is_no_key_any_more(path: Path) -> None:
    ring = Keyring(keys("one", "two"))
    async with (
        Engine(path, echo).running(),
        box.running({"chat": path}, guard=Guard(keys=ring)) as b,
    ):
        client = await b.connect()
        more = "Authorization: Bearer sk-one\r\n"
        assert (await client.ask(content=HELLO, more=more)).status == 200
        assert b.fronts() == 1
        b.door.guard = Guard(keys=ring)  # a reload that changes nothing for it
        assert (await client.ask(content=HELLO, more=more)).status == 200
        assert b.fronts() == 1
        ring.keys = keys("two")
        b.door.guard = Guard(keys=ring)
        assert (await client.ask(content=HELLO, more=more)).status == 401
        [good] = [each for each in b.accounts.snapshot() if each.key]
        assert (good.key, good.answered) == ("one", 2)


@pytest.mark.parametrize(
    ("more", "status", "short"),
    [({"models": frozenset({"chat"})}, 200, True), ({"models": frozenset({"x"})}, 404, False),
     ({"concurrency": 1}, 200, False)],
)  # fmt: skip
async def test_what_a_key_may_holds_here_too(
    path: Path, more: dict[str, Any], status: int, *, short: bool
) -> None:
    guard = Guard(keys=Keyring(keys("one", **more)))
    async with Engine(path, echo).running(), box.running({"chat": path}, guard=guard) as b:
        client = await b.connect()
        reply = await client.ask(content=HELLO, more="x-api-key: sk-one\r\n")
        assert (reply.status, b.fronts() == 1) == (status, short)


# ---------------------------------------------------------------- the server ends


async def test_an_answer_under_way_ends_before_the_server(path: Path) -> None:
    go = asyncio.Event()
    async with Engine(path, echo_after(go)).running() as engine, box.running({"chat": path}) as b:
        client, idle = await b.connect(), await b.connect()
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 1)
        b.server.pre_shutdown()
        async with asyncio.TaskGroup() as group:
            group.create_task(b.server.shutdown(5.0))
            assert await idle.closed()
            go.set()
            assert (await client.reply()).json["body"] == HELLO
            assert await client.closed()
        await settled(b, 1)


async def test_an_answer_that_does_not_end_is_cut_with_the_server(path: Path) -> None:
    async with Engine(path, never).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 1)
        b.server.pre_shutdown()
        await b.server.shutdown(0.1)
        assert await client.closed()
        await settled(b, 1)


TICKS: dict[str, tuple[bytes, int, bool]] = {
    "never said anything": (b"", 3, True),
    "was used": (HEAD + BODY, 6, True),
    "is in the middle of a request": (HEAD + BODY[:5], 1, False),
}


@pytest.mark.parametrize(("sent", "ticks", "closed"), TICKS.values(), ids=TICKS)
async def test_nobody_is_silent_for_ever(
    path: Path, sent: bytes, ticks: int, *, closed: bool
) -> None:
    async with Engine(path, echo).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        client.writer.write(sent)
        await b.until(lambda: b.clients_served() == 1)
        [connection] = b.server.connections
        assert isinstance(connection, front.Front)
        if sent == HEAD + BODY:
            await client.reply()
        else:
            await b.until(lambda: connection.held == sent)
        for _ in range(ticks - 1):
            connection.tick()
        assert b.fronts() == 1
        connection.tick()
        await b.until(lambda: b.fronts() == 0)
        if closed:
            assert await client.closed()
        else:
            client.writer.write(BODY[5:])
            assert (await client.reply()).json["body"] == HELLO


async def test_the_time_of_an_answer_is_no_silence(path: Path) -> None:
    go = asyncio.Event()
    async with Engine(path, echo_after(go)).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=HELLO)
        await b.until(lambda: len(engine.asked) == 1)
        [connection] = b.server.connections
        assert isinstance(connection, front.Front)
        for _ in range(front.QUIET_TICKS):
            connection.tick()
        go.set()
        assert (await client.reply()).status == 200
        connection.tick()
        assert (await client.ask(content=HELLO)).status == 200
        assert b.fronts() == 1
