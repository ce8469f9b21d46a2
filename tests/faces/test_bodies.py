"""Bodies that are held: within bounds, on disk where they are big, and always whole."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from homegptd.faces.bodies import Bodies

from . import box
from .box import HELLO, Asked, Engine, answer, dying_after, in_turn, saying

MIB = 1 << 20


def little_memory(most: int = 256 * MIB, at: Path | None = None) -> Bodies:
    """What is over 256 KiB goes to disk."""
    return Bodies(most, in_memory=0, directory=at)


async def digest(asked: Asked) -> None:
    said = {
        "sha": hashlib.sha256(asked.body).hexdigest(),
        "by": asked.writer.get_extra_info("sockname"),
    }
    asked.writer.write(answer(said))


def sha(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def big(size: int = 3 * MIB, **more: Any) -> dict[str, Any]:
    """The model's name is last; other words "model" are nearer."""
    image = os.urandom(size // 2).hex()
    tools = [{"function": {"parameters": {"properties": {"model": {"enum": ["chat"]}}}}}]
    return {"messages": [{"content": image}], "tools": tools, **more}


async def test_a_body_on_disk_reaches_the_model_it_names_last(tmp_path: Path) -> None:
    bodies = little_memory(at=tmp_path)
    one, other = Engine(tmp_path / "chat", digest), Engine(tmp_path / "coder", digest)
    paths = {"chat": one.path, "coder": other.path}
    async with one.running(), other.running(), box.running(paths, bodies=bodies) as b:
        client = await b.connect()
        for model in ("coder", "chat", "coder"):
            content = big(model=model)
            reply = (await client.ask(content=content)).json
            assert reply["by"].endswith(model)
            assert reply["sha"] == sha(content)
        await b.until(lambda: not bodies.held)
        assert bodies.held_in_memory == 0
        assert one.connections == other.connections == 1  # and it can be kept


async def test_a_body_on_disk_that_names_no_model_gets_the_default(tmp_path: Path) -> None:
    async def echo(asked: Asked) -> None:
        content = asked.json
        model = content.pop("model")
        asked.writer.write(answer({"model": model, "sha": sha(content)}))

    path = tmp_path / "chat"
    async with (
        Engine(path, echo).running(),
        box.running({"chat": path}, bodies=little_memory()) as b,
    ):
        content = big()
        assert (await b.ask(content=content)).json == {"model": "chat", "sha": sha(content)}


async def test_100_mb_go_through_little_memory(tmp_path: Path) -> None:
    """The engine's half of the test reads in pieces, too: what remains in memory is ours."""
    size, took = 100 * MIB, hashlib.sha256()
    bodies = Bodies(128 * MIB, directory=tmp_path)
    peak = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        left = int(head.lower().partition("content-length: ")[2].partition("\r")[0])
        while left:
            piece = await reader.read(min(left, MIB))
            took.update(piece)
            left -= len(piece)
        writer.write(answer({"ok": True}))
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, str(tmp_path / "chat"))
    async with server, box.running(
        {"chat": tmp_path / "chat"}, bodies=bodies, max_body_bytes=128 * MIB
    ) as b:  # fmt: skip
        client, sent = await b.connect(), hashlib.sha256()
        start, end = b'{"messages": [{"content": "', b'"}], "model": "chat"}'
        pieces = [start, *[b"x" * MIB] * 100, end]
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (size + len(start) + len(end))
        )
        for piece in pieces:
            sent.update(piece)
            client.writer.write(piece)
            await client.writer.drain()
            peak = max(peak, bodies.held_in_memory)
        assert (await client.reply()).json == {"ok": True}
    assert took.digest() == sent.digest()
    assert peak <= 17 * MIB


async def test_a_body_on_disk_is_sent_again_whole(tmp_path: Path) -> None:
    path = tmp_path / "chat"
    async with (
        Engine(path, in_turn(dying_after(), digest)).running() as engine,
        box.running({"chat": path}, bodies=little_memory(), notice_s=0.0) as b,
    ):
        content = big(model="chat")
        assert (await b.ask(content=content)).json["sha"] == sha(content)
        assert len(engine.asked) == 2


async def test_a_body_on_disk_outlives_a_connection_that_was_idle_too_long(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        if asked.number == 1:
            asked.writer.write(answer({}))
            asked.writer.close()
        else:
            await digest(asked)

    path = tmp_path / "chat"
    async with (
        Engine(path, script).running(),
        box.running({"chat": path}, bodies=little_memory()) as b,
    ):
        assert (await b.ask(content=HELLO)).status == 200
        content = big(model="chat")
        assert (await b.ask(content=content)).json["sha"] == sha(content)


async def test_an_answer_that_comes_before_the_whole_body_is_relayed(tmp_path: Path) -> None:
    """As vLLM's server refuses what is too large. The rest of the body follows nowhere."""
    refusal = answer({"error": {"message": "too large"}}, "413 Payload Too Large")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refusal)
        with suppress(ConnectionError):
            await reader.read()  # until the other end gives up
        writer.close()

    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_unix_server(serve, str(tmp_path / "chat"), limit=1000)
    async with server, box.running({"chat": tmp_path / "chat"}, bodies=little_memory()) as b:
        client = await b.connect()
        for _ in range(2):
            reply = await client.ask(content=big(20 * MIB, model="chat"))
            assert (reply.status, reply.error["message"]) == (413, "too large")
    assert len(connections) == 2  # the first one was of no more use


async def test_what_does_not_fit_any_more_is_refused_with_a_time(tmp_path: Path) -> None:
    go, bodies = asyncio.Event(), little_memory(4 * MIB)

    async def slow(asked: Asked) -> None:
        await go.wait()
        await digest(asked)

    path = tmp_path / "chat"
    async with Engine(path, slow).running(), box.running({"chat": path}, bodies=bodies) as b:
        first, second = await b.connect(), await b.connect()
        first.send(content=big(model="chat"))
        await b.until(lambda: b.leases() == 1)
        second.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        second.writer.write(box.chunk(b"x" * 2 * MIB))  # its length is not known beforehand
        reply = await second.reply()
        assert (reply.status, reply.error["code"]) == (503, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        go.set()
        assert (await first.reply()).status == 200
        await b.until(lambda: not bodies.held)


async def test_small_bodies_stay_in_memory_beside_big_ones(tmp_path: Path) -> None:
    bodies = little_memory(at=tmp_path / "nowhere")  # any file would fail
    path = tmp_path / "chat"
    async with (
        Engine(path, saying(answer({}))).running(),
        box.running({"chat": path}, bodies=bodies) as b,
    ):
        assert (await b.ask(content=big(200_000, model="chat"))).status == 200
        failed = await b.ask(content=big(model="chat"))
        assert (failed.status, failed.error["code"]) == (503, "queue_full")
        assert os.strerror(errno.ENOENT) in failed.error["message"]
        assert (await b.ask(content=HELLO)).status == 200
        await b.until(lambda: not bodies.held)


async def test_a_client_that_leaves_in_the_middle_of_a_big_body_leaves_nothing(
    tmp_path: Path,
) -> None:
    bodies = little_memory()
    async with box.running({"chat": tmp_path / "chat"}, bodies=bodies) as b:
        client = await b.connect()
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 9000000\r\n\r\n" + b"x" * 3 * MIB
        )
        await client.writer.drain()
        await b.until(lambda: bodies.held >= 2 * MIB)
        client.hang_up()
        await b.until(lambda: not bodies.held)
        assert bodies.held_in_memory == 0


@pytest.mark.parametrize(
    "check",
    [
        test_a_body_on_disk_reaches_the_model_it_names_last,
        test_a_body_on_disk_is_sent_again_whole,
        test_an_answer_that_comes_before_the_whole_body_is_relayed,
    ],
)
def test_the_same_holds_on_uvloop(tmp_path: Path, check) -> None:  # type: ignore[no-untyped-def]
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check(tmp_path))


def test_a_small_one_has_room_beside_all_others_or_none() -> None:
    bodies = Bodies(10, in_memory=8)
    bodies.held_on_disk = 3
    assert not bodies.take(8)  # of all
    assert bodies.take(7)
    bodies.give_back(7)
    bodies.held_on_disk = 0
    assert not bodies.take(9)  # of memory
    assert bodies.take(8)
    assert bodies.held == bodies.held_in_memory == 8
