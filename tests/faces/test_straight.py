"""Events that go straight on: nobody can tell that nobody has looked at them more closely."""

from __future__ import annotations

import random
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import pytest

from homegptd.core.refusals import Reason, Refusal
from homegptd.faces.upstream import Connection

from . import box
from .box import DONE, END, HELLO, SSE, Asked, Box, Client, Engine, chunk, token

STREAM = HELLO | {"stream": True}


def counted(tokens: int) -> bytes:
    """With the usage so far, as `continuous_usage_stats` asks for."""
    usage = b'"usage":{"prompt_tokens":3,"completion_tokens":%d}' % tokens
    return chunk(b'data: {"choices":[{"finish_reason":null}],%b}\n\n' % usage)


ABORTED = token("x", "abort")
EVENTS = [
    token("one"), token("two two"), token("x" * 300), token('"abort"'), token("0\r\n\r\n"),
    token("\n\n"), chunk(b": a comment\n\n"), chunk(b'data: {"half":'), chunk(b"1}\n\n"),
    chunk(b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'),
    token("a") + token("b"), b"0" + token("c"), counted(1), counted(2), token("y" * 1500),
    chunk(token("a").partition(b"\r\n")[2][:-2] * 2), token('"finish_reason":null}]}'),
    chunk(b'data: {"choices":[{"finish_reason":null}],"more":1}\n\n'),
]  # fmt: skip
LURE = token("lure")
INSIDE = b"%x\r\n: " % (len(LURE) + 4)
ERROR = chunk(b'data: {"error":{"message":"no"}}\n\n')
ENDS = [
    [DONE + END], [token("z", "stop"), DONE + END], [ABORTED, DONE + END], [ABORTED[:-30]],
    [b"zz\r\n"], [ERROR, DONE + END], [ERROR, token("EngineCore encountered"), DONE + END],
    [END + token("more")], [token("half")[:-9], LURE, b"x"],
    [INSIDE, LURE, b"\n\n\r\n", token("a"), DONE + END], [token("a") + ABORTED],
]  # fmt: skip
WITHOUT = property(lambda _: None, lambda _, __: None)


async def silent(asked: Asked) -> None:
    await asked.hung_up()


def packets(seed: int) -> list[bytes]:
    """A stream in pieces, as vLLM sends it or not. It has begun, or it would be asked for again."""
    dice = random.Random(seed)
    chosen = [*dice.choices(EVENTS, k=dice.randint(0, 12)), *ENDS[seed % len(ENDS)]]
    if dice.random() < 0.5:
        said = b"".join(chosen)
        cuts = sorted({0, len(said), *dice.choices(range(len(said)), k=dice.randint(0, 6))})
        chosen = [said[a:b] for a, b in pairwise(cuts)]
    return [SSE + token("first"), *chosen]


async def begun(b: Box, engine: Engine, client: Client) -> Any:
    """The answer to a request for a stream, of which nothing has come yet."""
    asked = len(engine.asked)
    client.send(content=STREAM)
    await b.until(lambda: len(engine.asked) == asked + 1)
    [flow] = [each.flow for each in b.server.connections if each.flow is not None]
    return flow


async def heard(b: Box, engine: Engine, pieces: list[bytes]) -> tuple[object, ...]:
    """What a client gets of it, to the end."""
    client = await b.connect()
    up, straight = (await begun(b, engine, client))._connection, 0
    for piece in pieces:
        straight += up.straight is not None
        up.data_received(piece)
        if up._sink is None:
            break
    else:
        up.connection_lost(None)
    reply = await client.reply()
    client.hang_up()
    await b.until(lambda: b.leases() == 0 and not b.server.connections)
    return reply.status, reply.body, reply.complete, bool(straight)


@pytest.mark.parametrize("seed", range(66))
async def test_it_is_the_same_with_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    path = tmp_path / "chat.sock"
    async with Engine(path, silent).running() as engine, box.running({"chat": path}) as b:
        *short, _ = await heard(b, engine, packets(seed))
        tokens = [(each.tokens_read, each.tokens_written) for each in b.accounts.snapshot()]
        monkeypatch.setattr(Connection, "straight", WITHOUT)
        *long, straight = await heard(b, engine, packets(seed))
        assert not straight
        assert short == long
        twice = [(each.tokens_read, each.tokens_written) for each in b.accounts.snapshot()]
        assert twice == [(2 * read, 2 * written) for read, written in tokens]


async def test_a_plain_event_goes_straight_on(tmp_path: Path) -> None:
    path = tmp_path / "chat.sock"
    async with Engine(path, silent).running() as engine, box.running({"chat": path}) as b:
        pieces = [SSE + token("a"), token("b"), token("c"), DONE + END]
        status, body, complete, straight = await heard(b, engine, pieces)
        assert (status, complete, straight) == (200, True, True)
        assert isinstance(body, bytes)
        assert body.count(b"data: ") == 4


async def test_a_body_is_kept_until_its_answer_begins(tmp_path: Path) -> None:
    path = tmp_path / "chat.sock"
    async with Engine(path, silent).running() as engine, box.running({"chat": path}) as b:
        answer = await begun(b, engine, await b.connect())
        assert b"hello" in answer._ask.body
        answer._connection.data_received(SSE)
        assert b"hello" in answer._ask.body
        answer._connection.data_received(token("a"))
        assert answer._ask.body == b""


async def test_half_an_event_is_known_as_such(tmp_path: Path) -> None:
    """Nothing may be said for the engine in the middle of one."""
    path = tmp_path / "chat.sock"
    async with Engine(path, silent).running() as engine, box.running({"chat": path}) as b:
        answer = await begun(b, engine, await b.connect())
        for piece, clean, plain in (
            (SSE + token("a"), True, True), (token("b"), True, True),
            (chunk(b'data: {"half":'), False, False), (chunk(b"1}\n\n"), True, False),
            (token("c"), True, True), (counted(3), True, False), (token("d"), True, True),
        ):  # fmt: skip
            answer._connection.data_received(piece)
            assert (answer._clean, answer._connection.straight is not None) == (clean, plain)


async def test_nothing_follows_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "chat.sock"
    async with Engine(path, silent).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        answer = await begun(b, engine, client)
        up = answer._connection
        for piece in (SSE + token("a"), token("b")):
            up.data_received(piece)
        assert up.straight is not None
        answer._lease.cut.set_result(Refusal(Reason.CUT, "for a test"))
        await b.until(lambda: answer._over)
        up.data_received(token("late"))
        reply = await client.reply()
        assert b"for a test" in reply.body
        assert b"late" not in reply.body


async def test_nobody_speaks_for_an_answer_that_is_over(tmp_path: Path) -> None:
    """The next answer may have begun over that connection."""
    path = tmp_path / "chat.sock"
    async with Engine(path, silent).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        answer = await begun(b, engine, client)
        answer._connection.data_received(SSE + token("a"))
        answer._connection.connection_lost(None)
        answer._connection.spoke, answer._early._spoke_at = False, -inf
        answer.tick()  # before whoever asked has woken up
        assert answer._early._spoke_at == -inf
        assert (await client.reply()).complete


async def test_a_status_line_ends_once(tmp_path: Path) -> None:
    path = tmp_path / "chat.sock"
    async with Engine(path, silent).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        answer = await begun(b, engine, client)
        up, early = answer._connection, answer._early
        up.data_received(SSE + token("a"))
        early._status_open = True
        for text in ("b", "c"):
            up.spoke, early._spoke_at = False, -inf
            answer.tick()
            up.data_received(token(text))
        up.data_received(DONE + END)
        said = (await client.reply()).body
        assert said.count(b"goes on after") == 1
        assert said.index(b"goes on after") < said.index(b'"b"')


async def test_no_error_is_put_into_a_chunk_that_is_open(tmp_path: Path) -> None:
    path = tmp_path / "chat.sock"
    async with Engine(path, silent).running() as engine, box.running({"chat": path}) as b:
        client = await b.connect()
        up = (await begun(b, engine, client))._connection
        up.data_received(SSE + token("a"))
        aborted = token("x" * 100_000, "abort")
        up.data_received(aborted[:-200])  # more than is held
        up.data_received(aborted[-200:])
        assert not (await client.reply()).complete
