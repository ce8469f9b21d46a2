"""Restarts of the daemon, ridden out by the SDKs' own retries: no code of the user's."""

import asyncio
from typing import Any

import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.contract.subjects import until
from tests.e2e.client import call, until_running
from tests.e2e.harness import Box

from .conftest import configure_sim

ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me something."}],
    "max_tokens": 20,
}


async def test_what_waits_over_a_stop_is_answered_by_the_next_daemon(box: Box) -> None:
    """Told to come again in so many seconds, the SDKs do. With this backend nobody keeps the
    sockets over a restart, so that a connection may be refused too: hence more tries than two."""
    configure_sim(box, "a", "b")
    openai_client = AsyncOpenAI(base_url=f"{box.url}/v1", api_key="x", max_retries=8)
    anthropic_client = AsyncAnthropic(base_url=box.url, api_key="x", max_retries=8)
    async with openai_client, anthropic_client, asyncio.TaskGroup() as group:
        with box.daemon() as daemon:
            daemon.ready()
            # b must wait for a's long answer, and the stop comes before its turn
            long = group.create_task(long_answer(openai_client))
            await until_running(box)
            ask_b = {"model": "b", **ASK}
            one = group.create_task(openai_client.chat.completions.create(**ask_b))
            two = group.create_task(anthropic_client.messages.create(**ask_b))
            await until_waiting(box, 2)
            daemon.process.terminate()
            await asyncio.to_thread(daemon.process.wait, 30)
        with box.daemon() as again:
            await asyncio.to_thread(again.ready, 30.0)
            answered = await one
            assert (answered.choices[0].message.content or "").startswith("This is b:")
            assert (await two).content[0].text.startswith("This is b:")
    assert len(long.result().split()) == 300


async def test_kill_9_is_one_more_retry(box: Box) -> None:
    configure_sim(box, "a")
    client = AsyncOpenAI(base_url=f"{box.url}/v1", api_key="x", max_retries=8)
    async with client, asyncio.TaskGroup() as group:
        with box.daemon() as daemon:
            daemon.ready()
            asked = group.create_task(
                client.chat.completions.with_raw_response.create(
                    model="a", extra_body={"sim_tokens_per_s": 0.1}, **ASK
                )
            )
            await until_running(box)
            daemon.sweep = False
            daemon.kill()
        with box.daemon() as again:
            await asyncio.to_thread(again.ready, 30.0)
            raw = await asked
            answer = raw.parse()
            assert (answer.choices[0].message.content or "").startswith("This is a:")
            assert raw.retries_taken > 0


async def test_a_stream_that_breaks_is_an_error_and_not_an_end(box: Box) -> None:
    configure_sim(box, "a")
    async with AsyncOpenAI(base_url=f"{box.url}/v1", api_key="x") as client:
        with box.daemon() as daemon:
            daemon.ready()
            stream = await client.chat.completions.create(model="a", stream=True, **ASK)
            await anext(aiter(stream))
            daemon.kill()
            with pytest.raises(openai.APIConnectionError):
                async for _ in stream:
                    pass


async def long_answer(client: AsyncOpenAI) -> str:
    stream = await client.chat.completions.create(
        model="a", messages=ASK["messages"], max_tokens=300, stream=True
    )
    return "".join([c.choices[0].delta.content or "" async for c in stream])


async def until_waiting(box: Box, number: int) -> None:
    async def so_many() -> bool:
        views = (await call(box, "status"))["models"]
        return sum(view["requests"]["waiting"] for view in views) == number

    await until(so_many, deadline_s=10.0)
