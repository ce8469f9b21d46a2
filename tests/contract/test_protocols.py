"""The other protocols: Anthropic's messages, OpenAI's responses, tokens."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import pytest

from tests.contract.subjects import NAME, Client, Server, Stream, question, until

HELLO = [{"role": "user", "content": "One two three"}]
LONG = 1500


async def events(client: Client, path: str, body: dict[str, object]) -> list[tuple[str, dict]]:
    """Named events, each with its data."""
    answer = await client.post(path, {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in answer.text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


# --- Anthropic


def message(tokens: int, **more: object) -> dict[str, object]:
    return {"model": NAME, "max_tokens": tokens, "messages": HELLO, "temperature": 0, **more}


async def test_a_message_has_anthropics_shape(client: Client):
    answer = await client.post("/v1/messages", message(3))
    assert answer.status == 200
    body = answer.json
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", NAME)
    assert body["content"][0]["type"] == "text"
    assert body["stop_reason"] == "max_tokens"
    assert body["usage"]["output_tokens"] == 3


async def test_a_streamed_message_has_anthropics_events(client: Client):
    found = await events(client, "/v1/messages", message(3))
    names = [name for name, _ in found]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert all(data["type"] == name for name, data in found)
    assert found[0][1]["message"]["role"] == "assistant"
    assert found[2][1]["delta"]["type"] == "text_delta"
    assert found[-2][1]["delta"]["stop_reason"] == "max_tokens"
    assert found[-2][1]["usage"]["output_tokens"] == 3


async def test_tokens_of_a_message_are_counted_asleep_too(client: Client):
    body = {"model": NAME, "messages": HELLO}
    awake = await client.post("/v1/messages/count_tokens", body)
    await client.post("/sleep?level=1")
    async with asyncio.timeout(5):
        asleep = await client.post("/v1/messages/count_tokens", body)
    assert awake.json["input_tokens"] == asleep.json["input_tokens"] > 0


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_an_unknown_model_is_404_in_anthropics_shape(client: Client, path: str):
    answer = await client.post(path, message(3, model="nothing"))
    assert (answer.status, answer.json["type"]) == (404, "error")
    assert "does not exist" in answer.json["error"]["message"]


async def test_an_aborted_message_has_no_reason_for_its_end(client: Client):
    whole, stream = await aborted(
        client,
        client.post("/v1/messages", message(LONG)),
        events(client, "/v1/messages", message(LONG)),
    )
    assert whole.json.get("stop_reason") is None
    deltas = [data for name, data in stream if name == "message_delta"]
    assert [each["delta"]["stop_reason"] for each in deltas] == [None]


async def aborted(client: Client, *requests: Coroutine[Any, Any, Any]) -> list[Any]:
    """What they say when a sleep aborts them, some tokens after they began."""
    async with asyncio.TaskGroup() as group, asyncio.timeout(30):
        tasks = [group.create_task(request) for request in requests]
        await until(lambda: client.used_by(len(tasks)))
        clock = Stream(client, question(LONG))
        group.create_task(clock.listen())
        await clock.heard(8)
        assert (await client.post("/sleep?level=1&mode=abort")).status == 200
    return [task.result() for task in tasks]


# --- responses


def ask(tokens: int = 3, **more: object) -> dict[str, object]:
    return {"model": NAME, "input": "One two three", "max_output_tokens": tokens, **more}


async def test_a_response_begins_with_its_id(client: Client):
    answer = await client.post("/v1/responses", ask())
    assert answer.status == 200
    assert answer.text.startswith('{"id":"resp_')
    body = answer.json
    assert (body["object"], body["model"], body["status"]) == ("response", NAME, "incomplete")
    [item] = body["output"]
    assert item["content"][0]["type"] == "output_text"
    assert body["usage"]["output_tokens"] == 3


async def test_a_streamed_response_begins_with_its_id_too(client: Client):
    found = await events(client, "/v1/responses", ask())
    name, first = found[0]
    assert name == first["type"] == "response.created"
    assert next(iter(first)) == "response"
    assert next(iter(first["response"])) == "id"
    name, last = found[-1]
    assert name == "response.completed"
    assert last["response"]["id"] == first["response"]["id"]
    numbers = [data["sequence_number"] for _, data in found]
    assert numbers == list(range(len(found)))
    assert "response.output_text.delta" in {name for name, _ in found}


async def test_a_response_is_kept_and_can_be_gone_on_from(client: Client):
    first = (await client.post("/v1/responses", ask())).json
    again = await client.get(f"/v1/responses/{first['id']}")
    assert again.json["output"] == first["output"]
    more = await client.post("/v1/responses", ask(previous_response_id=first["id"]))
    assert more.json["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    cancelled = await client.post(f"/v1/responses/{first['id']}/cancel")
    assert cancelled.status == 400
    assert "synchronous" in cancelled.json["error"]["message"]


async def test_the_client_may_choose_the_id(client: Client):
    answer = await client.post("/v1/responses", ask(request_id="resp_mine"))
    assert answer.json["id"] == "resp_mine"
    assert (await client.get("/v1/responses/resp_mine")).status == 200


async def test_a_response_that_is_not_there_is_404(client: Client):
    for answer in (
        await client.get("/v1/responses/resp_0"),
        await client.post("/v1/responses/resp_0/cancel"),
        await client.post("/v1/responses", ask(previous_response_id="resp_0")),
    ):
        assert answer.status == 404
        assert answer.json["error"]["param"] == "response_id"


async def test_a_response_in_the_background_is_there_later(client: Client):
    queued = await client.post("/v1/responses", ask(background=True))
    assert queued.json["status"] in ("queued", "in_progress")
    path = f"/v1/responses/{queued.json['id']}"

    async def ended() -> bool:
        return (await client.get(path)).json["status"] not in ("queued", "in_progress")

    await until(ended, deadline_s=20)
    assert (await client.get(path)).json["output"]


async def test_a_response_in_the_background_can_be_cancelled(client: Client):
    queued = (await client.post("/v1/responses", ask(LONG, background=True))).json
    cancelled = await client.post(f"/v1/responses/{queued['id']}/cancel")
    assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
    assert (await client.get(f"/v1/responses/{queued['id']}")).json["status"] == "cancelled"
    again = await client.post(f"/v1/responses/{queued['id']}/cancel")
    assert (again.status, again.json["error"]["param"]) == (400, "response_id")


async def status(client: Client, ident: str) -> str:
    return (await client.get(f"/v1/responses/{ident}")).json["status"]


async def test_a_response_in_the_background_freezes_and_goes_on(client: Client):
    queued = (await client.post("/v1/responses", ask(200, background=True))).json
    await client.post("/sleep?level=1&mode=keep")
    assert await status(client, queued["id"]) == "queued"
    await client.post("/wake_up")

    async def ended() -> bool:
        return await status(client, queued["id"]) == "incomplete"

    await until(ended, deadline_s=20)
    whole = (await client.get(f"/v1/responses/{queued['id']}")).json
    assert whole["usage"]["output_tokens"] == 200


async def test_a_frozen_response_in_the_background_can_be_cancelled(client: Client):
    queued = (await client.post("/v1/responses", ask(LONG, background=True))).json
    await client.post("/sleep?level=1&mode=keep")
    cancelled = await client.post(f"/v1/responses/{queued['id']}/cancel")
    assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
    await client.post("/wake_up")
    assert (await client.post("/v1/responses", ask())).status == 200
    assert await status(client, queued["id"]) == "cancelled"


async def test_a_stream_in_the_background_is_heard_again_from_anywhere(client: Client):
    found = await events(client, "/v1/responses", ask(5, background=True))
    ident = found[0][1]["response"]["id"]
    again = await client.get(f"/v1/responses/{ident}?stream=true&starting_after=2")
    assert again.headers["content-type"].startswith("text/event-stream")
    numbers = re.findall(r'"sequence_number":(\d+)', again.text)
    assert list(map(int, numbers)) == list(range(3, len(found)))


async def test_a_stream_in_the_background_needs_no_client(launch: Callable[..., Server]):
    """On a server of its own: vLLM's /load goes on counting who left it, or was broken off."""
    client = Client(launch())
    first = Stream(client, ask(200, background=True, request_id="resp_left"), "/v1/responses")
    second = Stream(client, ask(LONG, background=True, request_id="resp_never"), "/v1/responses")
    async with asyncio.TaskGroup() as group, asyncio.timeout(30):
        leaving = group.create_task(first.listen_to_names())
        await first.heard(3)
        leaving.cancel()
        assert await status(client, "resp_left") == "queued"
        waiting = group.create_task(second.listen_to_names())
        await second.heard(3)
        assert (await client.post("/v1/responses/resp_never/cancel")).status == 200
        done, _ = await asyncio.wait({waiting}, timeout=1)
        assert not done  # a cancelled stream never ends
        waiting.cancel()
    assert await status(client, "resp_never") == "cancelled"

    async def ended() -> bool:
        return await status(client, "resp_left") == "incomplete"

    await until(ended, deadline_s=20)
    queued = (await client.post("/v1/responses", ask(background=True))).json
    with pytest.raises(aiohttp.ClientPayloadError):  # was no stream
        await client.get(f"/v1/responses/{queued['id']}?stream=true")


async def test_a_response_in_the_background_must_be_stored(client: Client):
    answer = await client.post("/v1/responses", ask(background=True, store=False))
    assert (answer.status, answer.json["error"]["param"]) == (400, "background")


async def test_an_aborted_response_in_the_background_says_that_it_is_complete(client: Client):
    queued = (await client.post("/v1/responses", ask(LONG, background=True))).json
    await aborted(client)

    async def ended() -> bool:
        return await status(client, queued["id"]) == "completed"

    await until(ended, deadline_s=5)


async def test_an_aborted_response_says_that_it_is_complete(client: Client):
    """So whoever aborts must tell the client himself."""
    whole, stream = await aborted(
        client,
        client.post("/v1/responses", ask(LONG)),
        events(client, "/v1/responses", ask(LONG)),
    )
    assert (whole.status, whole.json["status"]) == (200, "completed")
    assert whole.json["usage"]["output_tokens"] < LONG
    name, last = stream[-1]
    assert (name, last["response"]["status"]) == ("response.completed", "completed")


# --- tokens


async def test_tokens_and_texts_turn_into_each_other_asleep_too(client: Client):
    for _ in range(2):
        async with asyncio.timeout(5):
            made = await client.post("/tokenize", {"model": NAME, "prompt": "One two three"})
            back = await client.post("/detokenize", {"model": NAME, "tokens": made.json["tokens"]})
        assert made.json["count"] == len(made.json["tokens"])
        assert "two" in back.json["prompt"]
        await client.post("/sleep?level=1")


@pytest.mark.parametrize("tokens", [None, [-1], "x"])
async def test_what_are_no_tokens_is_400(client: Client, tokens: object):
    answer = await client.post("/detokenize", {"model": NAME, "tokens": tokens})
    assert answer.status == 400
