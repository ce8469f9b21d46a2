"""Leases of which the core hears late, or never: nobody can tell the difference."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from homegptd.core.model import Act, Awake
from homegptd.core.quick import LOOK_AGAIN_S
from homegptd.core.refusals import Reason
from homegptd.runtime.lease import Lease
from homegptd.runtime.scheduler import Scheduler
from tests.runtime.jumping import jumping, run
from tests.runtime.small import A, B, Small


def nobody() -> None: ...


def at_once(scheduler: Scheduler, noticed: list[Lease] | None = None) -> Lease:
    def note() -> None:
        if noticed is not None:
            noticed.append(lease)

    found = scheduler.lease_at_once(A, note)
    assert found is not None
    lease = found
    return lease


def by_steps(scheduler: Scheduler) -> Lease:
    lease = scheduler.lease(A, freezable=False)
    scheduler.open(lease)
    return lease


ACTS = st.lists(
    st.one_of(
        st.just("open"),
        st.tuples(st.sampled_from(["served", "left"]), st.integers(0, 5)),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.01, LOOK_AGAIN_S, 1.0, 40.0])),
        st.just("look"),
        st.just("a stream"),
    ),
    max_size=25,
)


@given(ACTS)
@settings(max_examples=150, deadline=None)
def test_the_state_is_what_steps_would_have_made_it(acts: list[str | tuple[str, float]]) -> None:
    run(side_by_side(acts))


async def side_by_side(acts: list[str | tuple[str, float]]) -> None:
    async with Small().running() as one, Small().running() as other:
        await one.until_booted()
        await other.until_booted()
        pairs: list[tuple[Lease, Lease]] = []
        for act in [*acts, "look"]:
            match act:
                case "open":
                    pairs.append((at_once(one.scheduler), by_steps(other.scheduler)))
                case "a stream":
                    pairs.append((by_steps(one.scheduler), by_steps(other.scheduler)))
                case ("wait", seconds):
                    await asyncio.sleep(seconds)
                case ("served" | "left", number) if pairs:
                    for lease in pairs.pop(int(number) % len(pairs)):
                        if act[0] == "served":
                            lease.served()
                        lease.close()
                case "look":
                    assert one.scheduler.state == other.scheduler.state
                case _:
                    pass
        for each in pairs:
            for lease in each:
                lease.close()
        assert one.scheduler.state == other.scheduler.state
        assert one.nothing_is_left()


@jumping
async def test_nobody_is_noticed_who_has_gone() -> None:
    async with Small().running() as small:
        await small.until_booted()
        noticed: list[Lease] = []
        gone, here = at_once(small.scheduler, noticed), at_once(small.scheduler, noticed)
        gone.close()
        assert noticed == []
        assert small.engine(A).phase.leases == {here.ticket.id}
        assert noticed == [here]
        assert small.engine(A).last_used == small.loop.time()
        here.close()
        assert noticed == [here]
        assert small.nothing_is_left()


@jumping
async def test_the_box_looks_what_to_do_soon_after_the_last_one() -> None:
    """As after any other: an engine that is to sleep when idle goes to sleep."""
    async with Small().running() as small:
        await small.until_booted()
        lease = at_once(small.scheduler)
        await asyncio.sleep(10 * LOOK_AGAIN_S)
        lease.close()
        before = small.scheduler._state  # which is no look
        await asyncio.sleep(2 * LOOK_AGAIN_S)
        assert small.scheduler._state is not before
        used = small.scheduler._state.engines[A].last_used
        assert used == small.loop.time() - 2 * LOOK_AGAIN_S


@jumping
async def test_who_wants_another_model_finds_it_in_use_and_can_cut_it() -> None:
    async with Small().running() as small:
        await small.until_booted()
        noticed: list[Lease] = []
        lease = at_once(small.scheduler, noticed)
        small.scheduler.operate(Act.SWITCH, B, by="a test", cut=True)
        assert noticed == [lease]
        assert (await lease.cut).reason is Reason.CUT
        assert small.scheduler.lease_at_once(A, nobody) is None
        lease.close()
        await small.until(lambda: isinstance(small.engine(B).phase, Awake))
        assert small.nothing_is_left()


@jumping
async def test_a_stop_cuts_them_too_and_waits_for_them() -> None:
    async with Small().running() as small:
        await small.until_booted()
        lease = at_once(small.scheduler)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(small.scheduler.idle())
            await asyncio.sleep(0)
            assert small.scheduler.lease_at_once(A, nobody) is None  # it would not be waited for
            assert small.scheduler.cut_all("for a test") == 1
            assert (await lease.cut).reason is Reason.SHUTTING_DOWN
            assert not waiting.done()
            lease.close()


@jumping
async def test_a_stop_that_nobody_has_waited_for_finds_them() -> None:
    async with Small().running() as small:
        await small.until_booted()
        lease = at_once(small.scheduler)
        assert small.scheduler.cut_all("for a test") == 1
        assert lease.cut.done()
        lease.close()
        assert small.nothing_is_left()
