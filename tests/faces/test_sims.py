"""The whole way through the door to simulated vLLM servers, with an ordinary HTTP client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from homegptd.sim.faults import Fault
from homegptd.sim.options import Options
from homegptd.sim.server import SimServer

from . import box
from .box import CHAT, HELLO, STREAM


@dataclass
class World:
    box: box.Box
    http: aiohttp.ClientSession
    servers: dict[str, SimServer]

    async def chat(self, content: dict[str, object]) -> tuple[int, str]:
        async with self.http.post(self.box.url + CHAT, json=content) as reply:
            return reply.status, await reply.text()


def options(name: str, kind: str = "generate") -> Options:
    more = {"speed": 1000.0, "tokens_per_s": 5, "store_responses": True}
    return Options(model=name, served=(name,), kind=kind, **more)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    paths = {name: tmp_path / f"{name}.sock" for name in ("chat", "embed")}
    chat = SimServer(options("chat"))
    embed = SimServer(options("embed", "embed"))
    async with (
        chat.running(uds=paths["chat"]),
        embed.running(uds=paths["embed"]),
        box.running(paths) as b,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        yield World(b, http, {"chat": chat, "embed": embed})


def said(text: str) -> list[dict[str, object]]:
    events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [{} if event == "[DONE]" else json.loads(event) for event in events]


async def test_a_chat_an_embedding_and_an_error_come_through(world: World) -> None:
    status, text = await world.chat(HELLO)
    assert (status, json.loads(text)["object"]) == (200, "chat.completion")
    content = {"model": "embed", "input": "hello"}
    async with world.http.post(world.box.url + "/v1/embeddings", json=content) as reply:
        assert len((await reply.json())["data"]) == 1
    status, text = await world.chat({"model": "chat", "messages": []})
    assert (status, json.loads(text)["error"]["type"]) == (400, "BadRequestError")


async def test_fifty_streams_end_complete(world: World) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(world.chat(STREAM | {"max_tokens": 20})) for _ in range(50)]
    for task in tasks:
        status, text = task.result()
        assert status == 200
        assert text.endswith("data: [DONE]\n\n")
        assert len(said(text)) == 22  # role, twenty tokens, done
    await world.box.until(lambda: world.box.leases() == 0)


async def test_a_client_that_leaves_ends_its_request_at_the_engine(world: World) -> None:
    content = STREAM | {"max_tokens": 20_000}
    reply = await world.http.post(world.box.url + CHAT, json=content)
    await reply.content.readany()
    engine = world.servers["chat"].engine
    assert engine.running == 1
    reply.close()
    await world.box.until(lambda: engine.running == 0)
    await world.box.until(lambda: world.box.leases() == 0)


async def test_an_engine_that_dies_in_a_stream_is_never_a_complete_answer(world: World) -> None:
    world.servers["chat"].faults.ordered.append(Fault("die", "chat", value=30.0))
    status, text = await world.chat(STREAM | {"max_tokens": 20_000})
    assert status == 200
    assert "error" in said(text)[-1]


async def test_answers_that_a_sleep_aborts_are_errors(world: World) -> None:
    reply = await world.http.post(world.box.url + CHAT, json=STREAM | {"max_tokens": 20_000})
    await reply.content.readany()
    connector = aiohttp.UnixConnector(str(world.servers["chat"].options.uds))
    async with aiohttp.ClientSession(connector=connector) as engine:
        await (await engine.post("http://x/sleep?level=1&mode=abort")).read()
    text = (await reply.read()).decode()
    assert "error" in said(text)[-1]
    assert "[DONE]" not in text


async def test_messages_responses_and_tokens_come_through(world: World) -> None:
    url = world.box.url
    message = {"model": "chat", "max_tokens": 4, "messages": HELLO["messages"]}
    async with world.http.post(f"{url}/v1/messages", json=message) as reply:
        assert (await reply.json())["stop_reason"] == "max_tokens"
    async with world.http.post(f"{url}/v1/messages", json=message | {"stream": True}) as reply:
        assert (await reply.text()).rstrip().endswith('data: {"type":"message_stop"}')
    async with world.http.post(f"{url}/v1/messages/count_tokens", json=message) as reply:
        assert (await reply.json())["input_tokens"] > 0
    async with world.http.post(f"{url}/tokenize", json={"prompt": "hello you"}) as reply:
        tokens = (await reply.json())["tokens"]
    async with world.http.post(f"{url}/detokenize", json={"tokens": tokens}) as reply:
        assert (await reply.json())["prompt"] == "hello you"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_found_by_its_id_and_cancelled(world: World, stream: bool) -> None:
    url, ask = f"{world.box.url}/v1/responses", {"input": "hello", "max_output_tokens": 4}
    long = {"background": True, "max_output_tokens": 20_000}
    async with world.http.post(url, json=ask | {"stream": stream}) as reply:
        text = await reply.text()
    ident = text.partition('"id":"')[2].partition('"')[0]
    async with world.http.get(f"{url}/{ident}") as reply:
        kept = await reply.json()
        assert (kept["id"], kept["status"]) == (ident, "incomplete")
    async with world.http.post(f"{url}/{ident}/cancel") as reply:
        assert reply.status == 400
        assert "synchronous" in await reply.text()
    async with world.http.post(url, json=ask | long) as reply:
        queued = await reply.json()
    async with world.http.post(f"{url}/{queued['id']}/cancel") as reply:
        assert (await reply.json())["status"] == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_in_the_background_holds_its_engine(world: World, stream: bool) -> None:
    url, engine = f"{world.box.url}/v1/responses", world.servers["chat"].engine
    ask = {"input": "hello", "background": True, "stream": stream, "max_output_tokens": 5000}
    async with world.http.post(url, json=ask) as reply:
        text = (await reply.content.readuntil(b"}")).decode()
        ident = text.partition('"id":"')[2].partition('"')[0]
        if not stream:
            await reply.read()
    assert world.box.leases() == 1
    await world.box.until(lambda: world.box.leases() == 0)
    assert engine.running == 0
    async with world.http.get(f"{url}/{ident}") as reply:
        kept = await reply.json()
    assert (kept["status"], kept["usage"]["output_tokens"]) == ("incomplete", 5000)
    [account] = [each for each in world.box.accounts.snapshot() if each.tokens_written]
    assert account.tokens_written == 5000


@pytest.mark.parametrize("stream", ["", "true"])
async def test_sound_becomes_text(tmp_path: Path, stream: str) -> None:
    ears = SimServer(options("ears", "audio"))
    async with (
        ears.running(uds=tmp_path / "ears"),
        box.running({"chat": tmp_path / "chat", "ears": tmp_path / "ears"}) as b,
        aiohttp.ClientSession() as http,
    ):
        form = aiohttp.FormData()
        form.add_field("file", b"\0\1" * 100_000, filename="ä.wav", content_type="audio/wav")
        form.add_field("stream", stream)
        form.add_field("model", "ears")
        async with http.post(b.url + "/v1/audio/transcriptions", data=form) as reply:
            assert reply.status == 200
            text = await reply.text()
    if stream:
        assert text.endswith("data: [DONE]\n\n")
        assert said(text)[0]["model"] == "ears"
    else:
        assert json.loads(text)["usage"] == {"type": "duration", "seconds": 7}
