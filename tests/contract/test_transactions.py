"""The adapter's own transactions, on both subjects."""

import asyncio
from collections.abc import Callable

import pytest

from homegptd.adapters.faults import Garbled, Hung, Unreachable
from homegptd.adapters.vllm import Deadlines, VllmEngine
from homegptd.core.model import ModelId, Proof, SleepLevel, SleepMode
from tests.contract.subjects import Client, Server, Stream, question

LEVELS = list(SleepLevel)
LONG = 1500


@pytest.fixture
async def engine(server: Server) -> VllmEngine:
    made = VllmEngine(ModelId("tiny"), server.uds)
    assert await made.ready()
    await made.identify()
    return made


async def test_identifying_tells_version_levels_and_records_the_canary(server: Server):
    engine = VllmEngine(ModelId("tiny"), server.uds)
    traits = await engine.identify()
    assert traits.version.startswith("0.32")
    assert (traits.levels, traits.why_no_sleep) == (frozenset(SleepLevel), None)
    assert (traits.can_keep, traits.asleep, traits.asleep_level) == (True, False, None)
    assert engine.canary_reference


@pytest.mark.parametrize("level", LEVELS)
async def test_a_sleeper_is_identified_with_its_level(
    engine: VllmEngine, server: Server, level: SleepLevel
):
    await engine.sleep(level, SleepMode.WAIT)
    adopted = VllmEngine(ModelId("tiny"), server.uds)
    traits = await adopted.identify()
    assert (traits.asleep, traits.asleep_level) == (True, level)
    assert adopted.canary_reference is None
    await adopted.wake(level, frozen=False)
    assert adopted.canary_reference == engine.canary_reference


@pytest.mark.parametrize("mode", [SleepMode.WAIT, SleepMode.ABORT])
@pytest.mark.parametrize("level", LEVELS)
async def test_it_sleeps_and_wakes(engine: VllmEngine, level: SleepLevel, mode: SleepMode):
    for _ in range(2):
        await engine.sleep(level, mode)
        assert await engine.is_sleeping()
        await engine.check()
        await engine.wake(level, frozen=False)
        assert not await engine.is_sleeping()
        await engine.check()


@pytest.mark.parametrize("level", LEVELS)
async def test_its_weights_wake_alone_and_go_again_or_the_rest_follows(
    engine: VllmEngine, level: SleepLevel
):
    await engine.sleep(level, SleepMode.WAIT)
    for follows in (False, True):
        await engine.rouse(level)
        assert await engine.is_sleeping()
        await engine.check()
        if follows:
            await engine.wake(level, frozen=False, roused=True)
            assert not await engine.is_sleeping()
        else:
            await engine.sleep(level, SleepMode.WAIT)
            assert await engine.is_sleeping()


@pytest.mark.parametrize("level", LEVELS)
async def test_weights_that_somebody_left_awake_go_when_it_is_identified(
    engine: VllmEngine, server: Server, client: Client, level: SleepLevel
):
    await engine.sleep(level, SleepMode.WAIT)
    await engine.rouse(level)
    adopted = VllmEngine(ModelId("tiny"), server.uds)
    traits = await adopted.identify()
    assert (traits.asleep, traits.asleep_level, traits.can_rouse) == (True, level, True)
    rest = await client.post("/wake_up?tags=kv_cache")
    assert rest.json["status"] == "sleeping"  # the weights had gone
    assert (await client.post("/wake_up?tags=weights")).json["status"] == "awake"
    if level is SleepLevel.TWO:
        await client.post("/collective_rpc", {"method": "reload_weights"})


async def test_a_frozen_answer_shares_the_engine_with_the_canary(
    engine: VllmEngine, client: Client
):
    async with asyncio.TaskGroup() as group, asyncio.timeout(15):
        stream = Stream(client, question(900, return_token_ids=True))
        group.create_task(stream.listen())
        await stream.heard(5)
        await engine.sleep(SleepLevel.ONE, SleepMode.KEEP)
        await engine.wake(SleepLevel.ONE, frozen=True)
    assert (stream.finish, stream.tokens) == ("length", 900)


async def test_what_clings_to_a_drained_engine_is_aborted_at_the_deadline(
    server: Server, client: Client
):
    engine = VllmEngine(ModelId("tiny"), server.uds, deadlines=Deadlines(sleep_s=0.5))
    await engine.identify()
    async with asyncio.TaskGroup() as group, asyncio.timeout(15):
        stream = Stream(client, question(LONG))
        group.create_task(stream.listen())
        await stream.heard(5)
        await engine.sleep(SleepLevel.ONE, SleepMode.WAIT)
    assert stream.finish == "abort"
    await engine.wake(SleepLevel.ONE, frozen=False)


async def test_freezing_is_proved(engine: VllmEngine):
    said = await engine.prove(Proof.FREEZE)
    assert said.endswith("equal to the unfrozen one")
    assert not await engine.is_sleeping()


async def test_reloading_is_proved(engine: VllmEngine):
    said = await engine.prove(Proof.RELOAD)
    assert said == "level 2 and reload: 32 greedy tokens equal to before"
    assert not await engine.is_sleeping()


async def test_another_model_behind_the_socket_is_noticed_at_the_wake(engine: VllmEngine):
    engine.canary_reference = "Nothing that this model would ever say of itself"
    await engine.sleep(SleepLevel.ONE, SleepMode.WAIT)
    with pytest.raises(Garbled, match=r'cannot wake "tiny": the model now says .* no near tie'):
        await engine.wake(SleepLevel.ONE, frozen=False)


async def test_a_hang_is_a_fault_within_the_deadline(server: Server):
    engine = VllmEngine(ModelId("tiny"), server.uds, deadlines=Deadlines(check_s=0.5))
    server.freeze_engine_core(frozen=True)
    try:
        assert await engine.ready()  # /health knows nothing
        with pytest.raises(Hung, match=r"did not answer /is_sleeping within 0.5 s"):
            await engine.check()
    finally:
        server.freeze_engine_core(frozen=False)
    await VllmEngine(ModelId("tiny"), server.uds).check()


async def test_a_server_without_dev_mode_is_served_but_never_put_to_sleep(
    launch: Callable[..., Server],
):
    server = launch("--api-key", "secret", VLLM_SERVER_DEV_MODE="0")
    engine = VllmEngine(ModelId("tiny"), server.uds, api_key="secret")
    traits = await engine.identify()
    assert (traits.levels, traits.can_keep, traits.asleep) == (frozenset(), False, False)
    assert "VLLM_SERVER_DEV_MODE" in (traits.why_no_sleep or "")
    assert engine.canary_reference
    await engine.check()

    server.kill_engine_core()
    await asyncio.to_thread(server.wait_for_exit, 15)
    assert not await engine.ready()
    with pytest.raises(Unreachable, match=r'cannot vouch for "tiny": nobody listens at .*zombie'):
        await engine.check()
