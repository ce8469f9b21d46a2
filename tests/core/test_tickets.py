"""Admission, patience and residency, and the end of a ticket wherever it is."""

import pytest
from msgspec.structs import replace

from homegptd.core.commands import Grant, Refuse, Sleep, Start, Wake
from homegptd.core.events import CancelAsked, EngineDied, Observed, TicketClosed
from homegptd.core.machine import initial
from homegptd.core.model import (
    Act,
    Awake,
    Draining,
    Failure,
    Gpu,
    ModelId,
    OperationId,
    OrderId,
    Phase,
    Policy,
    Proof,
    Proving,
    Starting,
    Startup,
    Stopping,
    TicketId,
    Waking,
)
from homegptd.core.refusals import Reason
from tests.core.builders import GB, ONE, Run, asleep, awake, box, down, engine, spec


def refused(commands) -> Reason:
    (refusal,) = commands
    assert isinstance(refusal, Refuse)
    return refusal.refusal.reason


def test_an_awake_model_grants_at_once_and_a_close_leaves_no_lease() -> None:
    run = Run(box(a=awake()))
    assert run.request(1, "a") == (Grant(TicketId(1)),)
    run(TicketClosed(TicketId(1), served=True))
    assert run.phase("a").leases == frozenset()
    assert run.phase("a").idle_since == run.now
    assert run.state.granted == {}


@pytest.mark.parametrize("state", [box(a=awake()), box(a=asleep()), box()])
def test_closing_an_unknown_ticket_means_nothing(state) -> None:
    run = Run(state)
    assert run(TicketClosed(TicketId(9))) == ()
    assert run.state.engines == state.engines


def test_refusals_say_why() -> None:
    run = Run(box(Policy(max_waiting=1), a=awake(1), b=asleep(), c=down(enabled=False)))
    assert refused(run.request(2, "nobody")) is Reason.UNKNOWN_MODEL
    assert refused(run.request(3, "c")) is Reason.MODEL_DISABLED
    assert refused(run.request(4, "b", may_switch=False)) is Reason.BUSY
    run.request(5, "b")
    assert refused(run.request(6, "b")) is Reason.QUEUE_FULL


def test_a_failed_model_refuses_during_its_back_off_and_starts_after_it() -> None:
    run = Run(box(a=down("out of memory", retry_at=130.0, keep_loaded=False)))
    (refusal,) = run.request(1, "a")
    assert refusal.refusal.reason is Reason.MODEL_FAILED
    assert refusal.refusal.retry_after_s == 30.0
    assert [type(c) for c in run.request(2, "a", after=30.0)] == [Start]


@pytest.mark.parametrize(
    "phase",
    [
        Starting(OrderId(7), 99.0),
        Waking(OrderId(7), 99.0, ONE),
        Proving(OrderId(7), 99.0, Proof.FREEZE),
    ],
)
def test_who_may_not_switch_waits_for_a_model_that_comes_up_anyway(phase: Phase) -> None:
    run = Run(box(a=engine(phase, auto_switch=False)))
    assert run.request(1, "a") == ()
    assert run.state.waiting


def test_who_may_not_switch_waits_for_the_bootstrap() -> None:
    specs = (spec("a", auto_switch=False, startup=Startup.ACTIVE),)
    run = Run(initial(specs, Policy(), {Gpu(0): 80 * GB}, 256 * GB))
    assert run.request(1, "a") == ()
    assert [type(c) for c in run(Observed({}))] == [Start]
    assert Grant(TicketId(1)) in run.done("a")


def test_who_may_not_switch_waits_for_a_drain_that_is_undone_and_not_for_a_sleep() -> None:
    for undone in (True, False):
        run = Run(box(a=awake(1, auto_switch=False), b=asleep()))
        run.ask(Act.SWITCH, "b")
        assert run.request(2, "a") == ()
        if undone:
            commands = run(CancelAsked(OperationId(1)))
            assert commands[-1] == Grant(TicketId(2))
        else:
            commands = run(TicketClosed(TicketId(1)))
            assert [type(c) for c in commands] == [Sleep, Refuse]


def test_who_may_not_switch_gets_his_second_try() -> None:
    run = Run(box(a=awake(auto_switch=False)))
    run(EngineDied(ModelId("a"), 1, Failure("killed")))
    assert run.request(1, "a", replay=True) == ()
    assert [type(c) for c in run.done("a")] == [Start]


def test_who_may_not_switch_is_no_reason_to_switch_back() -> None:
    run = Run(box(a=awake(auto_switch=False), b=asleep()))
    run.ask(Act.SWITCH, "b")
    assert refused(run.request(1, "a")) is Reason.BUSY
    run.done("a")
    run.done("b")
    assert refused(run.request(2, "a")) is Reason.BUSY


def test_a_model_that_only_an_operator_may_switch_to_refuses_while_asleep() -> None:
    run = Run(box(a=asleep(auto_switch=False)))
    assert refused(run.request(1, "a")) is Reason.BUSY


def test_who_waits_too_long_is_refused() -> None:
    run = Run(box(Policy(patience_s=10_000.0), a=awake(1), b=asleep()))
    run.request(2, "b")
    assert run.last.wake_at == 700.0
    assert refused(run.wait(600.0)) is Reason.WAITED_TOO_LONG


def test_a_request_too_big_for_the_box_is_refused_with_the_sum() -> None:
    run = Run(box(a=asleep(awake_mib=90 * 1024)))
    (refusal,) = run.request(1, "a")
    assert "needs 90.0 GB on gpu0; 80.0 total = 80.0" in refusal.refusal.message


def test_the_drain_begins_when_both_patience_and_residency_are_over() -> None:
    run = Run(box(a=awake(1, since=95.0), b=asleep()))
    run.request(2, "b")
    assert run.last.wake_at == 115.0  # residency of a, later than the patience until 110
    run.wait(15.0)
    assert isinstance(run.phase("a"), Draining)


def test_an_idle_model_makes_room_at_once() -> None:
    run = Run(box(a=awake(since=99.0), b=asleep()))
    assert [type(c) for c in run.request(1, "b")] == [Sleep]


def test_a_held_model_stays_though_idle() -> None:
    held = awake()
    held = replace(held, phase=replace(held.phase, held_until=125.0))
    run = Run(box(a=held, b=asleep()))
    assert run.request(1, "b") == ()
    assert run.last.wake_at == 125.0
    assert [type(c) for c in run.wait(25.0)] == [Sleep]


def test_a_hang_up_undoes_the_drain_that_was_begun_for_it() -> None:
    run = Run(box(Policy(patience_s=0.0, residency_s=0.0), a=awake(1), b=asleep()))
    run.request(2, "b")
    assert isinstance(run.phase("a"), Draining)
    run(TicketClosed(TicketId(2)))
    assert isinstance(run.phase("a"), Awake)


def test_priority_counts_as_patience_and_not_for_ever() -> None:
    small = {"awake_mib": 70 * 1024}
    run = Run(box(a=awake(1, since=99.0, **small), b=asleep(**small), c=asleep(**small)))
    run.request(2, "b")
    run.request(3, "c", after=5.0, priority=1)
    run(TicketClosed(TicketId(1)))
    run.wait(4.0)
    assert isinstance(run.done("a")[0], Wake)
    assert "c" in run.orders
    late = Run(box(a=awake(1, since=99.0, **small), b=asleep(**small), c=asleep(**small)))
    late.request(2, "b")
    late.request(3, "c", after=11.0, priority=1)
    late(TicketClosed(TicketId(1)))
    late.wait(4.0)
    late.done("a")
    assert "b" in late.orders


def test_an_engine_that_answered_a_moment_ago_is_not_idle_yet() -> None:
    run = Run(box(a=awake(1, since=99.0), b=asleep()))
    run(TicketClosed(TicketId(1)))
    assert run.request(2, "b") == ()
    assert [type(c) for c in run.request(3, "a", after=0.5)] == [Grant]
    run(TicketClosed(TicketId(3)), after=0.5)
    assert run.last.wake_at == 101.0 + 4.0
    assert [type(c) for c in run.wait(4.0)] == [Sleep]


def test_an_engine_that_nobody_used_since_its_wake_makes_room_at_once() -> None:
    run = Run(box(a=awake(since=99.9), b=asleep()))
    assert [type(c) for c in run.request(1, "b")] == [Sleep]


def test_the_priority_of_a_model_counts_for_each_of_its_requests() -> None:
    small = {"awake_mib": 70 * GB}
    for priority, first in ((0, "b"), (1, "c")):
        engines = {"b": asleep(**small), "c": asleep(**small, priority=priority)}
        run = Run(box(a=awake(1, since=99.0, **small), **engines))
        run.request(2, "b")
        run.request(3, "c", after=5.0)
        run(TicketClosed(TicketId(1)))
        run.wait(4.0)
        run.done("a")
        assert first in run.orders


def test_goals_on_different_gpus_go_on_side_by_side() -> None:
    run = Run(box(gpus=(80, 80), a=asleep(gpus=(0,)), b=asleep(gpus=(1,))))
    assert [type(c) for c in run.request(1, "a")] == [Wake]
    assert [type(c) for c in run.request(2, "b")] == [Wake]


def test_an_engine_over_two_gpus_waits_for_both() -> None:
    run = Run(box(gpus=(80, 80), a=awake(gpus=(0,)), b=awake(gpus=(1,)), c=asleep(gpus=(0, 1))))
    assert [c.model for c in run.request(1, "c")] == ["a", "b"]
    run.done("a")
    assert "c" not in run.orders
    run.done("b")
    assert isinstance(run.orders["c"], Wake)


def test_two_sleeps_at_once_do_not_overdraw_the_ram_that_has_room_for_one() -> None:
    """Each plan alone fits; together they would not."""
    fresh = {"holds_pinned": False}
    run = Run(
        box(
            gpus=(80, 80),
            ram=16 + 40 + 19,
            a=awake(gpus=(0,), **fresh),
            b=awake(gpus=(1,), **fresh),
            c=asleep(gpus=(0,)),
            d=asleep(gpus=(1,)),
        )
    )
    run.request(1, "c")
    run.request(2, "d")
    while run.orders:
        run.done(next(iter(run.orders)))  # each step checks the books
    assert len(run.state.granted) == 2


def test_waiters_are_served_when_their_engine_dies_and_comes_back() -> None:
    run = Run(box(a=asleep()))
    run.request(1, "a")
    run.fails("a")
    assert isinstance(run.phase("a"), Stopping)
    run.done("a")
    assert run.done("a", 60.0)[-1] == Grant(TicketId(1))


def test_news_of_an_earlier_incarnation_means_nothing() -> None:
    run = Run(box(a=awake(1, incarnation=3)))
    assert run(EngineDied(ModelId("a"), 2, Failure("old"))) == ()
    assert isinstance(run.phase("a"), Awake)
