"""What the control endpoints answer, and what they really do."""

import pytest

from tests.contract.subjects import NAME, Client


async def test_health_is_an_empty_200(client: Client):
    for path in ("/health", "/ping"):
        answer = await client.get(path)
        assert (answer.status, answer.text) == (200, "")


async def test_the_version_is_told(client: Client):
    answer = await client.get("/version")
    assert answer.status == 200
    assert answer.json["version"].startswith("0.32")


async def test_the_models_list_names_the_model_and_its_length(client: Client):
    answer = await client.get("/v1/models")
    assert answer.status == 200
    assert answer.json["object"] == "list"
    [card] = answer.json["data"]
    assert (card["id"], card["object"], card["owned_by"]) == (NAME, "model", "vllm")
    assert card["max_model_len"] == 2048


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_sleep_says_its_level_and_a_plain_wake_undoes_it(client: Client, level: int):
    slept = await client.post(f"/sleep?level={level}")
    assert (slept.status, slept.json) == (200, {"status": "sleeping", "level": level})
    assert await client.asleep()
    woken = await client.post("/wake_up")
    assert (woken.status, woken.json) == (200, {"status": "awake", "tags": None})
    assert not await client.asleep()


async def test_sleep_without_parameters_means_level_1(client: Client):
    assert (await client.post("/sleep")).json == {"status": "sleeping", "level": 1}


async def test_level_and_mode_are_read_from_the_query_and_not_from_the_body(client: Client):
    answer = await client.post("/sleep", {"level": 2, "mode": "nonsense"})
    assert (answer.status, answer.json["level"]) == (200, 1)


@pytest.mark.parametrize("query", ["level=3", "level=-1", "level=abc"])
async def test_a_level_that_does_not_exist_is_refused(client: Client, query: str):
    answer = await client.post(f"/sleep?{query}")
    assert answer.status == 400
    assert answer.json["error"]["param"] == "query.level"
    assert answer.json["error"]["code"] == 400
    assert not await client.asleep()


async def test_a_mode_that_does_not_exist_is_refused(client: Client):
    answer = await client.post("/sleep?mode=nonsense")
    assert answer.status == 400
    assert answer.json["error"]["param"] == "query.mode"
    assert not await client.asleep()


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
async def test_an_idle_engine_sleeps_in_every_mode(client: Client, mode: str):
    assert (await client.post(f"/sleep?level=1&mode={mode}")).status == 200
    assert await client.asleep()


async def test_sleep_and_wake_may_be_repeated(client: Client):
    for _ in range(2):
        assert (await client.post("/sleep?level=1")).json["status"] == "sleeping"
    assert await client.asleep()
    for _ in range(2):
        assert (await client.post("/wake_up")).json["status"] == "awake"
    assert not await client.asleep()


async def test_a_partial_wake_still_sleeps_until_the_rest_follows(client: Client):
    await client.post("/sleep?level=2")
    weights = await client.post("/wake_up?tags=weights")
    assert weights.json == {"status": "sleeping", "tags": ["weights"]}
    assert await client.asleep()
    cache = await client.post("/wake_up?tags=kv_cache")
    assert cache.json == {"status": "awake", "tags": ["kv_cache"]}
    assert not await client.asleep()


async def test_a_half_awake_engine_is_put_back_to_sleep(client: Client):
    """Since 0.31; before, it counts as asleep and nothing happens."""
    await client.post("/sleep?level=1")
    await client.post("/wake_up?tags=weights")
    assert (await client.post("/sleep?level=1")).json["status"] == "sleeping"
    cache = await client.post("/wake_up?tags=kv_cache")
    assert cache.json["status"] == "sleeping"  # the weights had gone to sleep again
    assert (await client.post("/wake_up")).json["status"] == "awake"
    assert not await client.asleep()


async def test_several_tags_are_given_by_repeating_the_parameter(client: Client):
    await client.post("/sleep?level=1")
    answer = await client.post("/wake_up?tags=weights&tags=kv_cache")
    assert answer.json == {"status": "awake", "tags": ["weights", "kv_cache"]}


@pytest.mark.parametrize("tags", ["weights,kv_cache", "nonsense"])
async def test_an_unknown_tag_wakes_nothing_and_says_so_with_200(client: Client, tags: str):
    await client.post("/sleep?level=1")
    answer = await client.post(f"/wake_up?tags={tags}")
    assert (answer.status, answer.json["status"]) == (200, "sleeping")
    assert await client.asleep()


async def test_level_0_is_woken_by_the_scheduling_tag(client: Client):
    await client.post("/sleep?level=0")
    assert (await client.post("/wake_up?tags=scheduling")).json["status"] == "awake"
    assert not await client.asleep()


async def test_level_1_is_not_woken_by_the_scheduling_tag(client: Client):
    await client.post("/sleep?level=1")
    assert (await client.post("/wake_up?tags=scheduling")).json["status"] == "sleeping"
    assert await client.asleep()


async def test_the_gauge_follows_the_level_and_lies_after_level_2_upon_level_1(client: Client):
    async def states() -> dict[str, float]:
        names = ("awake", "weights_offloaded", "discard_all")
        return {s: await client.gauge("vllm:engine_sleep_state", f'"{s}"') for s in names}

    await client.post("/sleep?level=1")
    assert await states() == {"awake": 0, "weights_offloaded": 1, "discard_all": 0}
    assert (await client.post("/sleep?level=2")).json["level"] == 2  # nothing was discarded
    assert await states() == {"awake": 0, "weights_offloaded": 0, "discard_all": 1}
    await client.post("/wake_up")
    assert await states() == {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
    await client.post("/sleep?level=0")
    assert await states() == {"awake": 0, "weights_offloaded": 0, "discard_all": 0}


async def test_what_crosses_no_engine_border_answers_while_asleep(client: Client):
    await client.post("/sleep?level=1")
    for path in ("/health", "/ping", "/version", "/load", "/metrics", "/v1/models"):
        assert (await client.get(path)).status == 200, path


async def test_pause_shows_as_sleep_and_leaves_the_gauge_alone(client: Client):
    assert (await client.post("/pause")).json == {"status": "paused"}
    assert (await client.get("/is_paused")).json == {"is_paused": True}
    assert await client.asleep()
    assert await client.gauge("vllm:engine_sleep_state", '"awake"') == 1
    assert (await client.post("/resume")).json == {"status": "resumed"}
    assert not await client.asleep()


async def test_reloading_answers_one_result_for_each_worker(client: Client):
    await client.post("/sleep?level=2")
    await client.post("/wake_up?tags=weights")
    answer = await client.post("/collective_rpc", {"method": "reload_weights"})
    assert (answer.status, answer.json) == (200, {"results": [None]})


async def test_collective_rpc_refuses_what_it_does_not_know_and_survives(client: Client):
    assert (await client.post("/collective_rpc", {})).status == 400
    assert (await client.post("/collective_rpc", data=b"{broken")).status == 400
    assert (await client.post("/collective_rpc", {"method": "nonsense"})).status == 500
    assert (await client.complete(1)).status == 200


async def test_the_caches_can_be_reset(client: Client):
    assert (await client.post("/reset_prefix_cache")).json == {"success": True}
    for path in ("/reset_mm_cache", "/reset_encoder_cache"):
        answer = await client.post(path)
        assert (answer.status, answer.text) == (200, ""), path


async def test_kv_memory_is_released_only_while_paused(client: Client):
    assert (await client.post("/release_kv_cache_memory")).status == 500
    assert not await client.asleep()


async def test_sleep_operations_are_counted_and_none_is_in_flight(client: Client):
    name = "vllm:sleep_mode_operation_duration_seconds_count"
    await client.post("/sleep")  # the series exist from the first time on
    before = await client.gauge(name, '"sleep"')
    await client.post("/sleep")
    await client.post("/wake_up")
    assert await client.gauge(name, '"sleep"') == before + 1
    assert await client.gauge("vllm:sleep_mode_operations_in_flight") == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/sleep"),
        ("GET", "/wake_up"),
        ("POST", "/is_sleeping"),
        ("POST", "/health"),
        ("POST", "/v1/models"),
        ("GET", "/v1/chat/completions"),
    ],
)
async def test_the_wrong_verb_is_405(client: Client, method: str, path: str):
    answer = await client.ask(method, path)
    assert (answer.status, answer.json) == (405, {"detail": "Method Not Allowed"})
    assert not await client.asleep()


async def test_an_unknown_path_is_404(client: Client):
    answer = await client.get("/nonsense")
    assert (answer.status, answer.json) == (404, {"detail": "Not Found"})
