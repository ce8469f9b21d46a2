"""Leases of which the core hears late, or never: nobody can tell the difference."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from homegptd.core.events import ConfigChanged
from homegptd.core.model import Act, Awake, Exit, ModelId, TicketId
from homegptd.core.quick import LOOK_AGAIN_S
from homegptd.core.refusals import Reason
from homegptd.runtime.lease import Lease
from homegptd.runtime.scheduler import Scheduler
from tests.runtime.jumping import jumping, run
from tests.runtime.small import A, B, Small


class Holds:
    """Fits Holder."""

    def __init__(self, model: ModelId = A) -> None:
        self.model = model
        self.ticket, self.since = TicketId(0), 0.0
        self.lease: Lease | None = None

    def noticed(self, lease: Lease) -> None:
        assert self.lease is None
        self.lease = lease

    def close(self, scheduler: Scheduler, *, served: bool = False) -> None:
        if self.lease is None:
            scheduler.brief.let_go(self, served=served)
            return
        if served:
            self.lease.served()
        self.lease.close()


def held(scheduler: Scheduler) -> Holds:
    who = Holds()
    assert scheduler.brief.hold(who)
    return who


def is_noticed(who: Holds) -> bool:
    return who.lease is not None


def by_steps(scheduler: Scheduler) -> Holds:
    who = Holds()
    who.lease = scheduler.lease(A, freezable=False)
    scheduler.open(who.lease)
    return who


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
        scheduler, seen, holders = small.scheduler, list[object](), list[Holds]()
        for act, more in acts:
            match act:
                case "open":
                    who = Holds()
                    if not (brief and scheduler.brief.hold(who)):
                        who = by_steps(scheduler)
                    holders.append(who)
                case "a stream":
                    holders.append(by_steps(scheduler))
                case "wait":
                    await asyncio.sleep(more)
                case "served" | "left" if holders:
                    who = holders.pop(more % len(holders))
                    who.close(scheduler, served=act == "served")
                case "look":
                    seen.append(scheduler.state)
                case "dies":
                    small.engines[A].end(Exit(9, "was killed"))
                case Act():
                    scheduler.operate(act, more, by="a test", cut=True)
                case _:
                    pass
        seen.append(scheduler.state)
        assert all(map(is_noticed, holders))
        seen.append([who.lease.cut.done() for who in holders if who.lease is not None])
        for who in holders:
            who.close(scheduler)
        seen += [scheduler.state, small.lines]
        assert small.nothing_is_left()
    return seen


@jumping
async def test_nobody_is_noticed_who_has_gone() -> None:
    async with Small().running() as small:
        await small.until_booted()
        gone, here = held(small.scheduler), held(small.scheduler)
        gone.close(small.scheduler)
        assert not is_noticed(here)
        assert small.engine(A).phase.leases == {here.ticket}
        assert is_noticed(here)
        assert not is_noticed(gone)
        assert small.engine(A).last_used == small.loop.time()
        here.close(small.scheduler)
        assert small.nothing_is_left()


@pytest.mark.parametrize("noticed", [False, True])
@jumping
async def test_the_box_looks_what_to_do_soon_after_the_last_one(*, noticed: bool) -> None:
    """As after any other: an engine that is to sleep when idle goes to sleep."""
    async with Small().running() as small:
        await small.until_booted()
        who = held(small.scheduler)
        if noticed:
            await asyncio.sleep(10 * LOOK_AGAIN_S)
        who.close(small.scheduler)
        assert is_noticed(who) == noticed
        closed = small.loop.time()
        before = small.scheduler._state  # which is no look
        await asyncio.sleep(2 * LOOK_AGAIN_S)
        assert small.scheduler._state is not before
        used = small.scheduler._state.engines[A].last_used
        assert used == closed


@jumping
async def test_who_wants_another_model_finds_it_in_use_and_can_cut_it() -> None:
    async with Small().running() as small:
        await small.until_booted()
        who = held(small.scheduler)
        small.scheduler.operate(Act.SWITCH, B, by="a test", cut=True)
        assert who.lease is not None
        assert (await who.lease.cut).reason is Reason.CUT
        assert not small.scheduler.brief.hold(Holds())
        who.close(small.scheduler)
        await small.until(lambda: isinstance(small.engine(B).phase, Awake))
        assert small.nothing_is_left()


@jumping
async def test_a_stop_cuts_them_too_and_waits_for_them() -> None:
    async with Small().running() as small:
        await small.until_booted()
        who = held(small.scheduler)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(small.scheduler.idle())
            await asyncio.sleep(0)
            assert not small.scheduler.brief.hold(Holds())  # it would not be waited for
            assert small.scheduler.cut_all("for a test") == 1
            assert who.lease is not None
            assert (await who.lease.cut).reason is Reason.SHUTTING_DOWN
            assert not waiting.done()
            who.close(small.scheduler)


@jumping
async def test_a_stop_that_nobody_has_waited_for_finds_them() -> None:
    async with Small().running() as small:
        await small.until_booted()
        who = held(small.scheduler)
        assert small.scheduler.cut_all("for a test") == 1
        assert who.lease is not None
        assert who.lease.cut.done()
        who.close(small.scheduler)
        assert small.nothing_is_left()


@jumping
async def test_what_was_brief_is_told_in_its_order() -> None:
    async with Small().running() as small:
        await small.until_booted()
        first = held(small.scheduler)
        first.close(small.scheduler)
        await asyncio.sleep(LOOK_AGAIN_S / 2)
        second = held(small.scheduler)
        began = small.loop.time()
        await asyncio.sleep(LOOK_AGAIN_S / 4)
        assert small.engine(A).last_used == began
        second.close(small.scheduler)


@jumping
async def test_one_that_was_served_is_enough_to_trust_an_engine_again() -> None:
    async with Small().running() as small:
        await small.until_booted()
        small.engines[A].end(Exit(9, "was killed"))
        await small.until(lambda: not isinstance(small.engine(A).phase, Awake))
        await small.until(lambda: isinstance(small.engine(A).phase, Awake))
        assert small.engine(A).failures == 1
        served, left = held(small.scheduler), held(small.scheduler)
        served.close(small.scheduler, served=True)
        left.close(small.scheduler)
        assert small.engine(A).failures == 0


@jumping
async def test_one_that_takes_its_time_is_noticed() -> None:
    async with Small().running() as small:
        await small.until_booted()
        first = held(small.scheduler)
        await asyncio.sleep(LOOK_AGAIN_S / 2)
        second = held(small.scheduler)
        await asyncio.sleep(LOOK_AGAIN_S)
        assert is_noticed(first)
        assert is_noticed(second)
        first.close(small.scheduler)
        second.close(small.scheduler)
        assert small.nothing_is_left()


def rests(small: Small, after_s: float) -> None:
    state = small.scheduler.state
    specs = [replace(each.spec, sleep_after_s=after_s) for each in state.engines.values()]
    small.scheduler.post(ConfigChanged(tuple(specs), state.policy, state.gpus, state.host_mib))


@jumping
async def test_a_far_deadline_does_not_put_it_off() -> None:
    async with Small().running() as small:
        await small.until_booted()
        rests(small, 60.0)
        who = held(small.scheduler)
        await asyncio.sleep(2 * LOOK_AGAIN_S)
        assert is_noticed(who)
        who.close(small.scheduler)


@jumping
async def test_it_does_not_put_off_a_near_deadline() -> None:
    async with Small().running() as small:
        await small.until_booted()
        rests(small, 10.0)
        held(small.scheduler).close(small.scheduler)
        await asyncio.sleep(10.0 - LOOK_AGAIN_S / 2)
        who = held(small.scheduler)
        await asyncio.sleep(0.75 * LOOK_AGAIN_S)
        assert is_noticed(who)
        who.close(small.scheduler)


@jumping
async def test_who_was_served_speaks_for_one_life_of_an_engine_only() -> None:
    async with Small().running() as small:
        await small.until_booted()
        held(small.scheduler).close(small.scheduler, served=True)
        small.engines[A].end(Exit(9, "was killed"))
        await small.until(lambda: not isinstance(small.engine(A).phase, Awake))
        await small.until(lambda: isinstance(small.engine(A).phase, Awake))
        held(small.scheduler).close(small.scheduler)
        assert small.engine(A).failures == 1


@jumping
async def test_a_defect_leaves_nobody_in_the_dark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds a model must be able to let it go while the daemon ends."""

    async def ends() -> None:
        async with Small().running() as small:
            await small.until_booted()
            who = held(small.scheduler)
            with monkeypatch.context() as patch:
                patch.setattr("homegptd.runtime.scheduler.quick", lambda *_, **__: None)
                with pytest.raises(AssertionError):
                    small.scheduler.tell_core()
            assert is_noticed(who)
            who.close(small.scheduler)
            await asyncio.sleep(1)

    with pytest.raises(ExceptionGroup) as found:
        await ends()
    assert found.group_contains(AssertionError, match="came to a model")
