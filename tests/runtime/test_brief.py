"""Leases of which the core hears late, or never: nobody can tell the difference."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from homegptd.core.model import Act, Awake, Exit
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
        st.just(("open", 0)),
        st.just(("open", 0)),
        st.tuples(st.sampled_from(["served", "left"]), st.integers(0, 5)),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.01, LOOK_AGAIN_S, 1.0, 40.0])),
        st.just(("look", 0)),
        st.just(("a stream", 0)),
        st.tuples(st.sampled_from([Act.SWITCH, Act.SLEEP, Act.STOP]), st.sampled_from([A, B])),
        st.just(("dies", 0)),
    ),
    max_size=25,
)


@given(ACTS)
@settings(max_examples=200, deadline=None)
def test_the_state_is_what_steps_would_have_made_it(acts: list[tuple[Any, Any]]) -> None:
    assert run(life(acts, brief=True)) == run(life(acts, brief=False))


async def life(acts: list[tuple[Any, Any]], *, brief: bool) -> list[object]:
    """Every state that is looked at, and the whole story."""
    async with Small().running() as small:
        await small.until_booted()
        scheduler, seen, leases = small.scheduler, list[object](), list[Lease]()
        for act, more in acts:
            match act:
                case "open":
                    lease = scheduler.lease_at_once(A, nobody) if brief else None
                    leases.append(lease or by_steps(scheduler))
                case "a stream":
                    leases.append(by_steps(scheduler))
                case "wait":
                    await asyncio.sleep(more)
                case "served" | "left" if leases:
                    lease = leases.pop(more % len(leases))
                    if act == "served":
                        lease.served()
                    lease.close()
                case "look":
                    seen.append(scheduler.state)
                case "dies":
                    small.engines[A].end(Exit(9, "was killed"))
                case Act():
                    scheduler.operate(act, more, by="a test", cut=True)
                case _:
                    pass
        seen += [scheduler.state, [lease.cut.done() for lease in leases]]
        for lease in leases:
            lease.close()
        seen += [scheduler.state, small.lines]
        assert small.nothing_is_left()
    return seen


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


@jumping
async def test_what_was_brief_is_told_in_its_order() -> None:
    async with Small().running() as small:
        await small.until_booted()
        first = at_once(small.scheduler)
        first.close()
        await asyncio.sleep(LOOK_AGAIN_S / 2)
        second = at_once(small.scheduler)
        began = small.loop.time()
        await asyncio.sleep(LOOK_AGAIN_S / 4)
        assert small.engine(A).last_used == began
        second.close()


@jumping
async def test_one_that_was_served_is_enough_to_trust_an_engine_again() -> None:
    async with Small().running() as small:
        await small.until_booted()
        small.engines[A].end(Exit(9, "was killed"))
        await small.until(lambda: not isinstance(small.engine(A).phase, Awake))
        await small.until(lambda: isinstance(small.engine(A).phase, Awake))
        assert small.engine(A).failures == 1
        served, left = at_once(small.scheduler), at_once(small.scheduler)
        served.served()
        served.close()
        left.close()
        assert small.engine(A).failures == 0
