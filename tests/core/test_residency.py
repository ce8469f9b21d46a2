"""Who stays, who goes, and where: likely next, idle, the default, and GPUs lent to others."""

import pytest
from msgspec.structs import replace

from homegptd.core import plans
from homegptd.core.commands import Cut, Finish, Grant, Refuse, Sleep, Start, Stop, Wake
from homegptd.core.events import ConfigChanged, Observed, ShutdownAsked, TicketClosed
from homegptd.core.likely import likely
from homegptd.core.machine import initial
from homegptd.core.memory import Foreign
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    Down,
    Draining,
    Gpu,
    ModelId,
    OrderId,
    Policy,
    Proof,
    Starting,
    Startup,
    Stopping,
    TicketId,
    Waking,
)
from homegptd.core.refusals import Reason
from homegptd.core.story import summary
from tests.core.builders import GB, ONE, TRAITS, TWO, Run, asleep, awake, box, down, engine, spec

A, B, C, D = (ModelId(name) for name in "abcd")
RELOADS = replace(TRAITS, proofs={Proof.RELOAD: True, Proof.FREEZE: True})
GPU_OPS = {"gpus": (Gpu(0),)}


def kinds(commands) -> list[type]:
    return [type(command) for command in commands if not isinstance(command, Finish)]


# ---------------------------------------------------------------- who is likely next


def test_without_a_history_the_one_used_last_is_likeliest() -> None:
    state = box(a=awake(), b=asleep(last_used=2.0), c=asleep(last_used=1.0))
    chances = likely(state, A)
    assert chances[B] == pytest.approx(2 / 3)
    assert chances[C] == pytest.approx(1 / 3)
    assert likely(box(a=awake()), A) == {}


def test_what_followed_before_follows_again() -> None:
    state = box(a=awake(), b=asleep(last_used=2.0), c=asleep(last_used=1.0))
    chances = likely(replace(state, wanted=(A, C, B, A, C, A, C)), A)
    assert chances[C] > 0.7


def test_an_operators_switch_and_a_waiting_client_are_remembered() -> None:
    run = Run(box(a=awake(), b=asleep()))
    run.ask(Act.SWITCH, "b")
    run.done("a")
    run.done("b")
    run.request(1, "a", after=60.0)
    run.done("b")
    run.done("a")
    assert run.state.wanted == (B, A)


def tight(**given):
    """RAM for one sleeper at level 1 beside the awake one; c comes up."""
    sleeper = {"traits": RELOADS, "pinned_mib": 40 * GB}
    return box(
        ram=100,
        a=awake(**sleeper, holds_pinned=False, last_used=9.0, **given),
        b=asleep(**sleeper, last_used=1.0),
        c=down(traits=RELOADS, pinned_mib=1 * GB),
    )


def test_ram_goes_to_the_sleeper_that_is_likely_next() -> None:
    """a will be wanted after c, as ever; b was not wanted for long: its RAM is given back."""
    habit = replace(tight(), wanted=(C, A) * 12, host_mib=91 * GB)
    assert plans.make_room(habit, C, may_displace=lambda e: True) == {A: ONE, B: None}
    other = replace(tight(), wanted=(C, B) * 12, host_mib=91 * GB)
    assert plans.make_room(other, C, may_displace=lambda e: True) == {A: TWO}
    ample = replace(tight(), wanted=(C, A) * 12, host_mib=200 * GB)
    assert plans.make_room(ample, C, may_displace=lambda e: True) == {A: ONE}


def test_a_reload_that_is_slower_than_a_start_is_not_used() -> None:
    slow = tight(took={"wake-2": (300.0,), "start": (40.0,), "wake-1": (2.0,)})
    state = replace(slow, wanted=(C, B) * 12, host_mib=91 * GB)
    assert plans.make_room(state, C, may_displace=lambda e: True) == {A: None}


def test_the_cheapest_to_return_makes_room() -> None:
    small = {"awake_mib": 39 * GB, "last_used": 5.0}
    state = box(
        a=awake(**small, took={"wake-1": (9.0,)}),
        b=awake(**small, took={"wake-1": (1.0,)}),
        c=asleep(awake_mib=38 * GB),
    )
    assert plans.make_room(state, C, may_displace=lambda e: True) == {B: ONE}


# ---------------------------------------------------------------- side by side


def test_an_embedder_does_not_displace_the_llm_that_fits_beside_it() -> None:
    run = Run(box(llm=awake(1), embed=asleep(awake_mib=6 * GB, residue_mib=GB)))
    assert kinds(run.request(2, "embed")) == [Wake]
    assert kinds(run.done("embed")) == [Grant]
    assert isinstance(run.phase("llm"), Awake)
    assert Grant in kinds(run.request(3, "llm"))


def test_the_embedder_stays_when_llms_take_turns() -> None:
    run = Run(box(chat=awake(), coder=asleep(), embed=awake(awake_mib=6 * GB, residue_mib=GB)))
    assert [c.model for c in run.request(1, "coder") if isinstance(c, Sleep)] == ["chat"]
    run.done("chat")
    run.done("coder")
    assert isinstance(run.phase("embed"), Awake)


def two_cards(**engines):
    return box(Policy(patience_s=5.0, residency_s=5.0), gpus=(80, 80), **engines)


BOTH = (Gpu(0), Gpu(1))


def test_a_model_over_two_cards_displaces_who_is_on_each_and_both_come_back() -> None:
    run = Run(two_cards(a=awake(), b=awake(gpus=(Gpu(1),)), tp=asleep(gpus=BOTH)))
    assert kinds(run.request(1, "tp")) == [Sleep, Sleep]
    run.done("a")
    assert kinds(run.done("b")) == [Wake]
    run.done("tp")
    assert kinds(run(TicketClosed(TicketId(1)), after=1.0)) == []
    assert [c.model for c in run.request(2, "b", after=30.0) if isinstance(c, Sleep)] == ["tp"]
    assert kinds(run.done("tp")) == [Wake]
    assert kinds(run.request(3, "a")) == [Wake]  # the other card is free by now


def test_single_models_on_two_cards_move_side_by_side() -> None:
    run = Run(
        two_cards(
            a=awake(),
            b=awake(gpus=(Gpu(1),)),
            c=asleep(),
            d=asleep(gpus=(Gpu(1),)),
        )
    )
    run.request(1, "c")
    run.request(2, "d")
    assert set(run.orders) == {"a", "b"}


# ---------------------------------------------------------------- idleness


def test_an_idle_engine_sleeps_and_later_stops() -> None:
    run = Run(box(a=awake(since=100.0, last_used=100.0, sleep_after_s=60.0, stop_after_s=600.0)))
    assert kinds(run.wait(60.0)) == [Sleep]
    run.done("a")
    assert kinds(run.wait(500.0)) == []
    assert run.last is not None
    assert run.last.wake_at == pytest.approx(700.0)
    assert kinds(run.wait(39.0)) == [Stop]
    run.done("a")
    assert isinstance(run.phase("a"), Down)
    assert run.last.wake_at is None
    assert kinds(run.request(1, "a", after=50.0)) == [Start]


def test_a_sleeper_that_was_never_used_counts_from_its_load() -> None:
    run = Run(box(a=asleep(stop_after_s=600.0, up_since=90.0)))
    assert kinds(run.wait(500.0)) == []
    assert kinds(run.wait(90.0)) == [Stop]


def test_pinned_engines_are_not_stopped_for_idleness() -> None:
    run = Run(box(a=asleep(stop_after_s=10.0, pinned=True), b=awake(stop_after_s=1.0, pinned=True)))
    assert kinds(run.wait(500.0)) == []


def test_somebody_who_asks_keeps_it_from_being_stopped() -> None:
    run = Run(box(a=awake(since=100.0, stop_after_s=60.0), b=asleep()))
    assert Grant in kinds(run.request(1, "a", after=59.0))
    assert kinds(run.wait(10.0)) == []


def home(**given):
    policy = Policy(default=A, return_to_default_s=300.0)
    return replace(box(policy, a=asleep(**given), b=awake(since=50.0)), wanted_at=100.0)


def test_the_default_comes_back_when_nobody_wants_anything() -> None:
    run = Run(home())
    assert kinds(run.wait(299.0)) == []
    assert kinds(run.wait(1.0)) == [Sleep]
    assert kinds(run.done("b")) == [Wake]
    run.done("a")
    assert isinstance(run.phase("a"), Awake)
    assert kinds(run.wait(10_000.0)) == []


def test_it_comes_back_in_the_place_of_an_active_model_too() -> None:
    state = home()
    active = replace(state.engines[B], spec=replace(state.engines[B].spec, startup=Startup.ACTIVE))
    run = Run(replace(state, engines={**state.engines, B: active}))
    assert kinds(run.wait(300.0)) == [Sleep]


def test_each_wish_begins_the_wait_anew() -> None:
    run = Run(home())
    run.request(1, "b", after=200.0)
    run(TicketClosed(TicketId(1), served=True), after=50.0)
    assert kinds(run.wait(299.0)) == []
    assert kinds(run.wait(1.0)) == [Sleep]


def test_it_does_not_come_back_over_answers_pins_or_its_own_rest() -> None:
    busy = Run(replace(home(), engines=home().engines))
    busy.request(1, "b")
    assert kinds(busy.wait(1000.0)) == []
    resting = Run(home(sleep_after_s=60.0))
    assert kinds(resting.wait(1000.0)) == []
    state = home()
    pin = replace(state.engines[B], spec=replace(state.engines[B].spec, pinned=True))
    pinned = Run(replace(state, engines={**state.engines, B: pin}))
    assert kinds(pinned.wait(1000.0)) == []


def test_a_client_who_comes_meanwhile_goes_first() -> None:
    run = Run(home())
    run.wait(300.0)
    run.request(1, "b")
    run.done("b")
    assert set(run.orders) == {"b"}  # it is woken again, not the default


# ---------------------------------------------------------------- free and reclaim


def test_a_freed_gpu_is_emptied_and_nothing_comes_up_there() -> None:
    run = Run(box(a=awake(), b=asleep()))
    assert kinds(run.ask(Act.FREE, "", **GPU_OPS)) == [Sleep]
    (finish,) = [c for c in run.done("a") if isinstance(c, Finish)]
    assert finish.ended.text == (
        "gpu0 is free: 76.0 of 80.0 GB (asleep there: a, b; a stop gives back the rest)"
    )
    (refuse,) = run.request(1, "b")
    assert isinstance(refuse, Refuse)
    assert refuse.refusal.reason is Reason.GPU_FREED
    assert refuse.refusal.message == '"b" is not to be had: root has freed gpu0'
    assert refuse.refusal.hint == "homegptctl reclaim --gpu 0"
    (finish,) = run.ask(Act.SWITCH, "b")
    assert finish.ended.refusal.reason is Reason.GPU_FREED
    assert "gpu0 freed by root" in summary(run.state)
    assert kinds(run.wait(100_000.0)) == []


def test_what_was_awake_wakes_when_it_is_reclaimed() -> None:
    run = Run(box(a=awake(), b=asleep()))
    run.ask(Act.FREE, "")
    run.done("a")
    commands = run.ask(Act.RECLAIM, "")
    assert kinds(commands) == [Wake]
    (finish,) = [c for c in commands if isinstance(c, Finish)]
    assert finish.ended.text == "gpu0 serves models again; a wakes"
    run.done("a")
    assert isinstance(run.phase("a"), Awake)
    assert run.state.freed == {}


def test_answers_end_first_and_are_not_frozen_there() -> None:
    run = Run(box(Policy(drain_s=5.0, max_answer_s=60.0), a=awake(1)))
    assert kinds(run.ask(Act.FREE, "")) == []
    assert isinstance(run.phase("a"), Draining)
    assert kinds(run.wait(30.0)) == []
    assert kinds(run(TicketClosed(TicketId(1)))) == [Sleep]


def test_with_now_they_are_cut() -> None:
    run = Run(box(a=awake(1)))
    assert kinds(run.ask(Act.FREE, "", cut=True)) == [Cut]


def test_who_waits_or_is_half_way_is_told_at_once() -> None:
    run = Run(box(a=awake(1), b=asleep()))
    run.request(2, "b")
    run.ask(Act.SWITCH, "b")
    commands = run.ask(Act.FREE, "")
    assert [c.refusal.reason for c in commands if isinstance(c, Refuse)] == [Reason.GPU_FREED]
    assert [c.ended.operation.act for c in commands if isinstance(c, Finish)] == [Act.SWITCH]


def test_a_start_under_way_is_broken_off_and_loaded_later() -> None:
    run = Run(box(a=engine(Starting(OrderId(1), 0.0))))
    assert kinds(run.ask(Act.FREE, "")) == [Stop]
    assert kinds(run.done("a")) == []
    assert kinds(run.ask(Act.RECLAIM, "")) == [Start]


def test_what_cannot_sleep_is_stopped() -> None:
    run = Run(box(a=awake(traits=replace(TRAITS, levels=frozenset()))))
    assert kinds(run.ask(Act.FREE, "")) == [Stop]
    run.done("a")
    assert kinds(run.ask(Act.RECLAIM, "")) == [Start]


def test_frozen_answers_wake_to_end_and_then_it_is_free() -> None:
    frozen = engine(Asleep(ONE, 0.0, frozenset({TicketId(1)}), 900.0))
    run = Run(box(a=frozen))
    assert kinds(run.ask(Act.FREE, "")) == [Wake]
    assert kinds(run.done("a")) == []
    assert isinstance(run.phase("a"), Draining)
    assert kinds(run(TicketClosed(TicketId(1)))) == [Sleep]
    assert [c for c in run.done("a") if isinstance(c, Finish)]


def test_the_other_card_serves_on() -> None:
    run = Run(two_cards(a=awake(), b=asleep(gpus=(Gpu(1),)), tp=asleep(gpus=BOTH)))
    run.ask(Act.FREE, "", **GPU_OPS)
    assert kinds(run.request(1, "b")) == [Wake]
    assert [type(c) for c in run.request(2, "tp")] == [Refuse]
    run.done("a")
    assert kinds(run.done("b")) == [Grant]


def test_a_pinned_model_goes_too_for_its_operator() -> None:
    run = Run(box(a=awake(pinned=True)))
    assert kinds(run.ask(Act.FREE, "")) == [Sleep]


def test_a_reclaim_in_the_middle_ends_the_free() -> None:
    run = Run(box(Policy(max_answer_s=600.0), a=awake(1)))
    run.ask(Act.FREE, "")
    commands = run.ask(Act.RECLAIM, "")
    assert {c.ended.operation.act for c in commands if isinstance(c, Finish)} == {
        Act.FREE,
        Act.RECLAIM,
    }
    assert isinstance(run.phase("a"), Awake)


def test_a_load_that_a_free_broke_off_is_made_up_for_when_it_is_cancelled() -> None:
    run = Run(initial((spec("a"),), Policy(), {Gpu(0): 80 * GB}, 256 * GB))
    run(Observed())
    run.ask(Act.FREE, "")
    assert isinstance(run.phase("a"), Stopping)
    run.ask(Act.RECLAIM, "")
    assert [c.model for c in run.done("a") if isinstance(c, Start)] == ["a"]


def test_a_model_over_two_gpus_wakes_when_the_second_is_reclaimed() -> None:
    run = Run(box(gpus=(80, 80), a=awake(gpus=(Gpu(0), Gpu(1)))))
    run.ask(Act.FREE, "", gpus=(Gpu(0),))
    run.done("a")
    run.ask(Act.FREE, "", gpus=(Gpu(1),))
    run.ask(Act.RECLAIM, "", gpus=(Gpu(0),))
    assert isinstance(run.phase("a"), Asleep)
    run.ask(Act.RECLAIM, "", gpus=(Gpu(1),))
    assert isinstance(run.phase("a"), Waking)


def test_a_free_counts_what_strangers_hold() -> None:
    run = Run(replace(box(a=down()), foreign={Gpu(0): Foreign(15 * GB, "game (pid 7) 15.0 GB")}))
    (end,) = [c for c in run.ask(Act.FREE, "") if isinstance(c, Finish)]
    assert "gpu0 is free: 65.0 of 80.0 GB (15.0 held by game (pid 7) 15.0 GB)" in end.ended.text


def test_a_daemon_that_comes_back_to_a_freed_gpu_loads_nothing_there() -> None:
    policy = Policy()
    specs = (spec("a"), spec("b", gpus=(Gpu(1),)))
    fresh = initial(specs, policy, {Gpu(0): 80 * GB, Gpu(1): 80 * GB}, 256 * GB)
    lent = box(a=awake())
    run = Run(replace(fresh, freed=freed_by_root(lent)))
    assert [c.model for c in run(Observed()) if isinstance(c, Start)] == ["b"]
    run.done("b")
    run.done("b")
    assert run.state.booted
    assert [c.model for c in run.ask(Act.RECLAIM, "") if isinstance(c, Start)] == ["a"]


def test_a_reclaim_during_a_shutdown_begins_nothing() -> None:
    run = Run(box(a=awake()))
    run.ask(Act.FREE, "")
    run.done("a")
    run(ShutdownAsked())
    assert kinds(run.ask(Act.RECLAIM, "")) == []
    assert run.state.chores == ()


def test_a_card_that_leaves_the_configuration_is_freed_no_more() -> None:
    run = Run(two_cards(a=awake(1), b=awake(1, first=2, gpus=(Gpu(1),))))
    run.ask(Act.FREE, "", gpus=(Gpu(1),))
    specs = tuple(e.spec for e in run.state.engines.values())
    commands = run(ConfigChanged(specs[:1], Policy(), {Gpu(0): 80 * GB}, 256 * GB))
    assert [c.ended.operation.act for c in commands if isinstance(c, Finish)] == [Act.FREE]
    assert run.state.freed == {}


def freed_by_root(state):
    run = Run(state)
    run.ask(Act.FREE, "")
    return run.state.freed


def test_a_plan_says_that_the_gpu_is_freed() -> None:
    state = box(a=awake(), b=asleep())
    plan = plans.plan_switch(replace(state, freed=freed_by_root(state)), B)
    assert not plan.fits
    assert plan.sums == ("gpu0 is freed by root; to use it again: homegptctl reclaim --gpu 0",)
