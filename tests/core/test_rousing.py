"""Weights that come back while another engine still answers."""

import pytest
from msgspec.structs import replace

from homegptd.core import figures, forecast, ledger, plans
from homegptd.core.commands import Cut, Finish, Grant, Rouse, Sleep, Start, Stop, Wake
from homegptd.core.events import (
    EngineDied,
    RouseEnded,
    ShutdownAsked,
    SleepEnded,
    TicketClosed,
    WakeEnded,
)
from homegptd.core.memory import HOST, Card, Figure, Held, Kind, Seen, Source
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    Draining,
    Failure,
    FallingAsleep,
    Gpu,
    ModelId,
    OrderId,
    Policy,
    Proof,
    Roused,
    Rousing,
    SleepMode,
    State,
    TicketId,
    Waking,
)
from tests.core.builders import GB, ONE, TRAITS, TWO, Run, asleep, awake, box, engine

A, B, C = (ModelId(name) for name in "abc")
G0 = Gpu(0)
ABLE = replace(TRAITS, can_rouse=True)
NOW = Policy(patience_s=0.0, residency_s=0.0)
TOOK = {"drain": (10.0,), "sleep-1": (2.0,), "wake-1": (4.0,), "rouse-1": (3.0,),
        "wake-roused": (1.0,)}  # fmt: skip


def card(gb: int = 100, *, policy: Policy = NOW, **given) -> State:
    """a answers, and b sleeps: 60 GB awake, 2 asleep, about 22 with its weights alone."""
    engines = {"a": awake(1, traits=ABLE), "b": asleep(traits=ABLE)}
    return box(policy, gpus=(gb,), **{**engines, **given})


def orders(commands) -> list:
    return [c for c in commands if isinstance(c, Rouse | Wake | Sleep | Start | Stop)]


def rousing(state: State | None = None, **wishes) -> Run:
    """Somebody wants b, whose weights come back."""
    run = Run(state or card())
    assert orders(run.request(2, "b", **wishes)) == [Rouse(B, OrderId(1), ONE)]
    assert isinstance(run.phase("a"), Draining)
    assert isinstance(run.phase("b"), Rousing)
    return run


def roused(state: State | None = None, **wishes) -> Run:
    run = rousing(state, **wishes)
    assert orders(run.done("b")) == []
    assert isinstance(run.phase("b"), Roused)
    return run


def close(number: int) -> TicketClosed:
    return TicketClosed(TicketId(number), served=True)


# ---------------------------------------------------------------- a switch


def test_the_weights_come_back_during_the_drain_and_the_rest_afterwards() -> None:
    run = roused()
    assert orders(run(close(1))) == [Sleep(A, OrderId(2), ONE, SleepMode.WAIT)]
    assert orders(run.done("a")) == [Wake(B, OrderId(3), ONE, roused=True)]
    assert Grant(TicketId(2)) in run.done("b")


def test_the_other_falls_asleep_only_when_the_weights_are_there() -> None:
    run = rousing()
    assert orders(run(close(1))) == []
    assert [type(c) for c in orders(run.done("b"))] == [Sleep]


def test_answers_are_frozen_only_when_the_weights_are_there() -> None:
    run = rousing()
    assert orders(run.wait(60.0)) == []
    (sleep,) = orders(run.done("b"))
    assert (sleep.model, sleep.mode) == (A, SleepMode.KEEP)


def test_at_level_2_the_reload_is_done_before_as_well() -> None:
    traits = replace(ABLE, proofs={Proof.RELOAD: True})
    run = Run(card(b=asleep(TWO, traits=traits)))
    assert orders(run.request(2, "b")) == [Rouse(B, OrderId(1), TWO)]
    run.done("b")
    run(close(1))
    assert orders(run.done("a")) == [Wake(B, OrderId(3), TWO, roused=True)]


def test_on_two_cards_the_weights_wait_for_the_one_that_can_sleep_at_once() -> None:
    both = (G0, Gpu(1))
    wide = {"gpus": both, "traits": ABLE}
    idle = awake(traits=ABLE, gpus=(Gpu(1),))
    run = Run(box(NOW, gpus=(100, 100), a=awake(1, traits=ABLE), b=asleep(**wide), c=idle))
    assert [(type(c), c.model) for c in orders(run.request(2, "b"))] == [(Sleep, C)]
    assert [(type(c), c.model) for c in orders(run.done("c"))] == [(Rouse, B)]


def test_an_operators_switch_rouses_too() -> None:
    run = Run(card())
    assert [type(c) for c in orders(run.ask(Act.SWITCH, "b"))] == [Rouse]


# ---------------------------------------------------------------- when not


@pytest.mark.parametrize(
    "state",
    [
        card(80),
        card(policy=replace(NOW, rouse=False)),
        card(b=asleep(traits=TRAITS)),
        card(b=asleep(traits=ABLE, pins_unsure=True)),
        card(b=asleep(traits=ABLE, pinned_mib=40 * GB)),
        card(a=awake(1, traits=ABLE, awake_mib=80 * GB)),
    ],
    ids=["no room", "configured", "old vLLM", "unsure pins", "big weights", "big neighbour"],
)
def test_nothing_is_roused(state: State) -> None:
    run = Run(state)
    assert orders(run.request(2, "b")) == []
    assert isinstance(run.phase("a"), Draining)
    run(close(1))
    run.done("a")
    assert run.orders["b"] == Wake(B, run.orders["b"].order, ONE)


def test_now_waits_for_no_weights() -> None:
    run = Run(card())
    commands = run.ask(Act.SWITCH, "b", cut=True)
    assert orders(commands) == []
    assert any(isinstance(c, Cut) for c in commands)


def test_frozen_answers_wake_in_one_go() -> None:
    """vLLM would let them run as soon as anything of it is awake (before 0.24), and they come back
    soon in any case."""
    frozen = frozenset({TicketId(7)})
    held = engine(Asleep(ONE, 0.0, frozen, 900.0), traits=ABLE)
    run = Run(card(b=held))
    assert orders(run.wait(1.0)) == []
    assert isinstance(run.phase("a"), Draining)


def test_an_idle_engine_just_makes_room() -> None:
    run = Run(card(a=awake(traits=ABLE)))
    assert [(type(c), c.model) for c in orders(run.request(2, "b"))] == [(Sleep, A)]


# ---------------------------------------------------------------- wishes that lapse


def test_if_nobody_wants_it_any_more_the_weights_go_again() -> None:
    run = roused()
    (sleep,) = orders(run(close(2)))
    assert (sleep.model, sleep.level, sleep.mode, sleep.first) == (B, ONE, SleepMode.WAIT, False)
    assert isinstance(run.phase("a"), Awake)
    run.done("b")
    assert isinstance(run.phase("b"), Asleep)
    assert run.engine("b").failures == 0


def test_weights_on_their_way_come_first_and_go_then() -> None:
    run = rousing()
    assert orders(run(close(2))) == []
    assert isinstance(run.phase("a"), Awake)
    assert [(type(c), c.model) for c in orders(run.done("b"))] == [(Sleep, B)]


def test_who_wants_it_again_in_between_waits_for_its_sleep() -> None:
    run = roused()
    run(close(2))
    assert orders(run.request(3, "b")) == []
    assert [(type(c), c.model) for c in orders(run.done("b"))] == [(Rouse, B)]


def test_an_operators_switch_to_a_third_one_comes_first() -> None:
    run = roused(card(c=asleep(traits=ABLE, pinned_mib=60 * GB)))
    assert [(type(c), c.model) for c in orders(run.ask(Act.SWITCH, "c"))] == [(Sleep, B)]
    run.done("b")
    run(close(1))
    run.done("a")
    assert [(type(c), c.model) for c in orders(run.done("c"))] == [(Sleep, C)]  # b is wanted still


def test_it_can_be_stopped() -> None:
    run = roused()
    assert [(type(c), c.model) for c in orders(run.ask(Act.STOP, "b"))] == [(Stop, B)]


def test_in_a_shutdown_it_goes_back_to_sleep() -> None:
    run = roused()
    assert [(type(c), c.model) for c in orders(run(ShutdownAsked()))] == [(Sleep, B)]


def test_a_freed_card_is_empty_only_when_the_weights_are_gone() -> None:
    run = roused()
    commands = run.ask(Act.FREE, "", gpus=(G0,))
    assert [(type(c), c.model) for c in orders(commands)] == [(Sleep, B)]
    run.done("b")
    run(close(1))
    assert any(isinstance(c, Finish) for c in run.done("a"))


# ---------------------------------------------------------------- trouble


def test_what_fails_is_stopped_charged_with_its_weights_and_never_roused_again() -> None:
    run = rousing()
    (stop,) = orders(run.fails("b", "vLLM answered 500 to /wake_up"))
    assert stop.model == B
    assert ledger.charge(run.engine("b"))[G0] < 23 * GB
    run.done("b")
    assert [type(c) for c in orders(run(close(1)))] == [Sleep]
    run.done("a")
    run.done("b", traits=ABLE)
    run(close(2))
    run.request(3, "a")
    run.done("b")
    run.done("a")
    assert orders(run.request(4, "b")) == []
    assert isinstance(run.phase("a"), Draining)


def test_one_that_does_not_go_back_to_sleep_is_not_roused_again() -> None:
    run = roused()
    run(close(2))
    assert [type(c) for c in orders(run.fails("b"))] == [Stop]
    run.done("b")
    assert run.engine("b").learnt.rouses_badly


def test_it_can_die_meanwhile() -> None:
    run = roused()
    incarnation = run.engine("b").incarnation
    (stop,) = orders(run(EngineDied(B, incarnation, Failure("killed"))))
    assert stop.model == B


def test_a_switch_that_dies_after_the_weights_is_a_failure_like_any_other() -> None:
    run = roused()
    run(close(1))
    run.done("a")
    assert [type(c) for c in orders(run.fails("b"))] == [Stop]
    assert not run.engine("b").learnt.rouses_badly


def seen(free_gb: float, total: int = 100) -> Seen:
    used = round((total - free_gb) * GB)
    return Seen({G0: Card("card", total * GB, used)})


def test_where_less_is_free_than_the_books_say_it_stays_asleep() -> None:
    run = rousing()
    crowded = RouseEnded(B, run.orders.pop("b").order, crowded=seen(10.0))
    assert orders(run(crowded)) == []
    assert isinstance(run.phase("b"), Asleep)
    assert isinstance(run.phase("a"), Draining)
    run(close(1))
    assert orders(run.done("a")) == [Wake(B, OrderId(3), ONE)]
    run.done("b")
    run(close(2))
    run.request(3, "a")
    run.done("b")
    run.done("a")
    assert orders(run.request(4, "b")) == [Rouse(B, OrderId(6), ONE)]  # each switch is a new look


def test_a_wake_that_lacks_room_keeps_the_weights() -> None:
    run = roused()
    run(close(1))
    run.done("a")
    wake = run.orders.pop("b")
    run(WakeEnded(B, wake.order, crowded=seen(20.0)))
    assert isinstance(run.phase("b"), Roused | FallingAsleep)


# ---------------------------------------------------------------- books and forecasts


def test_what_it_holds_is_charged_from_the_order_to_its_answer() -> None:
    run = rousing()
    estimated = ledger.charge(run.engine("b"))
    assert 22 * GB <= estimated[G0] <= 23 * GB
    assert estimated[HOST] == ledger.asleep(run.engine("b"), ONE)[HOST]
    run.done("b")
    assert ledger.charge(run.engine("b")) == estimated
    assert ledger.eventual(run.engine("b")) == ledger.asleep(run.engine("b"), ONE)
    run(close(2))
    assert ledger.charge(run.engine("b")) == estimated  # until it sleeps


def test_it_is_never_thought_larger_than_awake() -> None:
    big = asleep(traits=ABLE, pinned_mib=59 * GB)
    assert ledger.roused(big, ONE)[G0] == ledger.awake(big)[G0]


@pytest.mark.parametrize("by_process", [True, False])
def test_what_it_holds_is_learnt_and_nothing_else_by_it(by_process: bool) -> None:
    def held(mib: int, free: int) -> Held:
        return Held(5.0, {G0: mib} if by_process else {}, 24 * GB, {G0: free})

    known = {
        (Kind.AWAKE, G0): Figure(60 * GB, Source.MEASURED),
        (Kind.RESIDUE, G0): Figure(2 * GB, Source.MEASURED),
    }
    b = asleep(traits=ABLE)
    b = replace(b, learnt=replace(b.learnt, figures=known))
    run = rousing(card(b=b))
    order = run.orders.pop("b").order
    before, after = held(2 * GB, 38 * GB), held(17 * GB, 23 * GB)
    run(RouseEnded(B, order, before=before, after=after))
    known = run.engine("b").learnt.figures
    assert known[Kind.ROUSED, G0].mib == 17 * GB
    assert known[Kind.RESIDUE, G0].mib == 2 * GB
    run(close(2))
    run(SleepEnded(B, run.orders.pop("b").order, before=after, after=before))
    assert isinstance(run.phase("b"), Asleep)  # 15 GB came back, and no more were due
    known = run.engine("b").learnt.figures
    assert known[Kind.AWAKE, G0].mib == 60 * GB
    assert known[Kind.ROUSED, G0].mib == 17 * GB
    assert known[Kind.RESIDUE, G0].mib == 2 * GB


def test_what_leaks_is_held_beside_the_weights_too_until_the_process_ends() -> None:
    def held(gb: int) -> Held:
        return Held(5.0, {G0: gb * GB}, 24 * GB, {G0: (100 - gb) * GB})

    b = figures.slept(asleep(traits=ABLE), held(60), held(2))
    b = figures.roused(b, held(2), held(17))
    for _ in range(2):  # and it is not roused in between
        residue = b.learnt.last_residue[G0] // GB
        b = figures.slept(figures.woke(b, held(residue), held(58 + residue)),
                          held(58 + residue), held(residue + 1))  # fmt: skip
    assert b.learnt.figures[Kind.ROUSED, G0].mib == 19 * GB
    assert figures.renewed(b).learnt.figures[Kind.ROUSED, G0].mib == 17 * GB


def test_weights_that_do_not_go_again_are_noticed() -> None:
    run = roused()
    run(close(2))
    kept = Held(5.0, {G0: 22 * GB}, 24 * GB, {G0: 18 * GB})
    (stop,) = orders(run(SleepEnded(B, run.orders.pop("b").order, before=kept, after=kept)))
    assert isinstance(stop, Stop)
    assert run.engine("b").learnt.rouses_badly
    assert run.engine("b").learnt.hoards == 0  # sleeping itself is not in doubt


def test_acts_are_timed_apart() -> None:
    run = roused()
    run(close(1))
    run.done("a")
    run.done("b", after=0.5)
    took = run.engine("b").took
    assert took == {"rouse-1": (1.0,), "wake-roused": (0.5,)}


def test_the_forecast_counts_on_the_weights() -> None:
    now = 100.0
    a = engine(Draining(Awake(0.0), frozenset({TicketId(1)}), now, now + 10.0, None, B), took=TOOK)
    states = [Asleep(ONE, 0.0), Rousing(OrderId(1), now, ONE), Roused(ONE, now)]
    mids = []
    for phase in states:
        state = card(a=a, b=engine(phase, traits=ABLE, took=TOOK))
        span = forecast.eta(state, B, now)
        assert span
        mids.append(span.mid_s)
        assert plans.plan_switch(state, B).steps[-1].do == "wake"
    assert mids == [10.0 + 2.0 + 1.0] * 3


def test_before_a_drain_the_plan_counts_on_them_too() -> None:
    state = card(a=awake(1, traits=ABLE, took=TOOK), b=asleep(traits=ABLE, took=TOOK))
    *_, last = plans.plan_switch(state, B).steps
    assert (last.do, last.expected_s, last.why) == ("wake", 1.0, "its weights come back before")
    idle = card(a=awake(traits=ABLE, took=TOOK), b=asleep(traits=ABLE, took=TOOK))
    *_, last = plans.plan_switch(idle, B).steps
    assert (last.do, last.expected_s) == ("wake", 4.0)


def test_weights_that_take_longer_than_the_drain_are_waited_for() -> None:
    slow = {**TOOK, "rouse-1": (30.0,)}
    span = forecast.eta(card(a=awake(1, took=TOOK), b=asleep(traits=ABLE, took=slow)), B, 100.0)
    assert span
    assert span.mid_s == 30.0 + 2.0 + 1.0


def test_once_awake_it_is_as_if_nothing_had_been() -> None:
    run = roused()
    run(close(1))
    run.done("a")
    assert isinstance(run.phase("b"), Waking)
    run.done("b")
    b = run.phase("b")
    assert isinstance(b, Awake)
    assert b.leases == {TicketId(2)}
