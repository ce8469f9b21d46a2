"""Results and failures of orders, drains, freezes and proofs."""

from typing import Any

from msgspec.structs import replace

from homegptd.core.commands import Cut, Grant, Probe, Prove, Sleep, Start, Stop, Wake, Watch
from homegptd.core.events import (
    EngineDied,
    EngineSilent,
    ProveEnded,
    SleepEnded,
    StartEnded,
    TicketClosed,
    WakeEnded,
)
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    Down,
    Draining,
    Failure,
    ModelId,
    OnDeadline,
    OrderId,
    Policy,
    Proof,
    SleepMode,
    Starting,
    Stopping,
    TicketId,
    Traits,
)
from tests.core.builders import ONE, TRAITS, TWO, Run, asleep, awake, box, down, ticket

A = ModelId("a")
NOTHING = replace(TRAITS, proofs={})
EAGER = Policy(patience_s=0.0, residency_s=0.0, drain_s=10.0, max_answer_s=60.0, freeze_max_s=30.0)


def test_a_late_result_of_a_replaced_order_is_dropped() -> None:
    run = Run(box(a=asleep(), b=asleep()))
    run.request(1, "a")
    order = run.orders["a"].order
    for late in (
        WakeEnded(A, OrderId(order + 1)),
        SleepEnded(A, order),
        StartEnded(A, order, TRAITS),
        ProveEnded(A, order, Proof.FREEZE, holds=True),
    ):
        assert run(late) == ()
    assert run.done("a") == (Grant(TicketId(1)),)


def test_a_replaced_start_cannot_end_the_next_one() -> None:
    run = Run(box(a=down()))
    run.ask(Act.START, "a")
    first = run.orders["a"].order
    run.ask(Act.STOP, "a")
    run.done("a")
    run.ask(Act.START, "a")
    run(StartEnded(A, first, TRAITS))
    assert isinstance(run.phase("a"), Starting)


def test_failures_in_a_row_back_off_and_then_break_the_circuit() -> None:
    policy = Policy(backoff_s=5.0, backoff_max_s=12.0, max_failures=4)
    run = Run(box(policy, a=down()))
    run.ask(Act.START, "a")
    pauses = []
    for _ in range(4):
        run.fails("a")
        run.done("a")
        phase = run.phase("a")
        assert isinstance(phase, Down)
        pauses.append(None if phase.retry_at is None else phase.retry_at - run.now + 1.0)
        if phase.retry_at is not None:
            assert [type(c) for c in run.wait(phase.retry_at - run.now)] == [Start]
    assert pauses == [5.0, 10.0, 12.0, None]


def test_an_answer_that_is_served_ends_the_row_of_failures() -> None:
    run = Run(box(a=awake(1, failures=3)))
    run(TicketClosed(TicketId(1), served=False))
    assert run.engine("a").failures == 3
    run.request(2, "a")
    run(TicketClosed(TicketId(2), served=True))
    assert run.engine("a").failures == 0


def test_a_lasting_failure_is_not_tried_again() -> None:
    run = Run(box(a=awake()))
    run(EngineDied(A, 1, Failure("no such binary", lasting=True)))
    run.done("a")
    assert run.last.wake_at is None
    assert run.phase("a").retry_at is None


def test_what_died_is_restored_when_the_box_is_quiet_and_not_before() -> None:
    run = Run(box(Policy(restore_after_s=30.0), a=awake(1), b=asleep()))
    run(EngineDied(ModelId("b"), 1, Failure("killed")))
    run.done("b")
    run(TicketClosed(TicketId(1)))
    assert run.wait(29.0) == ()
    assert [type(c) for c in run.wait(1.0)] == [Sleep]
    run.done("a")
    run.done("b", 60.0)
    assert [type(c) for c in run.done("b")] == [Wake]  # a again
    assert run.orders["a"].model == "a"


def test_a_put_off_restore_still_serves_a_request_at_once() -> None:
    run = Run(box(EAGER, a=awake(1), b=asleep()))
    run(EngineDied(ModelId("b"), 1, Failure("killed")))
    run.done("b")
    assert run.request(2, "b") == ()
    run(TicketClosed(TicketId(1)))
    run.done("a")
    assert isinstance(run.orders["b"], Start)


def test_a_stop_that_leaves_something_behind_is_tried_again_and_stays_charged() -> None:
    run = Run(box(a=awake(), b=asleep()))
    run.ask(Act.STOP, "a")
    run.fails("a", "pid 7 survives SIGKILL")
    run.request(1, "b")
    assert "b" not in run.orders
    assert [type(c) for c in run.wait(30.0)] == [Stop]
    run.done("a")
    assert isinstance(run.orders["b"], Wake)


def test_a_dead_engine_is_cleared_away_while_another_starts() -> None:
    run = Run(box(a=asleep(), b=down()))
    run.ask(Act.START, "b")
    assert [type(c) for c in run(EngineDied(A, 1, Failure("killed")))] == [Stop]


# ---------------------------------------------------------------- drains


def busy(policy: Policy = EAGER, *, traits: Traits = TRAITS, stream: bool = True) -> Run:
    """`a` answers ticket 1 and is drained for ticket 2."""
    state = box(policy, a=awake(1, traits=traits), b=asleep())
    one = ticket(1, "a", freezable=stream)
    run = Run(replace(state, granted={one.id: one}))
    run.request(2, "b")
    assert isinstance(run.phase("a"), Draining)
    return run


def test_past_the_drain_deadline_proved_streams_are_frozen_and_go_on() -> None:
    run = busy()
    assert run.wait(9.0) == ()
    (sleep,) = run.wait(1.0)
    assert (sleep.level, sleep.mode) == (ONE, SleepMode.KEEP)
    run.done("a")
    assert run.phase("a").frozen == {1}
    run.done("b")
    run(TicketClosed(TicketId(2), served=True))
    run.done("b")
    assert run.orders["a"].frozen
    run.done("a")
    assert run.phase("a").leases == {1}


def test_what_may_not_be_frozen_is_waited_for_until_it_is_too_long() -> None:
    unproved = replace(TRAITS, proofs={})
    for run in (
        busy(traits=unproved),
        busy(stream=False),
        busy(traits=replace(TRAITS, can_keep=False)),
        busy(replace(EAGER, on_deadline=OnDeadline.WAIT)),
    ):
        assert run.wait(10.0) == ()
        assert run.last.wake_at == 160.0
        assert [type(c) for c in run.wait(50.0)] == [Cut]


def test_the_operators_word_stands_for_the_proof() -> None:
    run = busy(replace(EAGER, on_deadline=OnDeadline.FREEZE), traits=replace(TRAITS, proofs={}))
    assert run.wait(10.0)[0].mode is SleepMode.KEEP


def test_cut_on_deadline_cuts_and_aborts_what_does_not_end() -> None:
    run = busy(replace(EAGER, on_deadline=OnDeadline.CUT))
    assert [type(c) for c in run.wait(10.0)] == [Cut]
    assert run.wait(5.0)[0].mode is SleepMode.ABORT


def test_frozen_answers_are_cut_when_their_time_is_up_or_their_engine_dies() -> None:
    for event in ("time", "death"):
        run = busy()
        run.wait(10.0)
        run.done("a")
        run.request(3, "b", freezable=False)
        run.done("b")
        died = EngineDied(A, 1, Failure("killed"))
        commands = run.wait(30.0) if event == "time" else run(died)
        assert [c.ticket for c in commands if isinstance(c, Cut)] == [1]


def test_a_frozen_engine_is_not_stopped_until_its_answers_have_ended() -> None:
    run = busy()
    run.wait(10.0)
    run.done("a")
    run.ask(Act.STOP, "a")
    assert isinstance(run.phase("a"), Asleep)
    run.done("b")
    run(TicketClosed(TicketId(2)))
    run.done("b")
    run.done("a")
    assert isinstance(run.phase("a"), Draining)
    assert [type(c) for c in run(TicketClosed(TicketId(1)))] == [Stop]


def test_stop_now_cuts_the_frozen() -> None:
    run = busy()
    run.wait(10.0)
    run.done("a")
    run.done("b")
    assert [type(c) for c in run.ask(Act.STOP, "a", cut=True)][:2] == [Cut, Stop]


# ---------------------------------------------------------------- proofs


def test_a_quiet_engine_proves_freezing_once() -> None:
    run = Run(box(Policy(prove_after_s=30.0), a=awake(traits=replace(TRAITS, proofs={}))), 20.0)
    assert run.wait(9.0) == ()
    assert run.wait(1.0) == (Prove(A, OrderId(1), Proof.FREEZE),)
    run.done("a")
    assert run.engine("a").traits.proofs == {Proof.FREEZE: True}
    assert run.wait(1000.0) == ()


def loaded(**given: Any) -> Run:
    """`a` was loaded by an operator, and has proved nothing yet."""
    run = Run(box(a=down(**given), b=asleep()))
    run.ask(Act.START, "a")
    return run


def test_an_engine_proves_freezing_once_when_it_is_loaded_before_its_first_sleep() -> None:
    run = loaded()
    (_, prove) = run.done("a", traits=NOTHING)
    assert prove == Prove(A, prove.order, Proof.FREEZE)
    assert [type(c) for c in run.done("a")] == [Sleep]
    run.done("a")
    run.ask(Act.STOP, "a")
    run.done("a")
    run.ask(Act.START, "a")
    assert [type(c) for c in run.done("a")] == [Watch, Sleep]  # the store knows it


def test_a_load_proves_nothing_while_anybody_waits() -> None:
    run = loaded()
    run.request(1, "b")
    assert [type(c) for c in run.done("a", traits=NOTHING)] == [Watch, Sleep]
    run = loaded()
    run.ask(Act.SWITCH, "b")
    assert [type(c) for c in run.done("a", traits=NOTHING)] == [Watch, Sleep]


def test_a_request_that_comes_during_a_proof_is_served_after_it() -> None:
    run = loaded()
    run.done("a", traits=NOTHING)
    assert run.request(1, "a") == ()
    assert run.done("a")[0] == Grant(TicketId(1))


def test_what_sleeps_at_level_2_proves_no_freezing() -> None:
    both = replace(NOTHING, proofs={Proof.RELOAD: True})
    assert [type(c) for c in loaded(level=TWO).done("a", traits=both)] == [Watch, Sleep]
    run = Run(box(a=awake(level=TWO, traits=both)))
    assert run.wait(1000.0) == ()


def test_a_proof_that_does_not_hold_leaves_the_engine_awake_and_is_not_repeated() -> None:
    run = Run(box(a=awake(traits=replace(TRAITS, proofs={}))))
    order = run.wait(200.0)[0].order
    run(ProveEnded(A, order, Proof.FREEZE, holds=False, detail="other words"))
    assert isinstance(run.phase("a"), Awake)
    assert run.engine("a").unproved == {Proof.FREEZE: "other words"}
    assert run.wait(1000.0) == ()


def test_a_proof_that_breaks_the_engine_restarts_it() -> None:
    run = Run(box(a=awake(traits=replace(TRAITS, proofs={}))))
    run.wait(200.0)
    run.fails("a", "hung")
    assert isinstance(run.phase("a"), Stopping)


def test_nothing_is_proved_that_the_ram_has_no_room_for() -> None:
    fresh = awake(traits=replace(TRAITS, proofs={}), holds_pinned=False)
    run = Run(box(ram=20, a=fresh))
    assert run.wait(1000.0) == ()
    (finish,) = run.ask(Act.PROVE, "a")
    assert "no host RAM" in finish.ended.text


def test_level_2_needs_its_proof() -> None:
    run = Run(box(a=awake(level=TWO)))
    (finish,) = run.ask(Act.SLEEP, "a")
    assert finish.ended.refusal is not None
    proved = replace(TRAITS, proofs={Proof.RELOAD: True, Proof.FREEZE: True})
    run = Run(box(a=awake(level=TWO, traits=proved)))
    assert run.ask(Act.SLEEP, "a")[0].level is TWO


def test_a_cut_says_the_true_reason_and_when_to_ask_again() -> None:
    for deadline, why in (
        (OnDeadline.CUT, "it went on for more than 10 s, and on_deadline is cut"),
        (OnDeadline.WAIT, "it outlived the longest answer allowed"),
    ):
        run = Run(box(replace(EAGER, on_deadline=deadline), a=awake(1), b=asleep()))
        run.request(2, "b")
        run.wait(10.0)
        cut = next(c for c in (*run.last.commands, *run.wait(50.0)) if isinstance(c, Cut))
        assert cut.refusal.message.endswith(why)
        assert cut.refusal.retry_after_s == 5.0
    run = Run(box(a=awake(1)))
    (cut,) = run.ask(Act.STOP, "a", cut=True)
    assert cut.refusal.retry_after_s is None


def test_a_silent_engine_is_asked_only_while_it_is_awake() -> None:
    run = Run(box(a=awake(1), b=asleep()))
    engine = run.engine("a")
    assert run(EngineSilent(ModelId("a"), engine.incarnation, 600.0)) == (
        Probe(ModelId("a"), engine.incarnation),
    )
    assert run(EngineSilent(ModelId("a"), engine.incarnation - 1, 600.0)) == ()
    assert run(EngineSilent(ModelId("b"), run.engine("b").incarnation, 600.0)) == ()
    assert run.phase("a") == engine.phase
