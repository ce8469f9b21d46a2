"""The books, and the cheapest way to make room."""

import pytest
from msgspec.structs import replace

from homegptd.core import ledger, plans, sums
from homegptd.core.model import (
    Asleep,
    FallingAsleep,
    Gpu,
    ModelId,
    OnDeadline,
    OrderId,
    Policy,
    Proof,
    Starting,
    Stopping,
    TicketId,
    Waking,
)
from homegptd.core.refusals import Reason
from tests.core.builders import GB, ONE, TRAITS, TWO, asleep, awake, box, down, engine

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
ORDER = OrderId(1)
BOTH = replace(TRAITS, proofs={Proof.RELOAD: True})


def on_gpu(one):
    return ledger.charge(one)[Gpu(0)] // GB


def test_memory_is_charged_from_the_order_until_its_answer() -> None:
    assert on_gpu(down()) == 0
    assert on_gpu(asleep()) == 2
    assert on_gpu(engine(Starting(ORDER, 0.0))) == 60
    assert on_gpu(engine(Waking(ORDER, 0.0, ONE))) == 60
    assert on_gpu(engine(FallingAsleep(ORDER, 0.0, ONE))) == 60
    assert on_gpu(engine(Stopping(ORDER, 0.0))) == 60


def test_a_sleeper_that_is_stopped_holds_no_more_than_it_slept_with() -> None:
    assert on_gpu(engine(Stopping(ORDER, 0.0, slept=ONE))) == 2


def test_pinned_ram_stays_on_the_books_at_level_2_and_awake() -> None:
    assert ledger.charge(asleep(TWO))[ledger.HOST] == 24 * GB
    assert ledger.charge(awake())[ledger.HOST] == 24 * GB
    assert ledger.charge(asleep(TWO, holds_pinned=False))[ledger.HOST] == 4 * GB


def test_an_engine_that_spans_gpus_is_charged_on_each() -> None:
    books = ledger.charge(awake(gpus=(Gpu(0), Gpu(1))))
    assert books[Gpu(0)] == books[Gpu(1)] == 60 * GB


def test_a_refusal_shows_the_sum_of_each_place_that_lacks_room() -> None:
    state = box(a=awake(pinned=True), b=asleep(), c=asleep())
    assert sums.lacking(state, B, may_displace=plans.is_not_pinned) == (
        "needs 60.0 GB on gpu0; 80.0 total - 60.0 pinned a - 2.0 residue of c = 18.0;"
        " 20.0 even with c stopped",
    )


def test_a_refusal_counts_who_may_be_displaced_as_asleep() -> None:
    """The issue's own example: the awake one is not what is in the way."""
    state = box(
        gpus=(96,),
        a=asleep(residue_mib=2150),
        b=awake(residue_mib=1946),
        c=awake(awake_mib=38 * GB, pinned=True),
        d=down(),
    )
    assert sums.lacking(state, ModelId("d"), may_displace=plans.is_not_pinned) == (
        "needs 60.0 GB on gpu0; 96.0 total - 2.1 residue of a - 1.9 of b - 38.0 pinned c = 54.0;"
        " 58.0 even with a and b stopped",
    )
    assert sums.lacking(state, ModelId("d"), may_displace=lambda engine: False) == (
        "needs 60.0 GB on gpu0; 96.0 total - 2.1 residue of a - 60.0 awake b - 38.0 pinned c"
        " = -4.1",
    )


def test_host_ram_has_its_sum_too() -> None:
    state = box(ram=27, a=asleep(pinned=True), b=down(awake_mib=20 * GB))
    assert sums.lacking(state, B, may_displace=plans.is_not_pinned) == (
        "needs 4.0 GB of host RAM; 27.0 total - 24.0 weights of a = 3.0",
    )


def test_a_plan_that_fits_shows_how_closely() -> None:
    plan = plans.plan_switch(box(a=awake(), b=asleep(), c=asleep(residue_mib=GB)), B)
    assert plan.sums == (
        "needs 24.0 GB of host RAM; 256.0 total - 24.0 weights of a - 24.0 of c = 208.0,"
        " 184.0 to spare",
        "needs 60.0 GB on gpu0; 80.0 total - 2.0 residue of a - 1.0 of c = 77.0, 17.0 to spare",
    )


def test_there_is_no_plan_for_what_does_not_fit_an_empty_box() -> None:
    assert plans.make_room(box(a=down(awake_mib=81 * GB)), A, may_displace=lambda e: True) is None


def test_the_idle_one_goes_before_the_busy_one() -> None:
    state = box(
        a=awake(1, awake_mib=39 * GB), b=awake(awake_mib=39 * GB), c=asleep(awake_mib=38 * GB)
    )
    assert plans.make_room(state, C, may_displace=lambda e: True) == {B: ONE}


def test_of_two_equals_the_least_recently_used_goes_unless_its_priority_is_higher() -> None:
    small = {"awake_mib": 39 * GB}
    old, young = awake(last_used=1.0, **small), awake(last_used=2.0, **small)
    state = box(a=young, b=old, c=asleep(awake_mib=38 * GB))
    assert plans.make_room(state, C, may_displace=lambda e: True) == {B: ONE}
    precious = replace(old, spec=replace(old.spec, priority=1))
    state = box(a=young, b=precious, c=asleep(awake_mib=38 * GB))
    assert plans.make_room(state, C, may_displace=lambda e: True) == {A: ONE}


def test_the_sleeper_is_stopped_only_where_its_ram_is_needed() -> None:
    state = box(ram=50, a=awake(holds_pinned=False), b=asleep(), c=down())
    assert plans.make_room(state, C, may_displace=lambda e: True) == {A: ONE, B: None}
    state = box(ram=80, a=awake(holds_pinned=False), b=asleep(), c=down())
    assert plans.make_room(state, C, may_displace=lambda e: True) == {A: ONE}


def test_a_plan_names_its_steps_and_how_long_they_should_take() -> None:
    state = box(a=awake(took={"sleep-1": (2.0,)}), b=asleep(took={"wake-1": (4.0,)}))
    plan = plans.plan_switch(state, B)
    assert [(step.do, step.model) for step in plan.steps] == [
        ("sleep", A),
        ("wake", B),
    ]
    assert plan.expected_s == 6.0


def test_a_plan_for_what_comes_up_already_displaces_nobody() -> None:
    a, b = ModelId("a"), ModelId("b")
    phases = {"a": Starting(OrderId(1), 0.0), "b": Asleep(ONE, 0.0)}
    state = box(**{name: engine(phase) for name, phase in phases.items()})
    (step,) = plans.plan_switch(state, a).steps
    assert (step.do, step.why) == ("start", "under way")
    waking = box(b=engine(Waking(OrderId(1), 0.0, ONE)))
    assert [step.do for step in plans.plan_switch(waking, b).steps] == ["wake"]
    assert plans.plan_switch(box(ram=30, a=awake(), c=awake(gpus=(Gpu(1),))), a).steps == ()


def test_a_plan_lets_frozen_answers_end_first() -> None:
    frozen = Asleep(ONE, 0.0, frozenset({TicketId(1)}), 500.0)
    state = box(a=engine(frozen, residue_mib=30 * GB), b=down())
    steps = plans.plan_switch(state, ModelId("b")).steps
    assert [f"{step.do} {step.model}" for step in steps] == [
        "wake a",
        "drain a",
        "stop a",
        "start b",
    ]


def test_a_refusal_is_not_about_pins_where_no_card_is_large_enough() -> None:
    state = box(a=down(awake_mib=100 * GB), b=awake(pinned=True))
    refusal = sums.no_room(state, ModelId("a"), may_displace=plans.is_not_pinned)
    assert refusal.reason is Reason.DOES_NOT_FIT


def test_a_sum_that_lacks_a_little_shows_it() -> None:
    state = box(a=awake(pinned=True, awake_mib=20 * GB + 20), b=asleep(awake_mib=60 * GB))
    (line,) = sums.lacking(state, ModelId("b"), may_displace=plans.is_not_pinned)
    assert line == "needs 60.00 GB on gpu0; 80.00 total - 20.02 pinned a = 59.98"


UNPROVED = replace(TRAITS, proofs={})


@pytest.mark.parametrize(
    ("given", "policy", "why"),
    [
        ({}, Policy(), "1 answer is running, waiting up to 10 s, then frozen"),
        (
            {"traits": UNPROVED},
            Policy(max_answer_s=1800.0),
            "1 answer is running, waiting up to 30 min (freezing is unproved here)",
        ),
        (
            {"traits": replace(TRAITS, proofs={Proof.FREEZE: False})},
            Policy(),
            "1 answer is running, waiting up to 10 min (freezing did not work here)",
        ),
        (
            {"traits": UNPROVED, "on_deadline": OnDeadline.FREEZE, "drain_s": 0.0},
            Policy(),
            "1 answer is running, waiting up to 0.5 s, then frozen",
        ),
        (
            {"on_deadline": OnDeadline.CUT},
            Policy(),
            "1 answer is running, waiting up to 10 s, then cut",
        ),
        (
            {"on_deadline": OnDeadline.WAIT},
            Policy(max_answer_s=5.0),
            "1 answer is running, waiting up to 5 s, then cut",
        ),
        (
            {"traits": replace(TRAITS, levels=frozenset())},
            Policy(max_answer_s=60.0),
            "1 answer is running, waiting up to 60 s (a stop freezes nothing)",
        ),
    ],
)
def test_a_plan_promises_no_time_for_answers_but_says_the_bounds(given, policy, why) -> None:
    plan = plans.plan_switch(box(policy, a=awake(1, **given), b=asleep()), B)
    drain = plan.steps[0]
    assert (drain.do, drain.expected_s, drain.why) == ("drain", None, why)
    assert plan.expected_s is None


def test_a_plan_that_cannot_be_shows_what_lacks() -> None:
    plan = plans.plan_switch(box(a=awake(pinned=True), b=asleep()), B)
    assert plan.steps == ()
    assert not plan.fits
    assert plan.sums == ("needs 60.0 GB on gpu0; 80.0 total - 60.0 pinned a = 20.0",)
