"""The anthropic SDK for Python: Claude Code and its kin speak this way."""

import asyncio
import time
from collections.abc import AsyncIterator

import anthropic
import pytest
from anthropic import AsyncAnthropic

from .asking import CITY, WEATHER, awake, nothing_runs, phase, says, something_runs
from .conftest import Served

GREEDY = {"temperature": 0}  # this SDK has no word for it
ASK = [{"role": "user", "content": "Tell me something about rivers."}]
TOOL = {
    "name": WEATHER["name"],
    "description": WEATHER["description"],
    "input_schema": CITY,
    "strict": True,
}


@pytest.fixture
async def client(served: Served) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=served.box.url, api_key="sk-anything") as client:
        yield client


async def ask(client: AsyncAnthropic, model: str, content: str = "Tell me something.") -> str:
    answer = await client.messages.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=24,
        extra_body=GREEDY,
    )
    assert answer.model == model
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 24
    return answer.content[0].text


async def test_each_model_answers_by_its_name(client: AsyncAnthropic, served: Served) -> None:
    for model in (*served.models, *served.models):
        assert says(served, model, await ask(client, model))


async def test_a_stream_says_what_a_whole_answer_says(
    client: AsyncAnthropic, served: Served
) -> None:
    """From a model that sleeps: what a client hears until then must not disturb the SDK."""
    for model in served.models:
        whole = await ask(client, model, "the same")
        await awake(served, "a" if model != "a" else "b")
        async with client.messages.stream(
            model=model, messages=[{"role": "user", "content": "the same"}], max_tokens=24,
            extra_body=GREEDY,
        ) as stream:  # fmt: skip
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == whole == final.content[0].text
        assert final.stop_reason == "max_tokens"
        assert final.usage.output_tokens == 24


async def test_leaving_a_stream_ends_it_in_the_engine(
    client: AsyncAnthropic, served: Served
) -> None:
    await awake(served, "a")
    began = 0.0
    async with client.messages.stream(
        model="a", messages=ASK, max_tokens=1900, extra_body=GREEDY
    ) as stream:
        async for _ in stream.text_stream:
            if served.is_sim:  # a real one may say its last word before it is asked
                await something_runs(served, "a")
            began = time.monotonic()
            break
    await nothing_runs(served, "a")
    assert time.monotonic() - began < 3.0


async def call_of(client: AsyncAnthropic, choice: dict[str, str], *, stream: bool) -> None:
    asked = {
        "model": "a", "messages": ASK, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200,
    }  # fmt: skip
    if stream:
        async with client.messages.stream(**asked) as running:
            answer = await running.get_final_message()
    else:
        answer = await client.messages.create(**asked)
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    assert (use.name, set(use.input)) == ("weather", set(CITY["required"]))
    assert answer.stop_reason == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called_by_name(
    client: AsyncAnthropic, served: Served, stream: bool
) -> None:
    await call_of(client, {"type": "tool", "name": "weather"}, stream=stream)


@pytest.mark.parametrize("served", ["sim"], indirect=True)  # random weights never come to a call
@pytest.mark.parametrize("stream", [False, True])
async def test_any_tool_is_called(client: AsyncAnthropic, served: Served, stream: bool) -> None:
    await call_of(client, {"type": "any"}, stream=stream)


async def test_twenty_at_once_over_all_models(client: AsyncAnthropic, served: Served) -> None:
    models = [served.models[i % len(served.models)] for i in range(20)]
    alone = {model: await ask(client, model, "question") for model in served.models}

    async def one(number: int, model: str) -> None:
        if number % 2:
            assert await ask(client, model, "question") == alone[model]
            return
        async with client.messages.stream(
            model=model, messages=[{"role": "user", "content": "question"}], max_tokens=24,
            extra_body=GREEDY,
        ) as stream:  # fmt: skip
            assert "".join([piece async for piece in stream.text_stream]) == alone[model]

    await asyncio.gather(*(one(number, model) for number, model in enumerate(models)))


async def test_counting_tokens_wakes_nobody(client: AsyncAnthropic, served: Served) -> None:
    """Claude Code counts before it asks."""
    await awake(served, "a")
    counted = await client.messages.count_tokens(model="a", messages=ASK)
    assert counted.input_tokens > 3
    with pytest.raises(anthropic.ConflictError, match="homegptctl switch b"):
        await client.with_options(max_retries=0).messages.count_tokens(model="b", messages=ASK)
    assert await phase(served, "a") == "awake"
    assert await phase(served, "b") == "asleep"


async def test_a_wrong_model_is_told_at_once_and_not_retried(
    client: AsyncAnthropic, served: Served
) -> None:
    began = time.monotonic()
    with pytest.raises(anthropic.NotFoundError, match="did you mean a"):
        await ask(client, "aa")
    assert time.monotonic() - began < 2.0


async def test_a_bad_request_is_the_models_own_word(client: AsyncAnthropic, served: Served) -> None:
    with pytest.raises(anthropic.BadRequestError, match="cannot be greater than max_model_len"):
        await client.messages.create(model="a", messages=ASK, max_tokens=1_000_000, timeout=30.0)
