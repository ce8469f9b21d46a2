"""The SDKs of OpenAI and Anthropic, streaming from a model that has to be brought up first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homegptd.core.commands import Start
from homegptd.core.model import Act, Down
from homegptd.faces.early import Pace
from homegptd.sim.options import Options
from homegptd.sim.server import SimServer
from tests.faces import box
from tests.faces.box import END, SSE, Engine, chunk, saying

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

QUICK = Pace(early_head_s=0.01, comment_s=0.01, status_s=0.01)
WEBUI = {"X-HomeGPT-Client": "open-webui"}
ASKED: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}


class Slow:
    """A box whose model is up 0.15 s after somebody waits for it, and what it heard."""

    def __init__(self, b: box.Box) -> None:
        self.box = b

    def openai(self, **more: Any) -> Any:
        return openai.AsyncOpenAI(base_url=f"{self.box.url}/v1", api_key="x", max_retries=0, **more)

    def anthropic(self) -> Any:
        return anthropic.AsyncAnthropic(base_url=self.box.url, api_key="x", max_retries=0)

    async def fails(self) -> None:
        """As soon as somebody waits, and has heard so: nobody gets this model any more."""
        await self.box.until(lambda: len(self.box.scheduler.state.waiting) == 1)
        await asyncio.sleep(0.05)
        self.box.desk.begin(Act.STOP, "chat", by="test")


@asynccontextmanager
async def slow(path: Path, *, start_s: float = 0.15) -> AsyncIterator[Slow]:
    phases = {"chat": Down(asyncio.get_running_loop().time())}
    timings = {"start": 1.0}
    async with box.running({"chat": path}, phases=phases, pace=QUICK, timings=timings) as b:

        async def start(model: str) -> None:
            await asyncio.sleep(start_s)

        b.hands.on_start = start
        yield Slow(b)


@pytest.fixture
async def sim(tmp_path: Path) -> AsyncIterator[Slow]:
    """An engine that speaks chat and completions."""
    options = Options(model="chat", served=("chat",), speed=1000.0, tokens_per_s=5)
    path = tmp_path / "chat.sock"
    async with SimServer(options).running(uds=path), slow(path) as s:
        yield s


def events(*found: tuple[str, dict[str, Any]]) -> bytes:
    lines = (f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in found)
    return b"".join(chunk(line.encode()) for line in lines)


async def listen(stream: Any, heard: list[Any]) -> None:
    """What comes before an error counts, too."""
    async for each in stream:
        heard.append(each)  # noqa: PERF401  # an error must not lose what came


# ---------------------------------------------------------------- OpenAI


@pytest.mark.parametrize("headers", [{}, WEBUI], ids=["plain", "with status events"])
async def test_chat_chunks_add_up_to_what_was_said(sim: Slow, headers: dict[str, str]) -> None:
    async with sim.openai(default_headers=headers) as client:
        whole = await client.chat.completions.create(**ASKED, max_tokens=20)
        sim.box.died("chat")
        stream = await client.chat.completions.create(**ASKED, max_tokens=20, stream=True)
        chunks = [each async for each in stream]
    assert chunks[0].id == "chatcmpl-homegpt"
    said = [each.choices[0].delta.content or "" for each in chunks if each.choices]
    assert "".join(said) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    told = [each for each in chunks if not each.choices]
    assert bool(told) == bool(headers)


async def test_the_accumulator_of_the_sdk_is_not_confused(sim: Slow) -> None:
    async with sim.openai() as client:
        async with client.chat.completions.stream(**ASKED) as stream:
            final = await stream.get_final_completion()
        whole = await client.chat.completions.create(**ASKED)
    message = final.choices[0].message
    assert (message.role, message.content) == ("assistant", whole.choices[0].message.content)


async def test_text_completions_add_up_too(sim: Slow) -> None:
    asked = {"model": "chat", "prompt": "Roses are", "max_tokens": 12}
    async with sim.openai() as client:
        stream = await client.completions.create(**asked, stream=True)
        said = "".join([each.choices[0].text async for each in stream])
        assert said == (await client.completions.create(**asked)).choices[0].text


async def test_a_wake_that_fails_is_raised(sim: Slow) -> None:
    async with sim.openai() as client, asyncio.TaskGroup() as group:
        group.create_task(sim.fails())
        sim.box.hands.on_start = lambda model: asyncio.Event().wait()
        stream = await client.chat.completions.create(**ASKED, stream=True)
        said: list[Any] = []
        with pytest.raises(openai.APIError, match='"chat" is being stopped'):
            await listen(stream, said)
    assert {each.choices[0].delta.content for each in said} == {""}


async def test_what_vllm_refuses_is_raised_in_its_words(sim: Slow) -> None:
    asked = ASKED | {"messages": [], "stream": True}
    async with sim.openai() as client:
        stream = await client.chat.completions.create(**asked)  # the head was out by then
        with pytest.raises(openai.APIError) as early:
            _ = [each async for each in stream]
        with pytest.raises(openai.BadRequestError) as late:
            await client.chat.completions.create(**asked)
    assert early.value.message in late.value.message
    assert (early.value.type, early.value.code) == ("BadRequestError", "400")


async def test_a_stream_that_is_closed_ends_at_the_engine(sim: Slow) -> None:
    async with sim.openai() as client:
        stream = await client.chat.completions.create(**ASKED, max_tokens=20_000, stream=True)
        async for each in stream:
            if each.choices[0].delta.content:
                break
        assert sim.box.leases() == 1
        await stream.close()
        await sim.box.until(lambda: sim.box.leases() == 0)


async def test_a_call_that_cannot_wait_is_made_again_in_time(tmp_path: Path) -> None:
    """The SDK waits for 0.5 s; it is refused just before, and told to come back when it is up."""
    options = Options(model="chat", served=("chat",), speed=1000.0, tokens_per_s=5)
    path = tmp_path / "chat.sock"
    async with SimServer(options).running(uds=path), slow(path, start_s=0.8) as s:
        url = f"{s.box.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=1, timeout=0.5) as c:
            answer = await c.chat.completions.create(**ASKED, max_tokens=5)
    assert answer.choices[0].message.content
    assert sum(isinstance(each, Start) for each in s.box.hands.given) == 1


async def test_responses_stream_after_comments(tmp_path: Path) -> None:
    done = {"id": "r1", "object": "response", "output": [], "status": "completed", "model": "chat"}
    said = events(
        ("response.created", {"type": "response.created", "response": done}),
        ("response.output_text.delta",
         {"type": "response.output_text.delta", "delta": "hi", "item_id": "i"}),
        ("response.completed", {"type": "response.completed", "response": done}),
    )  # fmt: skip
    path = tmp_path / "chat"
    engine = Engine(path, saying(SSE, said, END))
    async with engine.running(), slow(path) as s, s.openai() as client:
        stream = await client.responses.create(model="chat", input="hello", stream=True)
        kinds = [each.type async for each in stream]
        assert kinds == [
            "response.created", "response.output_text.delta", "response.completed",
        ]  # fmt: skip
        s.box.died("chat")
        s.box.hands.on_start = lambda model: asyncio.Event().wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(s.fails())
            broken = await client.responses.create(model="chat", input="hello", stream=True)
            with pytest.raises(openai.APIError):
                _ = [each async for each in broken]


# ---------------------------------------------------------------- Anthropic

CLAUDE = events(
    ("message_start", {"type": "message_start", "message": {
        "id": "m1", "type": "message", "role": "assistant", "model": "chat", "content": [],
        "stop_reason": None, "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 0}}}),
    ("content_block_start", {"type": "content_block_start", "index": 0,
                             "content_block": {"type": "text", "text": ""}}),
    ("content_block_delta", {"type": "content_block_delta", "index": 0,
                             "delta": {"type": "text_delta", "text": "hi"}}),
    ("content_block_stop", {"type": "content_block_stop", "index": 0}),
    ("message_delta", {"type": "message_delta",
                       "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                       "usage": {"output_tokens": 1}}),
    ("message_stop", {"type": "message_stop"}),
)  # fmt: skip


@pytest.fixture
async def claude(tmp_path: Path) -> AsyncIterator[Slow]:
    path = tmp_path / "chat"
    async with Engine(path, saying(SSE, CLAUDE, END)).running(), slow(path) as s:
        yield s


async def test_messages_stream_after_pings(claude: Slow) -> None:
    async with claude.anthropic() as client:
        async with client.messages.stream(**ASKED, max_tokens=9) as stream:
            final = await stream.get_final_message()
        assert (final.role, final.content[0].text, final.stop_reason) == (
            "assistant", "hi", "end_turn",
        )  # fmt: skip


async def test_messages_raise_when_the_wake_fails(claude: Slow) -> None:
    async with claude.anthropic() as client, asyncio.TaskGroup() as group:
        group.create_task(claude.fails())
        claude.box.hands.on_start = lambda model: asyncio.Event().wait()
        stream = await client.messages.create(**ASKED, max_tokens=9, stream=True)
        with pytest.raises(anthropic.APIError, match="is being stopped"):
            _ = [each async for each in stream]
