"""What operators ask: six acts, their ends, and each other."""

import pytest
from msgspec.structs import replace

from homegptd.core.commands import Cut, Finish, Prove, Refuse, Sleep, Start, Stop, Wake
from homegptd.core.events import (
    CancelAsked,
    ConfigChanged,
    Found,
    Observed,
    OperationAsked,
    TicketClosed,
)
from homegptd.core.machine import initial
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    Down,
    Draining,
    Failure,
    FallingAsleep,
    Gpu,
    ModelId,
    Operation,
    OperationId,
    OrderId,
    Policy,
    Proof,
    Proving,
    SleepLevel,
    Starting,
    Startup,
    Stopping,
    TicketId,
    Waking,
)
from homegptd.core.refusals import Reason
from homegptd.core.story import Line, tell
from tests.core.builders import GB, ONE, TRAITS, TWO, Run, asleep, awake, box, down, engine, spec


def everything(run: Run) -> None:
    """Let all orders end well, in the order in which they were given."""
    for _ in range(20):
        if run.orders:
            run.done(next(iter(run.orders)))


def ended(commands) -> Reason | None:
    (finish,) = [c for c in commands if isinstance(c, Finish)]
    refusal = finish.ended.refusal
    return None if refusal is None else refusal.reason


def test_a_switch_drains_sleeps_and_wakes_and_is_done_when_the_model_is_awake() -> None:
    run = Run(box(a=awake(), b=asleep()))
    assert [type(c) for c in run.ask(Act.SWITCH, "b")] == [Sleep]
    assert [type(c) for c in run.done("a")] == [Wake]
    assert ended(run.done("b")) is None
    assert run.phase("b").held_until == run.now + 20.0


def test_a_switch_needs_no_patience() -> None:
    run = Run(box(a=awake(1, since=99.0), b=asleep()))
    run.ask(Act.SWITCH, "b")
    assert isinstance(run.phase("a"), Draining)


def test_a_switch_now_cuts() -> None:
    run = Run(box(a=awake(1), b=asleep()))
    assert [type(c) for c in run.ask(Act.SWITCH, "b", cut=True)] == [Cut]


@pytest.mark.parametrize(
    ("act", "model"), [(Act.SWITCH, "b"), (Act.SWITCH, "c"), (Act.STOP, "a"), (Act.START, "d")]
)
def test_whoever_says_now_later_ends_the_drain_under_way(act: Act, model: str) -> None:
    run = Run(box(a=awake(1), b=asleep(), c=asleep(), d=down()))
    run.ask(Act.SWITCH, "b")
    assert [type(c) for c in run.ask(act, model, cut=True)] == [Cut]
    rest = Stop if act is Act.STOP else Sleep
    assert [type(c) for c in run(TicketClosed(TicketId(1)))] == [rest]
    everything(run)
    assert run.state.operations == ()
    assert run.ended == 2


def test_now_for_another_gpu_leaves_a_drain_alone() -> None:
    one, two = {"gpus": (Gpu(0),)}, {"gpus": (Gpu(1),)}
    run = Run(
        box(gpus=(80, 80), a=awake(1, **one), b=asleep(**one), c=awake(**two), d=asleep(**two))
    )
    run.ask(Act.SWITCH, "b")
    commands = run.ask(Act.SWITCH, "d", cut=True)
    assert [type(c) for c in commands] == [Sleep]
    assert run.wait(1.0) == ()


def test_a_switch_stops_at_a_pin_unless_forced() -> None:
    run = Run(box(a=awake(pinned=True), b=asleep()))
    assert ended(run.ask(Act.SWITCH, "b")) is Reason.PINNED
    assert [type(c) for c in run.ask(Act.SWITCH, "b", force=True)] == [Sleep]


def test_a_wake_displaces_nobody_and_its_failure_hurts_no_request() -> None:
    run = Run(box(a=awake(1), b=asleep()))
    run.request(2, "b")
    commands = run.ask(Act.WAKE, "b")
    assert ended(commands) is Reason.DOES_NOT_FIT
    assert not any(isinstance(c, Refuse) for c in commands)
    assert len(run.state.waiting) == 1


def test_a_sleep_of_what_is_down_is_refused_and_of_a_sleeper_done() -> None:
    run = Run(box(a=asleep(), b=down()))
    assert ended(run.ask(Act.SLEEP, "a")) is None
    assert ended(run.ask(Act.SLEEP, "b")) is Reason.BUSY


@pytest.mark.parametrize(("level", "other"), [(ONE, TWO), (TWO, ONE)])
def test_a_sleeper_changes_its_level_by_waking_only(level: SleepLevel, other: SleepLevel) -> None:
    run = Run(box(a=asleep(level)))
    assert ended(run.ask(Act.SLEEP, "a", level=level)) is None
    (finish,) = run.ask(Act.SLEEP, "a", level=other)
    refusal = finish.ended.refusal
    assert refusal.reason is Reason.BUSY
    assert refusal.message == f'"a" is asleep at level {level} already; wake it first'
    assert refusal.hint == f"homegptctl wake a, then: homegptctl sleep a --level {other}"


def test_a_sleep_at_an_unproved_level_is_refused_and_not_done_at_another() -> None:
    (finish,) = Run(box(a=awake())).ask(Act.SLEEP, "a", level=TWO)
    assert "level 2 is not proved" in finish.ended.text
    only_one = replace(TRAITS, levels=frozenset({ONE}))
    assert ended(Run(box(a=awake(traits=only_one))).ask(Act.SLEEP, "a", level=TWO)) is not None


def test_what_a_load_displaced_may_leave_the_configuration_meanwhile() -> None:
    run = Run(box(a=awake(), b=down(startup=Startup.DISABLED)))
    run.ask(Act.START, "b")
    run.done("a")
    run(
        ConfigChanged((run.engine("b").spec,), run.state.policy, run.state.gpus, run.state.host_mib)
    )
    for name in ("b", "a", "b"):
        run.done(name)
    assert list(run.state.engines) == ["b"]
    assert run.state.chores == ()


def test_why_a_sleep_is_refused_is_about_the_level_that_was_asked_for() -> None:
    proved = replace(TRAITS, proofs={Proof.RELOAD: True})
    run = Run(box(ram=20, a=awake(holds_pinned=False, traits=proved)))
    (end,) = [c for c in run.ask(Act.SLEEP, "a", level=ONE) if isinstance(c, Finish)]
    assert end.ended.text == 'cannot put "a" to sleep: no host RAM left'


def test_pins_that_are_only_assumed_are_no_reason_against_level_2() -> None:
    proved = replace(TRAITS, proofs={Proof.RELOAD: True})
    run = Run(box(ram=30, a=awake(pins_unsure=True, traits=proved), b=asleep(TWO)))
    run.ask(Act.SLEEP, "a", level=TWO)
    assert run.phase("a").level is TWO


def test_a_sleep_at_a_level_without_ram_is_refused() -> None:
    run = Run(box(ram=20, a=awake(holds_pinned=False)))
    assert ended(run.ask(Act.SLEEP, "a", level=ONE)) is Reason.DOES_NOT_FIT


def test_a_start_loads_and_sleeps_even_what_is_disabled() -> None:
    run = Run(box(a=down(enabled=False)))
    assert [type(c) for c in run.ask(Act.START, "a")] == [Start]
    assert [type(c) for c in run.done("a")][-1] is Sleep
    assert ended(run.done("a")) is None
    assert run.engine("a").enabled


def test_a_start_gives_back_the_room_it_borrowed() -> None:
    run = Run(box(a=awake(), b=down()))
    run.ask(Act.START, "b")
    everything(run)
    assert isinstance(run.phase("a"), Awake)
    assert isinstance(run.phase("b"), Asleep)
    assert run.state.chores == ()


def test_a_start_that_fails_or_is_given_up_gives_back_the_room_too() -> None:
    run = Run(box(a=awake(), b=down()))
    run.ask(Act.START, "b")
    run.done("a")
    run.fails("b")
    everything(run)
    assert isinstance(run.phase("a"), Awake)
    run = Run(box(a=awake(), b=down()))
    run.ask(Act.START, "b")
    run(CancelAsked(OperationId(1)))
    everything(run)
    assert isinstance(run.phase("a"), Awake)


def test_a_start_gives_nothing_back_while_somebody_uses_what_it_loaded() -> None:
    run = Run(box(a=awake(), b=down()))
    run.ask(Act.START, "b")
    run.request(1, "b")
    everything(run)
    assert isinstance(run.phase("b"), Awake)
    assert run.state.chores == ()


def test_a_start_of_what_cannot_sleep_leaves_it_awake() -> None:
    run = Run(box(a=awake(), b=down()))
    run.ask(Act.START, "b")
    run.done("a")
    run.done("b", traits=replace(TRAITS, levels=frozenset()))
    assert run.orders == {}
    assert isinstance(run.phase("b"), Awake)


def test_a_start_after_the_circuit_broke_tries_again() -> None:
    run = Run(box(a=down("broken", failures=5)))
    assert [type(c) for c in run.ask(Act.START, "a")] == [Start]
    assert run.engine("a").failures == 0


def test_an_operation_ends_with_the_reason_when_its_engine_fails() -> None:
    run = Run(box(a=down()))
    run.ask(Act.SWITCH, "a")
    commands = run.fails("a", "unknown flag")
    assert ended(commands) is Reason.MODEL_FAILED


def test_a_stop_ends_what_else_was_asked_and_whoever_waited() -> None:
    run = Run(box(a=awake(1, since=99.0), b=asleep()))
    run.request(2, "b")
    run.ask(Act.WAKE, "a")
    commands = run.ask(Act.STOP, "b")
    assert [type(c) for c in commands] == [Refuse, Stop]
    assert ended(run.done("b")) is None
    assert isinstance(run.phase("b"), Down)
    assert run.wait(1000.0) == ()  # nothing brings it back by itself


def test_a_stop_ends_a_start_in_flight() -> None:
    run = Run(box(a=down()))
    run.ask(Act.START, "a")
    commands = run.ask(Act.STOP, "a")
    assert [type(c) for c in commands] == [Finish, Stop]
    assert isinstance(run.phase("a"), Stopping)


@pytest.mark.parametrize("order", ["wake", "sleep", "prove"])
def test_a_stop_now_breaks_off_an_order_in_flight(order: str) -> None:
    run = Run(box(a=asleep() if order == "wake" else awake()))
    run.ask({"wake": Act.WAKE, "sleep": Act.SLEEP, "prove": Act.PROVE}[order], "a")
    (said,) = [line.text for line in told(run, Act.STOP)]
    assert said.endswith("ends first without --now")
    assert isinstance(run.orders["a"], Wake | Sleep | Prove)
    assert [type(c) for c in run.ask(Act.STOP, "a", cut=True)][-1] is Stop
    assert ended(run.done("a")) is None
    assert isinstance(run.phase("a"), Down)


def test_a_stop_now_cuts_what_a_wake_or_a_sleep_holds_frozen() -> None:
    held = frozenset({TicketId(1)})
    for phase in (Waking(OrderId(7), 99.0, ONE, held), FallingAsleep(OrderId(7), 99.0, ONE, held)):
        run = Run(box(a=engine(phase)))
        assert [type(c) for c in run.ask(Act.STOP, "a")] == []
        commands = run.ask(Act.STOP, "a", cut=True)
        assert [type(c) for c in commands] == [Finish, Cut, Stop]


def told(run: Run, act: Act) -> list[Line]:
    before = run.state
    run.ask(act, "a")
    event = OperationAsked(Operation(OperationId(run.asked), act, ModelId("a"), "root", run.now))
    return [line for line in tell(before, event, run.last, run.now) if "asks to" in line.text]


@pytest.mark.parametrize("way", ["wake", "sleep"])
def test_a_switch_now_gives_up_an_order_that_hangs_in_its_way(way: str) -> None:
    run = Run(box(a=asleep() if way == "wake" else awake(), b=asleep()))
    run.request(1, "a" if way == "wake" else "b")
    run.ask(Act.SWITCH, "b", cut=True)
    assert run.wait(2.0) == ()  # an order that goes well ends by itself
    assert run.last.wake_at == 100.0 + 2 * 3.0 + 5.0
    assert [type(c) for c in run.wait(9.0)] == [Stop]
    assert [type(c) for c in run.done("a")][-1] is Wake
    assert run.orders["b"].model == "b"


def test_a_switch_without_now_waits_for_an_order_that_hangs() -> None:
    run = Run(box(a=awake(), b=asleep()))
    run.ask(Act.SWITCH, "b")
    assert run.wait(100.0) == ()


def test_a_stop_forgives_the_failure() -> None:
    run = Run(box(a=down("broken", failures=5)))
    assert ended(run.ask(Act.STOP, "a")) is None
    assert run.phase("a").failure is None


def test_a_proof_on_demand_wakes_proves_and_tells_the_verdict() -> None:
    run = Run(box(a=asleep(traits=replace(TRAITS, proofs={}))))
    run.ask(Act.PROVE, "a")
    run.done("a")
    assert isinstance(run.phase("a"), Proving)
    assert ended(run.done("a")) is None
    assert run.engine("a").traits.proofs[Proof.FREEZE]


def test_a_busy_engine_proves_nothing() -> None:
    run = Run(box(a=awake(1)))
    assert ended(run.ask(Act.PROVE, "a")) is Reason.BUSY


def test_a_cancel_ends_the_operation_and_undoes_what_was_begun_only_for_it() -> None:
    run = Run(box(a=awake(1), b=asleep()))
    run.ask(Act.SWITCH, "b")
    assert ended(run(CancelAsked(OperationId(1)))) is Reason.CANCELLED
    assert isinstance(run.phase("a"), Awake)
    assert run(CancelAsked(OperationId(1))) == ()


def test_of_two_switches_both_are_done_and_the_last_one_stays() -> None:
    run = Run(box(a=asleep(), b=asleep()))
    run.ask(Act.SWITCH, "a")
    run.ask(Act.SWITCH, "b")
    assert ended(run.done("a")) is None
    run.done("a")
    assert ended(run.done("b")) is None
    assert isinstance(run.phase("a"), Asleep)
    assert isinstance(run.phase("b"), Awake)


@pytest.mark.parametrize("first", list(Act))
@pytest.mark.parametrize("second", list(Act))
def test_any_two_operations_on_one_model_both_end(first: Act, second: Act) -> None:
    run = Run(box(a=awake(), b=asleep()))
    run.ask(first, "b")
    run.ask(second, "b")
    everything(run)
    assert run.state.operations == ()


@pytest.mark.parametrize("act", [act for act in Act if not act.of_gpus])
def test_an_operation_on_an_unknown_model_is_refused(act: Act) -> None:
    assert ended(Run(box(a=awake())).ask(act, "zip")) is Reason.UNKNOWN_MODEL


def test_a_start_of_what_starts_is_done_at_once() -> None:
    run = Run(box(a=down()))
    run.ask(Act.SWITCH, "a")
    assert isinstance(run.phase("a"), Starting)
    assert ended(run.ask(Act.START, "a")) is None


def test_failure_texts_name_model_and_cause() -> None:
    run = Run(box(a=down()))
    run.ask(Act.START, "a")
    run.fails("a", "unknown flag --frob")
    assert run.phase("a").failure == Failure("unknown flag --frob")


# ---------------------------------------------------------------- a reload before the first look


@pytest.mark.parametrize("how", ["awake", "asleep", "mute"])
def test_what_left_the_configuration_before_the_first_look_is_stopped_when_found(how: str) -> None:
    run = Run(initial((spec("a"), spec("b")), Policy(), {Gpu(0): 80 * GB}, 256 * GB))
    run(ConfigChanged((spec("b"),), Policy(), {Gpu(0): 80 * GB}, 256 * GB))
    known = replace(TRAITS, asleep=how == "asleep", asleep_level=ONE if how == "asleep" else None)
    commands = run(Observed({ModelId("a"): Found(None if how == "mute" else known)}))
    assert ModelId("a") in {c.model for c in commands if isinstance(c, Stop)}
    assert {chore.model for chore in run.state.chores} <= {ModelId("b")}
    run.done("a")
    assert set(run.state.engines) == {ModelId("b")}


def test_what_left_and_is_not_found_is_gone() -> None:
    run = Run(initial((spec("a"), spec("b")), Policy(), {Gpu(0): 80 * GB}, 256 * GB))
    run(ConfigChanged((spec("b"),), Policy(), {Gpu(0): 80 * GB}, 256 * GB))
    run(Observed({}))
    assert set(run.state.engines) == {ModelId("b")}
    assert {chore.model for chore in run.state.chores} == {ModelId("b")}
