"""Inference as vLLM answers it: shapes, refusals, and what a sleep does to requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

SLOW = {"sim_tokens_per_s": 1}  # 200 a second at the speed of these tests


async def events(answer: aiohttp.ClientResponse) -> list[Any]:
    text = (await answer.read()).decode()
    return [line[6:] for line in text.split("\n\n") if line]


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 -- the server shares the loop, nothing signals
            await asyncio.sleep(0.001)


async def test_a_stream_has_vllms_chunks_in_vllms_order(serve) -> None:
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
    ask["stream_options"] = {"include_usage": True}
    async with serve() as rig, rig.http.post("/v1/chat/completions", json=ask) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        *chunks, done = await events(answer)
    first, *tokens, usage = [json.loads(chunk) for chunk in chunks]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in tokens)
    assert text.startswith("This is coder: ")
    assert tokens[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert done == "[DONE]"


async def test_streamed_and_whole_answers_are_the_same(serve) -> None:
    ask = {"prompt": "hello", "max_tokens": 20}
    async with serve() as rig:
        whole = await rig.say(20)
        async with rig.http.post("/v1/completions", json=ask | {"stream": True}) as answer:
            chunks = (await events(answer))[:-1]
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == whole


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "NotFoundError"),
        ("/v1/completions", {"prompt": "x " * 200, "max_tokens": 5}, 400, "BadRequestError"),
        ("/v1/completions", {}, 400, "BadRequestError"),
        ("/v1/chat/completions", {"messages": []}, 400, "BadRequestError"),
        ("/v1/chat/completions", [], 400, "BadRequestError"),
    ],
)
async def test_refusals_have_openais_shape(serve, path, body, status, kind) -> None:
    async with serve(max_model_len=100) as rig:
        answer = await rig.post(path, body)
    assert answer[0] == status
    assert answer[1]["error"]["type"] == kind
    assert answer[1]["error"]["code"] == status


async def test_unknown_paths_and_wrong_verbs_answer_a_detail(serve) -> None:
    async with serve() as rig:
        assert await rig.post("/nope") == (404, {"detail": "Not Found"})
        async with rig.http.get("/v1/completions") as answer:
            assert answer.status == 405
            assert await answer.json() == {"detail": "Method Not Allowed"}


async def test_a_request_to_a_sleeper_gets_no_byte_until_the_wake(serve) -> None:
    async with serve() as rig, asyncio.TaskGroup() as group:
        await rig.post("/sleep")
        waiting = group.create_task(rig.say())
        await until(lambda: rig.server.engine.waiting)
        assert not waiting.done()
        await rig.post("/wake_up")
        assert (await waiting).startswith(" This is coder:")


async def test_a_client_that_hangs_up_leaves_the_queue(serve) -> None:
    async with serve() as rig:
        await rig.post("/sleep")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await rig.say()
        await until(lambda: not rig.server.engine.turns)


async def test_a_full_queue_answers_503_at_once(serve) -> None:
    async with serve(max_queued=1) as rig, asyncio.TaskGroup() as group:
        await rig.post("/sleep")
        first = group.create_task(rig.say())
        await until(lambda: rig.server.engine.waiting)
        status, answer = await rig.post("/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["code"]) == (503, 503)
        await rig.post("/wake_up")
        await first


async def test_an_abort_ends_answers_with_200_and_says_so(serve) -> None:
    ask = {"prompt": "hello", "max_tokens": 500} | SLOW
    async with serve() as rig, asyncio.TaskGroup() as group:
        cut = group.create_task(rig.post("/v1/completions", ask))
        await until(lambda: rig.server.engine.generated > 3)
        assert await rig.post("/sleep") == (200, {"status": "sleeping", "level": 1})
        status, answer = await cut
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert answer["choices"][0]["text"].startswith(" This is")


async def test_an_abort_in_the_queue_is_a_bare_done(serve) -> None:
    ask = {"prompt": "hello", "stream": True}
    async with serve() as rig, asyncio.TaskGroup() as group:
        await rig.post("/sleep")

        async def stream() -> list[Any]:
            async with rig.http.post("/v1/completions", json=ask) as answer:
                return await events(answer)

        queued = group.create_task(stream())
        await until(lambda: rig.server.engine.waiting)
        rig.server.engine.abort_all()
        assert await queued == ["[DONE]"]


@pytest.mark.parametrize("fault", [None, "garbage-after-freeze"])
async def test_a_frozen_answer_goes_on_as_if_nothing_had_been(serve, fault) -> None:
    async with serve(*[fault] if fault else []) as rig, asyncio.TaskGroup() as group:
        whole = await rig.say(80)
        frozen = group.create_task(rig.say(80, **SLOW))
        await until(lambda: rig.server.engine.generated > 90)
        await rig.post("/sleep?level=1&mode=keep")
        assert 'vllm:num_requests_running{engine="0",model_name="coder"} 1.0' in (
            await (await rig.http.get("/metrics")).text()
        )
        await asyncio.sleep(0.05)
        assert not frozen.done()
        await rig.post("/wake_up")
        assert (await frozen == whole) is (fault is None)


async def test_mode_wait_lets_answers_end_and_later_ones_queue(serve) -> None:
    async with serve() as rig, asyncio.TaskGroup() as group:
        running = group.create_task(rig.say(40, **SLOW))
        await until(lambda: rig.server.engine.generated)
        sleep = group.create_task(rig.post("/sleep?mode=wait"))
        await until(lambda: rig.server.engine.paused != "no")
        late = group.create_task(rig.say())
        await sleep
        assert running.done()
        assert not late.done()
        await rig.post("/wake_up")
        await late


async def test_a_pending_wait_sleep_lands_after_a_wake(serve) -> None:
    async with serve() as rig, asyncio.TaskGroup() as group:
        running = group.create_task(rig.say(60, **SLOW))
        await until(lambda: rig.server.engine.generated)
        sleep = group.create_task(rig.post("/sleep?mode=wait"))
        await until(lambda: rig.server.engine.paused != "no")
        assert (await rig.post("/wake_up"))[1]["status"] == "awake"
        assert await rig.get("/is_sleeping") == {"is_sleeping": False}
        await running
        await sleep
        assert await rig.get("/is_sleeping") == {"is_sleeping": True}


async def test_a_wait_sleep_outlives_its_client(serve) -> None:
    async with serve() as rig, asyncio.TaskGroup() as group:
        running = group.create_task(rig.say(60, **SLOW))
        await until(lambda: rig.server.engine.generated)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await rig.post("/sleep?mode=wait")
        await running
        await until(lambda: rig.server.engine.memory.asleep)


async def test_load_counts_only_when_told_to(serve) -> None:
    for counted in (False, True):
        async with (
            serve(server_load=counted, served=(f"m{counted}",)) as rig,
            asyncio.TaskGroup() as group,
        ):
            await rig.post("/sleep")
            group.create_task(rig.post("/v1/completions", {"prompt": "x"}))
            await until(lambda rig=rig: rig.server.engine.waiting)
            assert await rig.get("/load") == {"server_load": int(counted)}
            await rig.post("/wake_up")


async def test_embeddings_and_scores(serve) -> None:
    async with serve(kind="embed") as rig:
        _, answer = await rig.post("/v1/embeddings", {"input": ["a", "b", "a"]})
        one, two, again = [row["embedding"] for row in answer["data"]]
        assert one == again != two
        assert (await rig.post("/v1/chat/completions", {}))[0] == 404
    async with serve(kind="score", served=("rank",)) as rig:
        ask = {"query": "red fox", "documents": ["blue whale", "a red fox"]}
        _, answer = await rig.post("/v1/rerank", ask)
        assert [row["index"] for row in answer["results"]] == [1, 0]
        ask = {"text_1": "red fox", "text_2": ["red fox"]}
        assert (await rig.post("/v1/score", ask))[1]["data"][0]["score"] > 0.9


async def test_the_key_guards_some_prefixes_only(serve) -> None:
    async with serve(api_key="secret") as rig:
        assert await rig.get("/v1/models") == {"error": "Unauthorized"}
        assert await rig.get("/is_sleeping") == {"is_sleeping": False}
        async with rig.http.get("/v1/models", headers={"Authorization": "Bearer secret"}) as answer:
            assert answer.status == 200


async def test_an_answer_faster_than_the_clock_leaves_the_server_responsive(serve) -> None:
    ask = {"prompt": "hello", "max_tokens": 20_000, "sim_tokens_per_s": 1e9}
    async with serve() as rig, asyncio.TaskGroup() as group:
        long = group.create_task(rig.post("/v1/completions", ask))
        await until(lambda: rig.server.engine.generated)
        assert (await rig.http.get("/health")).status == 200
        assert not long.done()
        long.cancel()
        await until(lambda: not rig.server.engine.turns)


async def test_a_hang_that_is_lifted_lets_everything_go_on(serve) -> None:
    async with serve("hang") as rig, asyncio.TaskGroup() as group:
        asked = group.create_task(rig.get("/is_sleeping"))
        said = group.create_task(rig.say())
        await until(lambda: rig.server.engine.turns and rig.server.engine.control_pending)
        async with rig.http.delete("/sim/fault") as answer:
            assert await answer.json() == {"faults": []}
        assert await asked == {"is_sleeping": False}
        assert (await said).startswith(" This is coder:")


async def test_a_streamed_stop_string_is_held_back_even_across_tokens(serve) -> None:
    async with serve() as rig:
        whole = await rig.say(30)
        stop = whole[20:26]
        ask = {"prompt": "hello", "max_tokens": 30, "stop": [stop], "stream": True}
        async with rig.http.post("/v1/completions", json=ask) as answer:
            chunks = [json.loads(e) for e in (await events(answer))[:-1]]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == whole[: whole.index(stop)]
        assert chunks[-1]["choices"][0]["stop_reason"] == stop
