"""The owner of the state, on virtual time."""

import asyncio

import pytest
import uvloop

from homegptd.core.draft import Outcome
from homegptd.core.events import Event, Observed
from homegptd.core.machine import initial
from homegptd.core.model import Act, Asleep, Awake, Draining, Gpu, ModelId, Policy, State
from homegptd.core.quick import is_calm, quick
from homegptd.core.refusals import Reason
from homegptd.runtime.lease import Lease, Refused
from homegptd.runtime.scheduler import Scheduler
from tests.core.builders import GB, spec
from tests.runtime.jumping import DeadlockError, jumping, run
from tests.runtime.small import SLEEP_S, WAKE_S, A, B, Small
from tests.runtime.test_brief import Holds


async def ask(scheduler: Scheduler, model: ModelId, seconds: float = 0.0) -> None:
    async with scheduler.lease(model, freezable=True) as lease:
        await asyncio.sleep(seconds)
        lease.served()


def test_the_loop_says_so_when_nothing_can_happen_any_more() -> None:
    async def wait_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(DeadlockError, match="no timer"):
        run(wait_for_ever())


@jumping
async def test_a_lease_on_an_awake_model_costs_no_turn_of_the_loop() -> None:
    async with Small().running() as small:
        await small.until_booted()
        lease = small.scheduler.lease(A, freezable=True)
        with pytest.raises(StopIteration):
            lease.__aenter__().send(None)
        assert small.engine(A).phase.leases == {lease.ticket.id}
        await lease.__aexit__(None, None, None)
        assert small.nothing_is_left()


@jumping
async def test_who_holds_an_engine_at_once_does_or_does_not() -> None:
    async with Small().running() as small:
        hold, who = small.scheduler.brief.hold, Holds(A)
        assert not hold(who)  # it is being brought up
        await small.until_booted()
        assert hold(who)
        assert small.engine(A).phase.leases == {who.ticket}
        state = small.scheduler.state
        assert not hold(Holds(B))
        assert not hold(Holds(ModelId("unknown")))
        assert small.scheduler.state is state  # nobody has asked for anything
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(small.scheduler, B))
            await asyncio.sleep(0.1)
            assert not hold(Holds(A))  # another is waited for
            who.close(small.scheduler, served=True)
            who.close(small.scheduler, served=True)
        assert small.nothing_is_left()


@jumping
async def test_a_lease_on_a_sleeper_waits_for_the_switch() -> None:
    async with Small().running() as small:
        await small.until_booted()
        began = small.loop.time()
        async with small.scheduler.lease(B, freezable=True):
            assert small.loop.time() - began == pytest.approx(SLEEP_S + WAKE_S)
            assert isinstance(small.engine(A).phase, Asleep)
        assert small.nothing_is_left()


def test_timers_that_are_all_but_due_are_no_trouble_for_uvloop() -> None:
    """Its `call_at` gives a handle without an instant for less than half a millisecond."""

    class Idle:
        def carry_out(self, command: object, group: asyncio.TaskGroup) -> None: ...

    async def many() -> None:
        state = initial((spec("a"),), Policy(), {Gpu(0): 80 * GB}, 256 * GB)
        scheduler = Scheduler(state, Idle(), max_wait_s=60.0)
        async with scheduler.running(), asyncio.TaskGroup() as group:
            scheduler.post(Observed({}))
            for part in range(20):
                group.create_task(refused(scheduler, max_wait_s=part / 20_000))

    async def refused(scheduler: Scheduler, max_wait_s: float) -> None:
        with pytest.raises(Refused, match="waited"):
            async with scheduler.lease(ModelId("a"), freezable=True, max_wait_s=max_wait_s):
                pass

    uvloop.run(many())


@jumping
async def test_a_refused_lease_raises_the_refusal_and_leaves_nothing() -> None:
    async with Small().running() as small:
        await small.until_booted()
        with pytest.raises(Refused) as refused:
            await ask(small.scheduler, ModelId("nobody"))
        assert refused.value.refusal.reason is Reason.UNKNOWN_MODEL
        assert small.nothing_is_left()


@jumping
async def test_who_waits_too_long_is_refused_at_that_very_instant() -> None:
    async with Small().running() as small:
        await small.until_booted()
        small.engines[B].breaks["wake"] = asyncio.CancelledError()  # its wake never ends
        began = small.loop.time()
        with pytest.raises(Refused) as refused:
            async with small.scheduler.lease(B, freezable=True, max_wait_s=30.0):
                pass
        assert refused.value.refusal.reason is Reason.WAITED_TOO_LONG
        assert small.loop.time() == began + 30.0


@jumping
async def test_the_timer_follows_the_earliest_wish() -> None:
    async with Small(Policy(default=A, max_answer_s=1000.0)).running() as small:
        await small.until_booted()
        ends: list[float] = []

        async def wait(seconds: float) -> None:
            with pytest.raises(Refused):
                async with small.scheduler.lease(B, freezable=True, max_wait_s=seconds):
                    pass
            ends.append(small.loop.time() - began)

        async with small.scheduler.lease(A, freezable=False):
            began = small.loop.time()
            async with asyncio.TaskGroup() as group:
                for seconds in (9.0, 3.0, 6.0):
                    group.create_task(wait(seconds))
            assert ends == pytest.approx([3.0, 6.0, 9.0])


@pytest.mark.parametrize("turns", range(60))
def test_a_client_may_leave_in_any_turn(turns: int) -> None:
    """Queued, in the very turn of its grant, while answered, or just as it ends."""

    async def main() -> None:
        async with Small().running() as small:
            await small.until_booted()
            async with asyncio.TaskGroup() as group:
                task = group.create_task(ask(small.scheduler, B, 0.1))
                for _ in range(turns):
                    await asyncio.sleep(0)
                    if turns % 3 == 0:
                        await asyncio.sleep(0.05)
                task.cancel()
            assert small.nothing_is_left()

    run(main())


@jumping
async def test_a_cancellation_in_the_turn_of_the_grant_gives_the_lease_back() -> None:
    async with Small().running() as small:
        await small.until_booted()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(small.scheduler, B, 100.0))
            seen: list[bool] = []

            def cancel(lines: object) -> None:
                if isinstance(small.engine(B).phase, Awake) and not seen:
                    seen.append(bool(small.scheduler.state.granted))
                    task.cancel()

            with small.scheduler.watched(cancel):
                await asyncio.wait([task])
        assert seen == [True]
        assert task.cancelled()
        assert small.nothing_is_left()


@jumping
async def test_an_exception_inside_the_block_gives_the_lease_back() -> None:
    async with Small().running() as small:
        await small.until_booted()
        with pytest.raises(ZeroDivisionError):
            async with small.scheduler.lease(A, freezable=True):
                raise ZeroDivisionError
        assert small.nothing_is_left()


@jumping
async def test_only_what_a_quick_step_made_is_taken_for_calm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    def looked(state: State, event: Event, now: float, *, calm: bool) -> Outcome | None:
        taken.append(calm)
        assert is_calm(state) or not calm
        return quick(state, event, now, calm=calm)

    monkeypatch.setattr("homegptd.runtime.scheduler.quick", looked)
    async with Small().running() as small:
        await small.until_booted()
        for _ in range(3):
            async with asyncio.TaskGroup() as group:
                group.create_task(ask(small.scheduler, A, 1.0))
                group.create_task(ask(small.scheduler, A, 1.0))
                await asyncio.sleep(0.5)
                group.create_task(ask(small.scheduler, B, 1.0))
    assert {True, False} == set(taken)


@jumping
async def test_a_drain_is_undone_when_the_one_who_wanted_it_leaves() -> None:
    async with Small().running() as small:
        await small.until_booted()
        async with small.scheduler.lease(A, freezable=False), asyncio.TaskGroup() as group:
            task = group.create_task(ask(small.scheduler, B))
            await small.until(lambda: isinstance(small.engine(A).phase, Draining))
            task.cancel()
            await asyncio.wait([task])
            assert isinstance(small.engine(A).phase, Awake)


@jumping
async def test_a_cut_reaches_the_lease_with_its_reason() -> None:
    async with Small().running() as small:
        await small.until_booted()
        async with small.scheduler.lease(A, freezable=True) as lease:
            small.scheduler.operate(Act.SWITCH, B, by="me", cut=True)
            refusal = await lease.cut
            assert refusal.reason is Reason.CUT
            assert "operator" in refusal.message


@jumping
async def test_an_operation_ends_once_and_can_be_looked_up() -> None:
    async with Small().running() as small:
        await small.until_booted()
        operation = small.scheduler.operate(Act.SWITCH, B, by="me")
        assert small.scheduler.ended(operation.id) is None
        await small.until(lambda: small.scheduler.ended(operation.id) is not None)
        ended = small.scheduler.ended(operation.id)
        assert ended is not None
        assert ended.refusal is None
        assert isinstance(small.engine(B).phase, Awake)


@jumping
async def test_a_cancelled_operation_ends_as_cancelled() -> None:
    async with Small().running() as small:
        await small.until_booted()
        operation = small.scheduler.operate(Act.SWITCH, B, by="me")
        small.scheduler.cancel(operation.id)
        ended = small.scheduler.ended(operation.id)
        assert ended is not None
        assert ended.refusal is not None
        assert ended.refusal.reason is Reason.CANCELLED


@jumping
async def test_a_defect_in_step_ends_the_block_with_it() -> None:
    async def live() -> None:
        async with Small().running() as small:
            await small.until_booted()
            small.loop.call_soon(_post_nonsense, small.scheduler)
            await small.loop.create_future()

    with pytest.raises(ExceptionGroup) as group:
        await live()
    assert group.group_contains(AssertionError)


@jumping
async def test_after_a_defect_no_step_is_taken_any_more() -> None:
    untouched: list[bool] = []

    async def live() -> None:
        async with Small().running() as small:
            await small.until_booted()
            _post_nonsense(small.scheduler)
            before = small.scheduler.state
            small.scheduler.operate(Act.SWITCH, B, by="me")
            untouched.append(small.scheduler.state is before)
            await small.loop.create_future()

    with pytest.raises(ExceptionGroup):
        await live()
    assert untouched == [True]


def _post_nonsense(scheduler: Scheduler) -> None:
    nonsense: Event = "no event"  # type: ignore[assignment]
    with pytest.raises(AssertionError):
        scheduler.post(nonsense)


@jumping
async def test_a_watcher_is_told_each_story_and_nothing_after_its_block() -> None:
    async with Small().running() as small:
        await small.until_booted()
        told: list[str] = []
        with small.scheduler.watched(lambda lines: told.extend(line.text for line in lines)):
            await ask(small.scheduler, B)
        assert told == small.lines[-len(told) :]
        assert any("b is awake" in text for text in told)
        count = len(told)
        await ask(small.scheduler, A)
        assert len(told) == count


@jumping
async def test_idle_returns_when_the_last_answer_has_ended() -> None:
    async with Small().running() as small:
        await small.until_booted()
        await small.scheduler.idle()
        began = small.loop.time()
        async with asyncio.TaskGroup() as group:
            for seconds in (5.0, 9.0):
                group.create_task(ask(small.scheduler, A, seconds))
            await asyncio.sleep(0)
            await small.scheduler.idle()
            assert small.loop.time() == began + 9.0


@jumping
async def test_an_idle_that_was_given_up_harms_nobody() -> None:
    async with Small().running() as small:
        await small.until_booted()
        lease = small.scheduler.lease(A, freezable=True)
        async with lease:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5.0):
                    await small.scheduler.idle()
        assert small.nothing_is_left()


@jumping
async def test_leaving_the_block_cancels_orders_and_the_timer() -> None:
    small = Small()
    async with small.running():
        await asyncio.sleep(1.0)
    assert small.engines[A].calls == ["start"]
    assert len(asyncio.all_tasks()) == 1
    await asyncio.sleep(1000.0)
    assert not small.scheduler.state.booted


@jumping
async def test_a_lease_knows_whether_its_answer_is_frozen() -> None:
    async with Small().running() as small:
        await small.until_booted()
        lease: Lease = small.scheduler.lease(A, freezable=True)
        async with lease:
            assert not lease.frozen


@jumping
async def test_the_journal_gets_the_story_in_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "homegptd")
    small = Small()
    async with small.running():
        await small.until_booted()
    told = [record.journal for record in caplog.records if hasattr(record, "journal")]
    awake = [each for each in told if each.get("PHASE") == "awake" and each["MODEL_ID"] == A]
    assert awake[-1]["WAS"] == "waking"
    assert awake[-1]["KIND"] == "phase"


def test_a_deadline_within_half_a_millisecond() -> None:
    """uvloop makes no timer of so short a time, and its handle cannot tell when it is due."""

    async def waits(small: Small) -> None:
        async with small.scheduler.lease(B, freezable=True, max_wait_s=0.0002):
            pass

    async def two_at_once() -> None:
        small = Small()
        small.found(A)
        async with small.running():
            refused = await asyncio.gather(waits(small), waits(small), return_exceptions=True)
            assert [type(each) for each in refused] == [Refused, Refused]
            assert small.nothing_is_left()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(two_at_once())
