"""Streams whose events come one by one: what is looked for is found in every one of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from homegptd.faces.early import Pace

from . import box
from .box import DONE, END, SSE, STREAM, Asked, Engine, Script, chunk, token

LAST = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.sock"


async def tell(asked: Asked, *pieces: bytes) -> None:
    """Each in a read of its own."""
    for piece in pieces:
        asked.writer.write(piece)
        for _ in range(3):
            await asyncio.sleep(0)


def one_by_one(*pieces: bytes) -> Script:
    """After a few that are plain."""

    async def script(asked: Asked) -> None:
        await tell(asked, SSE, token("a"), token("b"), token("c"), *pieces)

    return script


def event(content: object) -> bytes:
    return chunk(b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n")


CUT = {
    "abort": ("/v1/chat/completions", token("", "abort")),
    "no reason": ("/v1/messages", event({"type": "message_delta", "delta": {"stop_reason": None}})),
    "cancelled": ("/v1/responses", event({"response": {"status": "cancelled"}})),
}


@pytest.mark.parametrize(("where", "cut"), CUT.values(), ids=CUT)
async def test_a_cut_is_seen(path: Path, where: str, cut: bytes) -> None:
    script = one_by_one(cut, DONE, END)
    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        reply = await b.ask(where, STREAM)
    assert reply.body.count(b'"content":') == 3
    assert b"cut its answer" in reply.body
    assert cut not in reply.body
    assert b"[DONE]" not in reply.body


@pytest.mark.parametrize("between", [(), (token("d"),)], ids=["at once", "later"])
async def test_a_death_that_follows_an_error_is_seen(
    path: Path, between: tuple[bytes, ...]
) -> None:
    error = event({"error": {"message": "something went wrong"}})
    script = one_by_one(error, *between, event({"message": "EngineDeadError"}), DONE, END)
    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        reply = await b.ask(content=STREAM)
    assert b"something went wrong" in reply.body
    assert b"died over its answer" in reply.body
    assert b"EngineDeadError" not in reply.body


async def test_a_death_that_says_so_itself_is_seen(path: Path) -> None:
    script = one_by_one(event({"error": {"message": "EngineDeadError"}}), DONE, END)
    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        reply = await b.ask(content=STREAM)
    assert b"died over its answer" in reply.body
    assert b"EngineDeadError" not in reply.body


async def test_the_usage_is_counted_and_left_out(path: Path) -> None:
    script = one_by_one(token("", "stop"), event(LAST), DONE, END)
    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        reply = await b.ask(content=STREAM)
        (account,) = b.accounts.snapshot()
    assert len(reply.events) == 5
    assert b"usage" not in reply.body
    assert (account.tokens_read, account.tokens_written) == (7, 5)


async def test_nothing_is_said_in_the_middle_of_an_event(path: Path) -> None:
    silent = asyncio.Event()

    async def script(asked: Asked) -> None:
        await tell(asked, SSE, token("a"), token("b"), token("c"), chunk(b'data: {"half":'))
        await silent.wait()
        await tell(asked, chunk(b" true}\n\n"), DONE, END)

    pace, limits = Pace(early_head_s=0.01, comment_s=0.01), box.Limits(between_bytes_s=0.8)
    running = box.running({"chat": path}, pace=pace, limits=limits)
    async with Engine(path, script).running(), running as b:
        client = await b.connect()
        client.send(content=STREAM)
        asyncio.get_running_loop().call_later(0.4, silent.set)
        reply = await client.reply()
    assert b'data: {"half": true}\n\n' in reply.body
