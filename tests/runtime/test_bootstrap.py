"""What runs already is asked what it is, and kept."""

import asyncio

import pytest
from msgspec.structs import replace

from homegptd.core.events import Found, Observed
from homegptd.core.model import Asleep, Awake, SleepLevel, Starting, Traits
from homegptd.core.refusals import Fault
from homegptd.runtime.bootstrap import OBSERVE_S, observe
from tests.runtime.jumping import jumping
from tests.runtime.small import A, B, Small


async def seen(small: Small) -> Observed:
    return await observe(small.units, small.engines, small.orders.identify)


@jumping
async def test_nothing_runs_on_a_fresh_box() -> None:
    assert await seen(Small()) == Observed({})


@jumping
async def test_engines_are_asked_side_by_side() -> None:
    small = Small()
    small.found(A)
    small.found(B, asleep=True)
    levels = frozenset({SleepLevel.ONE})
    awake, asleep = Traits("0.32.0", levels), Traits("0.32.0", levels, asleep=True)
    assert await seen(small) == Observed({A: Found(awake), B: Found(asleep)})
    assert small.loop.time() == pytest.approx(0.1)


@jumping
async def test_one_that_is_not_up_yet_has_no_traits() -> None:
    small = Small()
    small.found(A)
    small.engines[A].up = False
    assert await seen(small) == Observed({A: Found()})


@jumping
async def test_one_that_does_not_say_what_it_is_does_not_hold_up_the_others() -> None:
    small = Small()
    small.found(A)
    small.found(B)

    async def never() -> Traits:
        await asyncio.sleep(1e6)
        raise AssertionError

    small.engines[A].identify = never  # type: ignore[method-assign]
    small.engines[B].breaks["identify"] = Fault("no")
    assert await seen(small) == Observed({A: Found(), B: Found()})
    assert small.loop.time() == OBSERVE_S


@jumping
async def test_one_that_leaves_the_configuration_meanwhile_is_no_defect() -> None:
    small = Small()
    small.found(A)
    small.found(B)
    staying = replace(small.scheduler.state, engines={B: small.engine(B)})
    small.orders.connect(lambda event: None, lambda: staying)
    found = (await seen(small)).found
    assert (found[A], found[B].traits is None) == (Found(), False)


@jumping
async def test_what_was_found_is_adopted_and_nothing_is_started() -> None:
    small = Small()
    small.found(A)
    small.found(B, asleep=True)
    async with small.running():
        await small.until_booted()
        assert isinstance(small.engine(A).phase, Awake)
        assert isinstance(small.engine(B).phase, Asleep)
        assert {"start", "stop", "wake", "sleep"}.isdisjoint(small.engines[A].calls)
        assert {"start", "stop", "wake", "sleep"}.isdisjoint(small.engines[B].calls)


@jumping
async def test_one_found_starting_is_waited_for() -> None:
    small = Small()
    small.found(A)
    small.engines[A].up = False
    async with small.running():
        assert isinstance(small.engine(A).phase, Starting)


@jumping
async def test_an_adopted_sleeper_is_held_to_what_it_said_while_it_was_awake() -> None:
    before = Small()
    before.found(A)
    await seen(before)
    small = Small()
    small.store = before.store
    small.orders = type(small.orders)(
        small.units, small.engines, small.store, start_limit_s=lambda model: 1.0
    )
    small.orders.connect(small.events.append, lambda: small.scheduler.state)
    small.found(A, asleep=True)
    await seen(small)
    assert small.engines[A].canary_reference == "a sings"
