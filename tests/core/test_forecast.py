"""How long until a model is awake, and how sure that is."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from msgspec.structs import replace

from homegptd.core import durations, forecast
from homegptd.core.durations import ZERO, Span
from homegptd.core.events import SleepEnded, TicketClosed
from homegptd.core.model import (
    Awake,
    Draining,
    FallingAsleep,
    Gpu,
    ModelId,
    OrderId,
    Policy,
    SleepLevel,
    Starting,
    Stopping,
    TicketId,
    Waking,
)
from tests.core.builders import GB, ONE, TWO, Run, asleep, awake, box, down, engine, ticket
from tests.properties.test_planner import fleets

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
ORDER = OrderId(1)
TOOK = {
    "start": (50.0,) * 9, "sleep-1": (2.0,) * 9, "wake-1": (4.0,) * 9, "wake-2": (9.0,) * 9,
    "stop": (1.0,) * 9, "drain": (6.0,) * 9,
}  # fmt: skip


def mid(state, model=B, now=100.0) -> float:
    span = forecast.eta(state, model, now)
    assert span is not None
    return span.mid_s


def test_a_history_gives_median_and_tenths() -> None:
    one = awake(took={"wake-1": tuple(float(n) for n in range(1, 21))})
    assert durations.span(one, "wake-1") == Span(3.0, 10.5, 19.0)


def test_a_short_history_is_less_sure_and_none_is_a_guess_by_size() -> None:
    assert durations.span(awake(took={"wake-1": (4.0,)}), "wake-1") == Span(2.0, 4.0, 6.0)
    big, small = awake(pinned_mib=160 * GB), awake(pinned_mib=1 * GB)
    assert durations.takes(big, "wake-1") == 20.5
    assert durations.takes(small, "wake-1") == 3.0
    halves = awake(pinned_mib=160 * GB, gpus=(Gpu(0), Gpu(1)))
    assert durations.takes(halves, "wake-1") == 10.5  # each over its own link


def test_a_first_sleep_is_timed_apart() -> None:
    run = Run(box(a=awake(holds_pinned=False, took={}), b=asleep()))
    run.request(1, "b")
    run.done("a", after=12.0)
    assert run.engine("a").took == {"first-sleep": (12.0,)}
    assert durations.known(run.engine("a"), "sleep-1") == 12.0  # no later one takes longer


def test_a_drain_is_timed_where_answers_ran() -> None:
    run = Run(box(Policy(patience_s=0.0, residency_s=0.0), a=awake(1), b=asleep()))
    run.request(2, "b")
    run(TicketClosed(TicketId(1)), after=3.0)
    assert run.engine("a").took == {"drain": (3.0,)}


def test_awake_now_and_awake_again_at_once() -> None:
    assert forecast.eta(box(b=awake()), B, 100.0) == ZERO
    busy = Awake(0.0, frozenset({TicketId(1)}))
    assert forecast.eta(box(b=engine(Draining(busy, busy.leases, 0.0, 9.0))), B, 100.0) == ZERO


@pytest.mark.parametrize(
    ("engines", "expected_s"),
    [
        ({"b": asleep(took=TOOK)}, 4.0),
        ({"b": asleep(TWO, took=TOOK)}, 9.0),
        ({"b": down(took=TOOK)}, 50.0),
        ({"a": awake(took=TOOK), "b": asleep(took=TOOK)}, 2.0 + 4.0),
        ({"a": awake(1, took=TOOK), "b": asleep(took=TOOK)}, 6.0 + 2.0 + 4.0),
        ({"b": engine(Waking(ORDER, 99.0, ONE), took=TOOK)}, 3.0),
        ({"b": engine(Starting(ORDER, 80.0), took=TOOK)}, 30.0),
        ({"b": engine(FallingAsleep(ORDER, 99.5, ONE), took=TOOK)}, 1.5 + 4.0),
        ({"b": engine(Stopping(ORDER, 99.5), took=TOOK)}, 0.5 + 50.0),
        ({"b": down("broken", retry_at=130.0, took=TOOK)}, 30.0 + 50.0),
        ({"a": engine(FallingAsleep(ORDER, 99.0, ONE), took=TOOK), "b": asleep(took=TOOK)}, 5.0),
    ],
    ids=str,
)
def test_what_has_to_come_first_is_counted_and_what_is_over_is_not(engines, expected_s) -> None:
    assert mid(box(**engines)) == pytest.approx(expected_s)


def test_two_cards_are_cleared_side_by_side_and_one_card_in_turn() -> None:
    both = asleep(took=TOOK, gpus=(Gpu(0), Gpu(1)))
    apart = box(gpus=(80, 80), a=awake(took=TOOK), c=awake(took=TOOK, gpus=(Gpu(1),)), b=both)
    assert mid(apart) == pytest.approx(2.0 + 4.0)
    small = {"took": TOOK, "awake_mib": 35 * GB}
    assert mid(box(a=awake(**small), c=awake(**small), b=asleep(took=TOOK))) == 2.0 + 2.0 + 4.0


def test_what_can_never_be_has_no_time() -> None:
    assert forecast.eta(box(a=awake(pinned=True), b=asleep()), B, 100.0) is None
    assert forecast.eta(box(b=down("no such image")), B, 100.0) is None
    broken = box(b=down("no", retry_at=400.0))
    assert forecast.eta(broken, B, 100.0).low_s >= 300.0
    assert forecast.eta(broken, B, 100.0, ordered=True) == durations.span(
        broken.engines[B], "start"
    )
    left = box(b=engine(Stopping(None, 90.0, again_at=130.0)))
    assert forecast.eta(left, B, 100.0).low_s >= 30.0
    stopped = box(b=down(enabled=False))
    assert forecast.eta(stopped, B, 100.0) is None
    assert forecast.eta(stopped, B, 100.0, ordered=True) == durations.span(
        stopped.engines[B], "start"
    )


def test_answers_end_at_the_latest_when_the_policy_ends_them() -> None:
    state = box(Policy(drain_s=10.0), a=awake(1, took=TOOK), b=asleep(took=TOOK))
    span = forecast.eta(state, B, 100.0)
    assert span is not None
    assert span.low_s >= 5.0
    assert 10.0 < span.high_s < 10.0 + 2.0 + 4.0 + 2.0


def test_what_is_overdue_lasts_on_for_a_while() -> None:
    left = Span(3.0, 4.0, 5.0).after(20.0)
    assert left == Span(0.0, 2.5, 5.0)


def test_a_request_also_waits_for_those_before_it_and_for_a_residency() -> None:
    policy = Policy(patience_s=30.0, residency_s=30.0)
    small = {"took": TOOK}
    state = box(policy, a=awake(1, since=90.0, **small), b=asleep(**small), c=asleep(**small))
    alone = forecast.wait_s(state, B, 100.0)
    behind = forecast.wait_s(replace(state, waiting=(ticket(9, "c", 95.0),)), B, 100.0)
    first = forecast.wait_s(replace(state, waiting=(ticket(9, "b", 95.0),)), B, 100.0)
    assert alone is not None
    assert behind is not None
    assert first is not None
    assert alone.mid_s > mid(state)
    assert behind.mid_s > alone.mid_s + 6.0
    assert first.high_s <= alone.high_s
    assert forecast.wait_s(box(b=awake()), B, 100.0) == ZERO


def test_who_asks_for_a_model_that_makes_room_waits_for_the_other_first() -> None:
    policy = Policy(patience_s=30.0, residency_s=30.0)
    busy = Awake(0.0, frozenset({TicketId(1)}))
    leaving = Draining(busy, busy.leases, 99.0, 109.0, wanted_by=B, level=ONE)
    state = box(policy, a=engine(leaving, took=TOOK), b=asleep(took=TOOK))
    wait = forecast.wait_s(replace(state, waiting=(ticket(9, "b", 98.0),)), A, 100.0)
    assert wait is not None
    assert wait.mid_s > 5.0 + 2.0 + 4.0 + 2.0 + 4.0  # drain, both switches


def test_the_forecast_of_a_quiet_switch_is_what_it_takes() -> None:
    run = Run(box(a=awake(took=TOOK), b=asleep(took=TOOK)))
    expected, began = mid(run.state, now=run.now), run.now
    run.request(1, "b")
    run.done("a", after=2.0)
    run.done("b", after=4.0)
    assert isinstance(run.phase("b"), Awake)
    assert run.now - began == pytest.approx(expected)


@given(fleets(), st.floats(0.0, 200.0))
def test_a_forecast_is_ordered_and_there_for_whatever_fits(state, now) -> None:
    for model in state.engines:
        for span in (forecast.eta(state, model, now), forecast.wait_s(state, model, now)):
            if span is not None:
                assert 0.0 <= span.low_s <= span.mid_s <= span.high_s


def test_results_of_other_orders_teach_nothing() -> None:
    run = Run(box(a=asleep(SleepLevel.ONE)))
    run(SleepEnded(A, OrderId(99)))
    assert run.engine("a").took == {}
