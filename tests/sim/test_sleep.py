"""Sleep and wake with vLLM's oddities, release by release, and what faults do to them."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from homegptd.sim.card import MemoryCard, new_box
from homegptd.sim.physics import TAGS
from homegptd.sim.server import StartFailed


async def sleeping(rig) -> bool:
    return (await rig.get("/is_sleeping"))["is_sleeping"]


async def gauge(rig) -> str:
    async with rig.http.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    states = [line for line in lines if line.startswith("vllm:engine_sleep_state")]
    return "".join(s.split('"')[-2] for s in states if s.endswith(" 1.0"))


async def test_a_cycle_frees_the_memory_and_takes_it_again(serve) -> None:
    async with serve() as rig:
        awake = (await rig.get("/sim/state"))["gpu_mib"]["0"]
        assert await rig.post("/sleep") == (200, {"status": "sleeping", "level": 1})
        assert await sleeping(rig)
        assert await gauge(rig) == "weights_offloaded"
        state = await rig.get("/sim/state")
        assert state["gpu_mib"]["0"] == state["residue_mib"] < awake
        assert await rig.post("/wake_up") == (200, {"status": "awake", "tags": None})
        assert not await sleeping(rig)
        assert await gauge(rig) == "awake"
        assert (await rig.say()).startswith(" This is coder:")


@pytest.mark.parametrize("query", ["level=3", "level=-1", "level=abc", "mode=soft"])
async def test_bad_parameters_are_400_from_0_32(serve, query) -> None:
    async with serve() as rig:
        status, answer = await rig.post(f"/sleep?{query}")
        assert status == 400
        assert answer["error"]["param"] == f"query.{query.split('=')[0]}"
        assert not await sleeping(rig)


async def test_level_2_on_level_1_says_so_and_does_not(serve) -> None:
    async with serve() as rig:
        await rig.post("/sleep")
        assert await rig.post("/sleep?level=2") == (200, {"status": "sleeping", "level": 2})
        assert await gauge(rig) == "discard_all"
        assert (await rig.get("/sim/state"))["weights_valid"]


async def test_level_0_only_pauses(serve) -> None:
    async with serve() as rig:
        before = (await rig.get("/sim/state"))["gpu_mib"]
        await rig.post("/sleep?level=0")
        assert await sleeping(rig)
        assert await gauge(rig) == ""
        assert (await rig.get("/sim/state"))["gpu_mib"] == before
        assert (await rig.post("/wake_up?tags=scheduling"))[1]["status"] == "awake"


async def test_tags_wake_in_parts_and_wrong_ones_do_nothing(serve) -> None:
    async with serve() as rig:
        await rig.post("/sleep")
        for tags, status in [
            ("tags=weights,kv_cache", "sleeping"),
            ("tags=nonsense", "sleeping"),
            ("tags=weights", "sleeping"),
            ("tags=kv_cache", "awake"),
        ]:
            assert (await rig.post(f"/wake_up?{tags}"))[1]["status"] == status
        assert (await rig.say()).startswith(" This is coder:")


async def test_level_2_talks_garbage_until_reloaded(serve) -> None:
    async with serve() as rig:
        healthy = await rig.say()
        await rig.post("/sleep?level=2")
        await rig.post("/wake_up")
        assert await rig.say() != healthy
        status, answer = await rig.post("/collective_rpc", {"method": "reload_weights"})
        assert (status, answer) == (200, {"results": [None]})
        assert await rig.say() == healthy


async def test_resume_on_a_sleeper_is_a_trap(serve) -> None:
    async with serve() as rig:
        await rig.post("/sleep")
        await rig.post("/resume")
        assert (await rig.post("/v1/completions", {"prompt": "x"}))[0] == 500
        assert rig.server.engine.dead


async def test_before_0_17_a_request_to_a_sleeper_kills_it(serve) -> None:
    async with serve(version="0.16.0") as rig:
        assert await rig.post("/sleep?mode=wait") == (200, None)
        assert (await rig.post("/v1/completions", {"prompt": "x"}))[0] == 500
        assert rig.server.engine.dead


@pytest.mark.parametrize(("version", "dies"), [("0.20.0", True), ("0.24.0", False)])
async def test_before_0_24_a_partial_wake_lets_requests_run(serve, version, dies) -> None:
    async with serve(version=version) as rig, asyncio.TaskGroup() as group:
        await rig.post("/sleep")
        await rig.post("/wake_up?tags=weights")
        asked = group.create_task(rig.post("/v1/completions", {"prompt": "x"}))
        await asyncio.sleep(0.05)
        assert rig.server.engine.dead is dies
        if not dies:
            await rig.post("/wake_up?tags=kv_cache")
        assert (await asked)[0] == (500 if dies else 200)


@pytest.mark.parametrize(("version", "asleep"), [("0.30.0", {"kv_cache"}), ("0.31.0", {*TAGS})])
async def test_from_0_31_on_a_half_awake_engine_goes_back_to_sleep(serve, version, asleep) -> None:
    async with serve(version=version) as rig:
        await rig.post("/sleep")
        await rig.post("/wake_up?tags=weights")
        await rig.post("/sleep")
        assert rig.server.engine.executor_asleep == asleep
        assert rig.server.engine.memory.asleep == asleep


async def test_control_needs_dev_mode(serve) -> None:
    async with serve(dev_mode=False) as rig:
        assert (await rig.post("/sleep"))[0] == 404
    async with serve(dev_mode=False, version="0.12.0", served=("old",)) as rig:
        assert (await rig.post("/pause"))[0] == 200


async def test_a_wake_without_room_is_500_and_can_be_repeated(serve) -> None:
    card = MemoryCard(new_box())
    async with serve(card=card, kv_gb=10) as rig:
        await rig.post("/sleep")
        card.box.take("foreign:other", 0, 70 * 1024)
        status, answer = await rig.post("/wake_up")
        assert status == 500
        assert "out of memory" in answer["error"]["message"]
        card.box.drop("foreign:other")
        assert (await rig.post("/wake_up"))[0] == 200
        assert (await rig.say()).startswith(" This is coder:")


async def test_a_start_without_room_fails_with_vllms_words(serve) -> None:
    card = MemoryCard(new_box())
    card.box.take("foreign:other", 0, 60 * 1024)
    with pytest.raises(StartFailed, match="less than desired GPU memory utilization"):
        async with serve(card=card):
            pass


async def test_a_500_from_sleep_poisons(serve) -> None:
    async with serve("500@sleep*1") as rig:
        assert (await rig.post("/sleep"))[0] == 500
        assert (await rig.post("/wake_up"))[0] == 200
        assert (await rig.post("/v1/completions", {"prompt": "x"}))[0] == 500
        assert rig.server.engine.dead


async def test_a_lie_says_200_and_does_nothing(serve) -> None:
    async with serve("lie@sleep") as rig:
        assert (await rig.post("/sleep"))[0] == 200
        assert not await sleeping(rig)


async def test_half_a_wake_stays_asleep(serve) -> None:
    async with serve("half@wake*1") as rig:
        await rig.post("/sleep")
        assert (await rig.post("/wake_up"))[1]["status"] == "sleeping"
        assert (await rig.post("/wake_up"))[1]["status"] == "awake"


async def test_late_takes_effect_though_the_client_is_gone(serve) -> None:
    async with serve("late=60@sleep") as rig:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await rig.post("/sleep")
        assert await sleeping(rig)


async def test_a_hung_engine_is_healthy_and_answers_nothing(serve) -> None:
    async with serve() as rig:
        await rig.fault("hang")
        async with rig.http.get("/health") as answer:
            assert answer.status == 200
        for call in (sleeping(rig), rig.say()):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await call


async def test_reset_breaks_the_connection(serve) -> None:
    async with serve("reset@wake*1") as rig:
        with pytest.raises(aiohttp.ClientError):
            await rig.post("/wake_up")
        assert (await rig.post("/wake_up"))[0] == 200


async def test_a_leak_shows_in_the_residue(serve) -> None:
    async with serve("leak=256") as rig:
        for _ in range(2):
            await rig.post("/sleep")
            await rig.post("/wake_up")
        assert (await rig.get("/sim/state"))["residue_mib"] == round(1.2 * 1024) + 512


async def test_an_unknown_fault_is_refused_at_the_side_door(serve) -> None:
    async with serve() as rig:
        assert (await rig.post("/sim/fault", {"name": "gremlins"}))[0] == 400
