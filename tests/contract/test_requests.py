"""Inference: shapes, errors, and what sleep does to requests."""

import asyncio
import json

import pytest

from tests.contract.subjects import (
    KEEP_ALIVE_S,
    MAX_QUEUED,
    NAME,
    Client,
    Stream,
    question,
    until,
)

SILENCE_S = 0.4
"""Long enough for an answer that comes at all: 8 tokens take 20 ms at either subject."""
LONG = 1500
"""Tokens of an answer that is still going on whenever a test looks (3 s and more)."""


# --- shapes


async def test_a_completion_has_openais_shape(client: Client):
    answer = await client.complete(5)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json
    assert (body["object"], body["model"]) == ("text_completion", NAME)
    assert body["id"].startswith("cmpl-")
    [choice] = body["choices"]
    assert choice["text"]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "length", None)
    usage = body["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5


async def test_a_chat_completion_has_openais_shape(client: Client):
    body = chat(5)
    answer = await client.post("/v1/chat/completions", body)
    assert answer.status == 200
    assert (answer.json["object"], answer.json["model"]) == ("chat.completion", NAME)
    assert answer.json["id"].startswith("chatcmpl-")
    [choice] = answer.json["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert answer.json["usage"]["completion_tokens"] == 5


async def test_a_greedy_answer_is_always_the_same(client: Client):
    said = {(await client.complete(40)).json["choices"][0]["text"] for _ in range(3)}
    assert len(said) == 1


async def test_another_prompt_gets_another_answer(client: Client):
    a, b = [await client.complete(20, prompt) for prompt in ("One two three", "Four five six")]
    assert a.json["choices"][0]["text"] != b.json["choices"][0]["text"]


async def test_a_streamed_completion_is_one_event_a_token_and_a_done(client: Client):
    whole = (await client.complete(6)).json["choices"][0]["text"]
    stream = await Stream(client, question(6)).listen()
    assert stream.status == 200
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.done
    assert len(stream.events) == 6
    assert stream.text == whole
    reasons = [e["choices"][0]["finish_reason"] for e in stream.events]
    assert reasons == [None] * 5 + ["length"]  # in the event of the last token, not after it
    assert {e["object"] for e in stream.events} == {"text_completion"}
    assert len({e["id"] for e in stream.events}) == 1


async def test_a_streamed_chat_opens_with_the_role(client: Client):
    stream = await Stream(client, chat(4), "/v1/chat/completions").listen()
    assert stream.done
    assert len(stream.events) == 5
    deltas = [e["choices"][0]["delta"] for e in stream.events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:])
    assert stream.finish == "length"
    assert stream.events[-1]["choices"][0]["finish_reason"] == "length"
    assert {e["object"] for e in stream.events} == {"chat.completion.chunk"}


async def test_each_event_is_a_chunk_that_ends_with_its_reason(client: Client):
    """The relay looks at how an event ends, and at no more (homegptd/faces/cuts.py, `going_on`)."""
    two = question(4) | {"prompt": ["One two three", "Four five six"]}
    asked = {"/v1/completions": (two, {0, 1}), "/v1/chat/completions": (chat(4), {0})}
    for path, (body, indexes) in asked.items():
        pieces = [b""]
        post = {"url": path, "json": body | {"stream": True}}
        async with client.session() as session, session.post(**post) as answer:
            assert answer.status == 200, await answer.text()
            async for data, ended in answer.content.iter_chunks():
                pieces[-1] += data
                if ended:
                    pieces.append(b"")
        *events, done = filter(None, pieces)
        assert done == b"data: [DONE]\n\n"
        reasons = set()
        for event in events:
            assert event.startswith(b"data: {")
            assert event.count(b"\n") == 2
            assert b'"usage"' not in event
            [choice] = json.loads(event[6:])["choices"]
            end = event.rpartition(b'"finish_reason":')[2]
            assert end.startswith(json.dumps(choice["finish_reason"]).encode())
            reasons.add((choice["index"], choice["finish_reason"]))
        assert reasons == {(index, reason) for index in indexes for reason in (None, "length")}


async def test_usage_comes_in_an_event_of_its_own_when_asked_for(client: Client):
    body = question(3, stream_options={"include_usage": True})
    stream = await Stream(client, body).listen()
    assert stream.events[-1]["choices"] == []
    assert stream.events[-1]["usage"]["completion_tokens"] == 3
    assert len(stream.events) == 4


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: Client):
    whole = (await client.complete(30)).json["choices"][0]["text"]
    stop = whole[20:26]
    choice = (await client.complete(30, stop=stop)).json["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == whole[: whole.index(stop)]


async def test_prompt_logprobs_give_the_token_first_and_the_likeliest_after_it(client: Client):
    answer = await client.complete(1, "One two three", prompt_logprobs=1)
    rows = answer.json["choices"][0]["prompt_logprobs"]
    assert rows[0] is None
    assert len(rows) == answer.json["usage"]["prompt_tokens"]
    for row in rows[1:]:
        said, *others = row.values()
        assert set(said) == {"logprob", "rank", "decoded_token"}
        assert said["logprob"] < 0
        assert [other["rank"] for other in others] == ([] if said["rank"] == 1 else [1])


async def test_the_models_own_words_are_the_likeliest(client: Client):
    ids = question(12, return_token_ids=True)
    told = (await client.post("/v1/completions", ids)).json["choices"][0]
    if told["token_ids"] is not None:
        prompt = [*told["prompt_token_ids"], *told["token_ids"]]
    else:
        prompt = "One two three" + told["text"]
    answer = await client.complete(1, prompt, prompt_logprobs=1)
    rows = answer.json["choices"][0]["prompt_logprobs"]
    assert [next(iter(row.values()))["rank"] for row in rows[-12:]] == [1] * 12


async def test_token_ids_are_given_when_asked_for_and_taken_as_prompt(client: Client):
    body = question(6, return_token_ids=True)
    choice = (await client.post("/v1/completions", body)).json["choices"][0]
    assert len(choice["token_ids"]) == 6
    asked = question(6, prompt=choice["prompt_token_ids"])
    again = (await client.post("/v1/completions", asked)).json["choices"][0]
    assert again["text"] == choice["text"]
    stream = await Stream(client, body).listen()
    assert [i for e in stream.events for i in e["choices"][0]["token_ids"]] == choice["token_ids"]
    assert stream.events[0]["choices"][0]["prompt_token_ids"] == choice["prompt_token_ids"]


# --- errors


async def test_an_unknown_model_is_404(client: Client):
    for path, body in (("/v1/completions", question(1)), ("/v1/chat/completions", chat(1))):
        answer = await client.post(path, {**body, "model": "nonsense"})
        assert answer.status == 404
        error = answer.json["error"]
        assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)
        assert "`nonsense` does not exist" in error["message"]


async def test_a_prompt_that_is_too_long_is_400(client: Client):
    answer = await client.complete(1, "word " * 3000)
    assert answer.status == 400
    assert answer.json["error"]["type"] == "BadRequestError"
    assert "2048" in answer.json["error"]["message"]


async def test_more_tokens_than_there_is_room_for_is_400(client: Client):
    answer = await client.complete(5000)
    assert answer.status == 400
    assert answer.json["error"]["code"] == 400
    assert "2048" in answer.json["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_broken_json_is_400(client: Client, path: str):
    headers = {"Content-Type": "application/json"}
    answer = await client.post(path, data=b"{broken", headers=headers)
    assert answer.status == 400
    assert answer.json["error"]["code"] == 400


async def test_a_chat_without_messages_is_400(client: Client):
    answer = await client.post("/v1/chat/completions", {"model": NAME})
    assert answer.status == 400
    assert "messages" in answer.json["error"]["message"]


# --- asleep


async def test_a_request_to_a_sleeper_hangs_until_the_wake(client: Client):
    await client.post("/sleep?level=1")
    async with asyncio.TaskGroup() as group, asyncio.timeout(10):
        stream = Stream(client, question(8))
        group.create_task(stream.listen())
        plain = group.create_task(client.complete(8))
        await asyncio.wait([plain], timeout=SILENCE_S)
        assert (stream.status, stream.events) == (200, [])  # a stream's head comes at once, alone
        assert not plain.done()
        assert (await client.get("/load")).json == {"server_load": 2}
        await client.post("/wake_up")
    assert stream.finish == "length"
    assert plain.result().json["choices"][0]["text"] == stream.text


async def test_a_partial_wake_serves_nobody(client: Client):
    await client.post("/sleep?level=1")
    async with asyncio.TaskGroup() as group:
        plain = group.create_task(client.complete(8))
        await client.post("/wake_up?tags=weights")
        await asyncio.wait([plain], timeout=SILENCE_S)
        assert not plain.done()
        await client.post("/wake_up?tags=kv_cache")
    assert plain.result().status == 200


async def test_a_client_that_leaves_a_sleeper_is_forgotten(client: Client):
    await client.post("/sleep?level=1")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SILENCE_S):
            await client.complete(8)
    await until(client.unused)
    await client.post("/wake_up")
    assert (await client.complete(1)).status == 200


async def test_a_sleepers_queue_has_a_limit_when_told_so(client: Client):
    await client.post("/sleep?level=1")
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(client.complete(1)) for _ in range(MAX_QUEUED)]
        await until(lambda: client.used_by(MAX_QUEUED))
        refused = await client.complete(1)
        await client.post("/wake_up")
    assert refused.status == 503
    assert refused.json["error"]["code"] == 503
    assert [task.result().status for task in waiting] == [200] * MAX_QUEUED


# --- sleep under a stream


async def test_abort_ends_answers_with_200_and_a_partial_text(client: Client):
    async with asyncio.TaskGroup() as group, asyncio.timeout(10):
        stream = Stream(client, question(LONG))
        listening = group.create_task(stream.listen())
        plain = group.create_task(client.complete(LONG, "Four five"))
        await stream.heard(5)
        assert (await client.post("/sleep?level=1&mode=abort")).status == 200
        await asyncio.wait([listening, plain])
    assert (stream.status, stream.done, stream.finish) == (200, True, "abort")
    assert 5 <= len(stream.events) < LONG
    choice = plain.result().json["choices"][0]
    assert (plain.result().status, choice["finish_reason"]) == (200, "abort")
    assert choice["text"]


async def test_wait_lets_answers_end_and_shows_as_sleep_at_once(client: Client):
    async with asyncio.TaskGroup() as group, asyncio.timeout(15):
        stream = Stream(client, question(600, return_token_ids=True))
        listening = group.create_task(stream.listen())
        await stream.heard(5)
        sleeping = group.create_task(client.post("/sleep?level=1&mode=wait"))
        await until(client.asleep)
        assert not sleeping.done()  # `is_sleeping` is no proof of a finished sleep
        late = group.create_task(client.complete(1))
        await listening
        assert (await sleeping).status == 200
        assert not late.done()  # what came after the order waits for the wake
        await client.post("/wake_up")
    assert (stream.finish, stream.tokens) == ("length", 600)
    assert late.result().status == 200


async def test_keep_freezes_an_answer_and_the_wake_goes_on_with_it(client: Client):
    whole = (await client.complete(600)).json["choices"][0]["text"]
    async with asyncio.TaskGroup() as group, asyncio.timeout(15):
        stream = Stream(client, question(600, return_token_ids=True))
        listening = group.create_task(stream.listen())
        await stream.heard(5)
        assert (await client.post("/sleep?level=1&mode=keep")).status == 200
        assert await client.asleep()
        await asyncio.wait([listening], timeout=0.2)  # what was on its way may still arrive
        heard = len(stream.events)
        await asyncio.wait([listening], timeout=SILENCE_S)
        assert len(stream.events) == heard < 600
        await client.post("/wake_up")
    assert (stream.finish, stream.tokens) == ("length", 600)
    assert stream.text == whole


async def test_gauges_of_a_frozen_engine_are_stale(client: Client):
    async with asyncio.TaskGroup() as group, asyncio.timeout(15):
        stream = Stream(client, question(LONG))
        group.create_task(stream.listen())
        await stream.heard(5)
        await client.post("/sleep?level=1&mode=keep")
        late = group.create_task(client.complete(1))
        await asyncio.wait([late], timeout=SILENCE_S)
        assert await client.gauge("vllm:num_requests_running") == 1
        assert await client.gauge("vllm:num_requests_waiting") == 0  # though one does wait
        await client.post("/sleep?level=1&mode=abort")
        await client.post("/wake_up")
    assert stream.finish == "abort"


async def test_a_wake_during_a_pending_wait_does_not_cancel_the_sleep(client: Client):
    async with asyncio.TaskGroup() as group, asyncio.timeout(15):
        stream = Stream(client, question(600, return_token_ids=True))
        listening = group.create_task(stream.listen())
        await stream.heard(5)
        sleeping = group.create_task(client.post("/sleep?level=1&mode=wait"))
        await until(client.asleep)
        assert (await client.post("/wake_up")).json["status"] == "awake"
        assert not await client.asleep()
        await listening
        assert (await sleeping).status == 200
    assert await client.asleep()  # the trap: it fell asleep after it was woken


async def test_an_abort_lets_a_pending_wait_end_too(client: Client):
    async with asyncio.TaskGroup() as group, asyncio.timeout(10):
        stream = Stream(client, question(LONG))
        group.create_task(stream.listen())
        await stream.heard(5)
        waiting = group.create_task(client.post("/sleep?level=1&mode=wait"))
        await until(client.asleep)
        assert (await client.post("/sleep?level=1&mode=abort")).status == 200
        assert (await waiting).status == 200
    assert stream.finish == "abort"
    assert await client.asleep()


async def test_a_wait_that_nobody_waits_for_takes_effect_all_the_same(client: Client):
    async with asyncio.TaskGroup() as group, asyncio.timeout(15):
        stream = Stream(client, question(600, return_token_ids=True))
        listening = group.create_task(stream.listen())
        await stream.heard(5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.post("/sleep?level=1&mode=wait")
        await listening
    assert stream.finish == "length"
    assert await client.asleep()


async def test_a_client_that_leaves_ends_its_request(client: Client):
    aborted = await client.gauge("vllm:request_success_total", '"abort"')
    stream = Stream(client, question(LONG))
    async with asyncio.TaskGroup() as group, asyncio.timeout(10):
        listening = group.create_task(stream.listen())
        await stream.heard(5)
        listening.cancel()
    await until(client.unused)
    async with asyncio.timeout(2):  # the engine does not go on: a sleep that waits is instant
        assert (await client.post("/sleep?level=1&mode=wait")).status == 200
    assert await client.gauge("vllm:request_success_total", '"abort"') == aborted


# --- counting and connections


async def test_load_counts_open_requests_exactly(client: Client):
    assert (await client.get("/load")).json == {"server_load": 0}
    async with asyncio.TaskGroup() as group, asyncio.timeout(10):
        streams = [Stream(client, question(LONG, f"Number {n}")) for n in range(3)]
        for stream in streams:
            group.create_task(stream.listen())
        for stream in streams:
            await stream.heard(1)
        assert (await client.get("/load")).json == {"server_load": 3}
        await client.post("/sleep?mode=abort")
    assert (await client.get("/load")).json == {"server_load": 0}


@pytest.mark.parametrize(
    "name",
    [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:num_requests_waiting_by_reason",
        "vllm:kv_cache_usage_perc",
        "vllm:request_success_total",
        "vllm:admission_rejections_total",
        "vllm:engine_sleep_state",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
    ],
)
async def test_metrics_have_these_names(client: Client, name: str):
    assert await client.gauge(name) >= 0


async def test_finished_answers_are_counted_by_reason(client: Client):
    before = await client.gauge("vllm:request_success_total", '"length"')
    await client.complete(1)
    assert await client.gauge("vllm:request_success_total", '"length"') == before + 1


async def test_an_idle_connection_is_closed_after_the_keep_alive(client: Client):
    async with client.session(force_close=False) as session:
        async with session.get("/health") as answer:
            connection = answer.connection
            assert answer.headers.get("connection", "keep-alive") == "keep-alive"
            transport = connection.transport if connection else None
        pool = session.connector
        assert pool is not None
        async with asyncio.timeout(KEEP_ALIVE_S + 2):
            while transport is None or not transport.is_closing():
                transport = transport or next(iter(pool._conns.values()))[0][0].transport
                await asyncio.sleep(0.05)


def chat(tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": "Say something"}]
    return {
        "model": NAME,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
