"""The openai SDK for Python, as its users use it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from homegptd.sim.text import vector

from .asking import CITY, WEATHER, awake, nothing_runs, phase, says, something_runs
from .conftest import Served

ASK = [{"role": "user", "content": "Tell me something about rivers."}]
TOOL = {"type": "function", "function": WEATHER}


@pytest.fixture
async def client(served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=served.v1, api_key="sk-anything") as client:
        yield client


async def ask(client: AsyncOpenAI, model: str, content: str = "Tell me something.") -> str:
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=24, temperature=0
    )
    assert answer.model == model
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    return answer.choices[0].message.content or ""


async def test_the_models_are_listed_whatever_they_do(client: AsyncOpenAI, served: Served) -> None:
    listed = [model.id async for model in client.models.list()]
    assert set(served.models) <= set(listed)
    assert (await client.models.retrieve(listed[0])).id == listed[0]


async def test_each_model_answers_by_its_name(client: AsyncOpenAI, served: Served) -> None:
    for model in (*served.models, *served.models):
        assert says(served, model, await ask(client, model))


async def test_a_stream_says_what_a_whole_answer_says(client: AsyncOpenAI, served: Served) -> None:
    for model in served.models:
        whole = await ask(client, model, "the same")
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "the same"}], max_tokens=24,
            temperature=0, stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        text, finish, usage = "", None, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        assert (text, finish) == (whole, "length")
        assert usage is not None
        assert usage.completion_tokens == 24


async def test_the_helper_that_gathers_a_stream(client: AsyncOpenAI, served: Served) -> None:
    """It is the strictest of the SDK's readers: it builds the message from the deltas."""
    sleeper = "b" if await phase(served, "a") == "awake" else "a"
    async with client.chat.completions.stream(
        model=sleeper, messages=ASK, max_tokens=12, temperature=0
    ) as stream:
        with pytest.raises(openai.LengthFinishReasonError) as ended:
            await stream.get_final_completion()
    message = ended.value.completion.choices[0].message
    assert message.role == "assistant"
    assert says(served, sleeper, message.content or "")


async def test_completions_too(client: AsyncOpenAI, served: Served) -> None:
    answer = await client.completions.create(
        model="b", prompt="Once upon a time", max_tokens=8, temperature=0
    )
    assert answer.choices[0].finish_reason == "length"
    assert says(served, "b", answer.choices[0].text.strip())


async def test_leaving_a_stream_ends_it_in_the_engine(client: AsyncOpenAI, served: Served) -> None:
    await awake(served, "a")
    stream = await client.chat.completions.create(
        model="a",
        messages=ASK,
        max_tokens=1900,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await something_runs(served, "a")
    began = time.monotonic()
    await stream.close()
    await nothing_runs(served, "a")
    assert time.monotonic() - began < 3.0


async def test_giving_up_an_unstreamed_answer_ends_it_too(
    client: AsyncOpenAI, served: Served
) -> None:
    await awake(served, "a")
    patient = client.with_options(timeout=0.3, max_retries=0)
    with pytest.raises(openai.APITimeoutError):
        await patient.chat.completions.create(
            model="a", messages=ASK, max_tokens=1900, temperature=0, extra_body=slow(served)
        )
    await nothing_runs(served, "a")


def slow(served: Served) -> dict[str, object]:
    return {"sim_tokens_per_s": 0.5} if served.is_sim else {"ignore_eos": True}


async def call_of(client: AsyncOpenAI, choice: object, *, stream: bool) -> None:
    asked = {
        "model": "a", "messages": ASK, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200,
    }  # fmt: skip
    if stream:
        async with client.chat.completions.stream(**asked) as running:
            answer = await running.get_final_completion()
    else:
        answer = await client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == set(CITY["required"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called_by_name(client: AsyncOpenAI, served: Served, stream: bool) -> None:
    await call_of(client, {"type": "function", "function": {"name": "weather"}}, stream=stream)


@pytest.mark.parametrize("served", ["sim"], indirect=True)  # random weights never come to a call
@pytest.mark.parametrize("stream", [False, True])
async def test_some_tool_is_called(client: AsyncOpenAI, served: Served, stream: bool) -> None:
    await call_of(client, "required", stream=stream)


async def test_tools_do_no_harm_where_none_is_wanted(client: AsyncOpenAI, served: Served) -> None:
    """As every chat of Open WebUI: `auto`, and dozens of tools."""
    tools = [{"type": "function", "function": WEATHER | {"name": f"tool_{i}"}} for i in range(36)]
    answer = await client.chat.completions.create(
        model="b", messages=ASK, tools=tools, max_tokens=16, temperature=0
    )
    assert says(served, "b", answer.choices[0].message.content or "")


async def test_twenty_at_once_over_all_models(client: AsyncOpenAI, served: Served) -> None:
    """Half of them streams; each gets its own answer, from the model it named."""
    models = [served.models[i % len(served.models)] for i in range(20)]
    alone = {
        (model, i % 4): await ask(client, model, f"question {i % 4}")
        for model in served.models for i in range(4)
    }  # fmt: skip

    async def one(number: int, model: str) -> None:
        content = f"question {number % 4}"
        if number % 2:
            assert await ask(client, model, content) == alone[model, number % 4]
            return
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], max_tokens=24,
            temperature=0, stream=True,
        )  # fmt: skip
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
        assert text == alone[model, number % 4]

    await asyncio.gather(*(one(number, model) for number, model in enumerate(models)))


async def test_a_wrong_model_is_told_at_once_and_not_retried(
    client: AsyncOpenAI, served: Served
) -> None:
    began = time.monotonic()
    with pytest.raises(openai.NotFoundError) as wrong:
        await ask(client, "aa")
    assert wrong.value.code == "model_not_found"
    assert "did you mean a" in wrong.value.message
    assert time.monotonic() - began < 2.0


async def test_a_bad_request_is_the_models_own_word(client: AsyncOpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be greater than max_model_len"):
        await client.chat.completions.create(model="a", messages=ASK, max_tokens=10_000_000)


async def test_embeddings(client: AsyncOpenAI, served: Served) -> None:
    """The SDK asks for base64 by itself."""
    if not served.is_sim:
        with pytest.raises(openai.APIStatusError):
            await client.embeddings.create(model="a", input="hello")
        return
    answer = await client.embeddings.create(model="embed", input=["hello", "world"])
    for row, text in zip(answer.data, ["hello", "world"], strict=True):
        assert row.embedding == pytest.approx(vector("embed", text), abs=1e-6)
