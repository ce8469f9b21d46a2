"""Commands become tasks that report exactly once, on virtual time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from homegptd.adapters.faults import Hung
from homegptd.core.commands import Order, Prove, Sleep, Start, Stop, Wake, Watch
from homegptd.core.events import (
    EngineDied,
    EngineSilent,
    Event,
    ProveEnded,
    SleepEnded,
    StartEnded,
    StopEnded,
    WakeEnded,
)
from homegptd.core.model import (
    Act,
    Awake,
    Exit,
    Failure,
    FallingAsleep,
    ModelId,
    OrderId,
    Proof,
    SleepLevel,
    SleepMode,
)
from homegptd.core.refusals import Fault
from homegptd.runtime.race import first
from tests.runtime.jumping import jumping
from tests.runtime.small import LIMIT_S, START_S, STOP_S, A, B, Small

N = OrderId(7)
START = Start(A, N, 1)
STOP = Stop(A, OrderId(8))
ORDERS: list[tuple[str, Order, type[Event]]] = [
    ("start", START, StartEnded),
    ("wake", Wake(A, N, SleepLevel.ONE), WakeEnded),
    ("sleep", Sleep(A, N, SleepLevel.ONE, SleepMode.WAIT), SleepEnded),
    ("stop", Stop(A, N), StopEnded),
]
by_name = pytest.mark.parametrize(("act", "order", "answer"), ORDERS, ids=[o[0] for o in ORDERS])


@asynccontextmanager
async def orders() -> AsyncIterator[tuple[Small, asyncio.TaskGroup, list[Event]]]:
    """Orders alone: what they report goes into a list."""
    small, told = Small(), list[Event]()
    small.orders.connect(told.append, lambda: small.scheduler.state)
    async with asyncio.TaskGroup() as group:
        yield small, group, told
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


@by_name
def test_an_order_that_works_reports_once(act: str, order: Order, answer: type[Event]) -> None:
    @jumping
    async def main() -> None:
        async with orders() as (small, group, told):
            if act != "start":
                small.found(A)
            small.orders.carry_out(order, group)
            await asyncio.sleep(50.0)
            (event,) = told
            assert isinstance(event, answer)
            assert event.failure is None
            assert event.order == N
            assert [taken[1].partition("-")[0] for taken in small.store.took] == [act]

    main()


@by_name
def test_a_fault_is_reported_once_with_its_hint(
    act: str, order: Order, answer: type[Event]
) -> None:
    @jumping
    async def main() -> None:
        async with orders() as (small, group, told):
            small.found(A)
            small.engines[A].breaks[act] = Fault("it will not", hint="look", lasting=True)
            small.orders.carry_out(order, group)
            await asyncio.sleep(50.0)
            (event,) = told
            assert isinstance(event, answer)
            assert event.failure == Failure("it will not", "look", lasting=True)
            assert not small.store.took

    main()


@by_name
def test_a_bug_in_an_adapter_is_the_failure_of_its_order(
    act: str, order: Order, answer: type[Event], caplog: pytest.LogCaptureFixture
) -> None:
    @jumping
    async def main() -> None:
        async with orders() as (small, group, told):
            small.found(A)
            small.engines[A].breaks[act] = KeyError("surprise")
            small.orders.carry_out(order, group)
            await asyncio.sleep(50.0)
            (event,) = told
            assert isinstance(event, answer)
            assert event.failure is not None
            assert "KeyError" in event.failure.message

    main()
    assert "unexpected" in caplog.text


@by_name
def test_a_stop_replaces_what_runs_and_waits_for_its_end(
    act: str, order: Order, answer: type[Event]
) -> None:
    @jumping
    async def main() -> None:
        async with orders() as (small, group, told):
            if act != "start":
                small.found(A)
            small.orders.carry_out(order, group)
            await asyncio.sleep(0.5)
            assert told == []
            small.orders.carry_out(STOP, group)
            await asyncio.sleep(50.0)
            assert told == [StopEnded(A, OrderId(8))]
            assert not small.engines[A].running

    main()


@jumping
async def test_a_stop_in_the_very_turn_of_the_order_leaves_nothing_behind() -> None:
    async with orders() as (small, group, told):
        small.orders.carry_out(START, group)
        small.orders.carry_out(STOP, group)
        await asyncio.sleep(50.0)
        assert told == [StopEnded(A, OrderId(8))]
        assert small.engines[A].calls == ["stop", "stopped"]


@jumping
async def test_a_stop_begins_only_when_the_replaced_order_has_ended() -> None:
    async with orders() as (small, group, told):
        small.found(A)
        ended_at: list[float] = []

        async def slow_wake(level: SleepLevel, *, frozen: bool, roused: bool) -> None:
            try:
                await asyncio.sleep(100.0)
            finally:
                await asyncio.sleep(5.0)
                ended_at.append(small.loop.time())
                small.engines[A].calls.append("wake ended")

        small.engines[A].wake = slow_wake  # type: ignore[method-assign]
        small.orders.carry_out(Wake(A, N, SleepLevel.ONE), group)
        await asyncio.sleep(1.0)
        small.orders.carry_out(STOP, group)
        await asyncio.sleep(50.0)
        assert small.engines[A].calls == ["wake ended", "stop", "stopped"]
        assert told == [StopEnded(A, OrderId(8))]


# ---------------------------------------------------------------- starts


@jumping
async def test_a_start_ends_when_the_engine_is_healthy() -> None:
    async with orders() as (small, group, told):
        small.orders.carry_out(START, group)
        await asyncio.sleep(START_S + 1.0)
        (event,) = told
        assert isinstance(event, StartEnded)
        assert event.traits is not None
        ((_, act, took),) = small.store.took
        assert act == "start"
        assert START_S <= took < START_S + 1.0


@pytest.mark.parametrize(("code", "lasting"), [(1, False), (2, True), (0, False), (-9, False)])
def test_an_engine_that_exits_ends_its_start_at_once(code: int, *, lasting: bool) -> None:
    @jumping
    async def main() -> None:
        async with orders() as (small, group, told):
            small.engines[A].exits = Exit(code, f"exited with code {code}")
            small.orders.carry_out(START, group)
            await asyncio.sleep(START_S + 0.1)
            (event,) = told
            assert isinstance(event, StartEnded)
            assert event.failure is not None
            assert f"exited with code {code}" in event.failure.message
            assert event.failure.hint == "homegptctl logs a"
            assert event.failure.lasting is lasting

    main()


@jumping
async def test_an_engine_that_never_gets_healthy_fails_at_the_limit() -> None:
    async with orders() as (small, group, told):
        small.engines[A].never_up = True
        small.orders.carry_out(START, group)
        await asyncio.sleep(LIMIT_S - 0.1)
        assert told == []
        await asyncio.sleep(0.2)
        (event,) = told
        assert isinstance(event, StartEnded)
        assert event.failure is not None
        assert event.failure.message == 'cannot start "a": not healthy after 60 s'


# ---------------------------------------------------------------- proofs


@jumping
async def test_a_proof_that_holds_is_remembered_and_found_at_the_next_start() -> None:
    async with Small().running() as small:
        await small.until_booted()
        small.scheduler.operate(Act.PROVE, A, by="me")
        await small.until(lambda: bool(small.told(ProveEnded)))
        assert set(small.store.known.values()) == {(True, "equal")}
        assert (await small.orders.identify(A)).proofs == {Proof.FREEZE: True}


@jumping
async def test_a_proof_holds_for_the_image_that_it_was_made_with() -> None:
    async with Small().running() as small:
        small.units.images[A] = "sha256:4f1e"
        await small.until_booted()
        small.scheduler.operate(Act.PROVE, A, by="me")
        await small.until(lambda: bool(small.told(ProveEnded)))
        assert (await small.orders.identify(A)).proofs == {Proof.FREEZE: True}
        small.units.images[A] = "sha256:9a02"
        assert (await small.orders.identify(A)).proofs == {}


@jumping
async def test_a_proof_that_fails_is_a_verdict_and_no_failure() -> None:
    async with orders() as (small, group, told):
        small.found(A)
        small.engines[A].breaks["prove"] = Fault("other words")
        small.orders.carry_out(Prove(A, N, Proof.FREEZE), group)
        await asyncio.sleep(5.0)
        assert told == [ProveEnded(A, N, Proof.FREEZE, holds=False, detail="other words")]


@jumping
async def test_an_engine_that_broke_over_a_proof_is_a_failure() -> None:
    async with orders() as (small, group, told):
        small.found(A)
        small.engines[A].breaks["prove"] = Fault("no answer")
        small.engines[A].hung = True
        small.orders.carry_out(Prove(A, N, Proof.FREEZE), group)
        await asyncio.sleep(5.0)
        (event,) = told
        assert isinstance(event, ProveEnded)
        assert event.failure == Failure('"a" hangs')


@jumping
async def test_an_engine_that_did_not_end_what_it_was_told_is_not_asked_again() -> None:
    """The order may still be under way in it, whatever it says of itself."""
    async with orders() as (small, group, told):
        small.found(A)
        small.engines[A].breaks["prove"] = Hung("vLLM did not answer /sleep within 180 s")
        small.orders.carry_out(Prove(A, N, Proof.FREEZE), group)
        await asyncio.sleep(5.0)
        (event,) = told
        assert isinstance(event, ProveEnded)
        assert event.failure == Failure("vLLM did not answer /sleep within 180 s")


# ---------------------------------------------------------------- watching


@jumping
async def test_a_death_is_reported_once_and_at_once() -> None:
    async with Small().running() as small:
        await small.until_booted()
        await asyncio.sleep(3.0)
        small.engines[A].end(Exit(0, "exited with code 0"))
        await asyncio.sleep(0.0)
        await small.until(lambda: bool(small.told(EngineDied)))
        await asyncio.sleep(5.0)
        (event,) = small.told(EngineDied)
        assert isinstance(event, EngineDied)
        assert event.exit == Exit(0, "exited with code 0")
        assert "exited with code 0" in event.failure.message


@jumping
async def test_a_hang_is_reported_once_after_its_strikes() -> None:
    async with Small().running() as small:
        await small.until_booted()
        small.engines[A].hung = True
        began = small.loop.time()
        await small.until(lambda: bool(small.told(EngineDied)))
        assert 10.0 < small.loop.time() - began <= 20.5
        await asyncio.sleep(STOP_S)
        (event,) = small.told(EngineDied)
        assert isinstance(event, EngineDied)
        assert event.failure.message == '"a" hangs'
        assert event.exit is None


@jumping
async def test_one_failed_probe_is_forgiven() -> None:
    async with Small().running() as small:
        await small.until_booted()
        engine = small.engines[A]
        engine.hung = True
        await small.until(lambda: len(engine.probes) > 0)
        engine.hung = False
        await asyncio.sleep(100.0)
        assert not small.told(EngineDied)


@jumping
async def test_no_probe_disturbs_an_order() -> None:
    async with Small().running() as small:
        await small.until_booted()
        engine = small.engines[B]
        engine.probes.clear()
        began = small.loop.time()

        async def long_wake(level: SleepLevel, *, frozen: bool, roused: bool) -> None:
            await asyncio.sleep(95.0)
            engine.asleep = False

        engine.wake = long_wake  # type: ignore[method-assign]
        small.scheduler.operate(Act.SWITCH, B, by="me")
        await small.until(lambda: isinstance(small.engine(B).phase, Awake))
        during = [at for at in engine.probes if began + 3.0 < at < small.loop.time() - 0.5]
        assert during == []
        await asyncio.sleep(11.0)
        assert engine.probes


@jumping
async def test_a_watch_that_cannot_watch_says_so_and_the_daemon_lives(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with orders() as (small, group, told):
        small.found(A)
        small.engines[A].breaks["gone"] = OSError("no pidfd")
        small.orders.carry_out(Watch(A, 1), group)
        await asyncio.sleep(1.0)
        (event,) = told
        assert isinstance(event, EngineDied)
        assert "no pidfd" in event.failure.message
    assert "unexpected" in caplog.text


@jumping
async def test_a_stop_ends_the_watch_first() -> None:
    async with orders() as (small, group, told):
        small.found(A)
        small.orders.carry_out(Watch(A, 1), group)
        await asyncio.sleep(1.0)
        small.orders.carry_out(STOP, group)
        await asyncio.sleep(20.0)
        assert told == [StopEnded(A, OrderId(8))]


# ---------------------------------------------------------------- races


async def _after(seconds: float, result: str, ended: list[str]) -> str:
    try:
        await asyncio.sleep(seconds)
    finally:
        ended.append(result)
    return result


@jumping
async def test_the_first_of_two_wins_and_the_other_is_cancelled() -> None:
    ended: list[str] = []
    assert await first(_after(5.0, "one", ended), _after(2.0, "other", ended)) == "other"
    assert sorted(ended) == ["one", "other"]
    assert asyncio.get_running_loop().time() == 2.0


@jumping
async def test_a_race_leaves_no_cancellation_behind() -> None:
    await first(_after(1.0, "one", []), _after(2.0, "other", []))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await first(_after(5.0, "one", []), _after(6.0, "other", []))


@jumping
async def test_a_race_ends_even_in_the_turn_of_its_cancellation() -> None:
    for turns in range(1, 8):  # before its own first turn it holds no race
        async with asyncio.TaskGroup() as group:
            race = first(_after(0.0, "one", []), _after(1.0, "other", []))
            task = group.create_task(race)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.result() == "one"


@jumping
async def test_an_error_of_the_first_passes_through_as_it_is() -> None:
    async def breaks() -> None:
        raise KeyError("surprise")

    with pytest.raises(KeyError):
        await first(breaks(), _after(2.0, "other", []))


@jumping
async def test_an_engine_that_stops_listening_in_an_order_is_lost_in_seconds() -> None:
    """A vLLM whose core dies during a control call never answers that call (zombie)."""
    small = Small()
    async with small.running():
        await small.until_booted()
        small.scheduler.operate(Act.SWITCH, B, by="test")
        await small.until(lambda: isinstance(small.engine(A).phase, FallingAsleep))
        engine, began = small.engines[A], small.loop.time()
        engine.hung, engine.up = True, False
        await small.until(lambda: small.engine(A).failures > 0)
        assert small.loop.time() - began < 15.0


@jumping
async def test_an_order_that_takes_far_longer_than_usual_is_given_up() -> None:
    small = Small()
    async with small.running():
        await small.until_booted()
        small.engines[A].hung = True
        began = small.loop.time()
        small.scheduler.operate(Act.SWITCH, B, by="test")
        await small.until(lambda: small.engine(A).failures > 0)
        assert small.loop.time() - began < 60.0


# ---------------------------------------------------------------- questions out of turn


def asked(small: Small, model: ModelId) -> int:
    return small.engines[model].calls.count("speak")


@jumping
async def test_an_engine_that_answers_everything_but_prompts_is_lost() -> None:
    async with Small().running() as small:
        await small.until_booted()
        small.engines[A].breaks["speak"] = Fault("no word came")
        for _ in range(5):  # as many as waited in vain
            small.scheduler.post(EngineSilent(A, small.engine(A).incarnation, 600.0))
        await small.until(lambda: small.engine(A).failures == 1)
        (event,) = small.told(EngineDied)
        assert isinstance(event, EngineDied)
        assert event.failure.message == "no word came"
        assert asked(small, A) == 1
        assert "a said nothing for 10 min; asking it for a word" in small.lines
        del small.engines[A].breaks["speak"]
        await small.until(lambda: isinstance(small.engine(A).phase, Awake))


@jumping
async def test_an_engine_that_says_a_word_was_only_slow() -> None:
    async with Small().running() as small:
        await small.until_booted()
        for _ in range(2):
            small.scheduler.post(EngineSilent(A, small.engine(A).incarnation, 600.0))
            await asyncio.sleep(5.0)
        assert asked(small, A) == 2
        assert not small.told(EngineDied)


@jumping
async def test_news_of_an_engine_that_sleeps_or_is_another_by_now_mean_nothing() -> None:
    async with Small().running() as small:
        await small.until_booted()
        small.scheduler.post(EngineSilent(B, small.engine(B).incarnation, 600.0))
        small.scheduler.post(EngineSilent(A, small.engine(A).incarnation - 1, 600.0))
        small.scheduler.post(EngineSilent(ModelId("gone"), 1, 600.0))
        await asyncio.sleep(5.0)
        assert asked(small, A) == asked(small, B) == 0


@jumping
async def test_a_question_that_a_sleep_overtook_is_no_news() -> None:
    async with Small().running() as small:
        await small.until_booted()

        async def speak() -> None:
            await asyncio.sleep(30.0)
            raise Fault("asleep by now")

        small.engines[A].speak = speak  # type: ignore[method-assign]
        small.scheduler.post(EngineSilent(A, small.engine(A).incarnation, 600.0))
        small.scheduler.operate(Act.SLEEP, A, by="me")
        await asyncio.sleep(40.0)
        assert not small.told(EngineDied)


@jumping
async def test_a_question_that_breaks_in_an_unexpected_way_counts_as_no_answer() -> None:
    async with Small().running() as small:
        await small.until_booted()
        small.engines[A].breaks["speak"] = RuntimeError("a bug")
        small.scheduler.post(EngineSilent(A, small.engine(A).incarnation, 600.0))
        await small.until(lambda: bool(small.told(EngineDied)))
