"""When a model will probably be awake."""

from dataclasses import replace

import pytest

from homegptd.core.commands import Refuse
from homegptd.core.forecast import ANSWER_S, outlook, retry_s, room_s
from homegptd.core.model import (
    Down,
    Engine,
    Failure,
    FallingAsleep,
    ModelId,
    OrderId,
    Policy,
    Starting,
    State,
    Stopping,
    Waking,
)

from .builders import ONE, TRAITS, Run, asleep, awake, box, down, engine, ticket

A, NOW = ModelId("a"), 100.0
QUICK = {"start": 60.0, "sleep-1": 2.0, "wake-1": 4.0, "stop": 5.0}
ORDER = OrderId(1)


def left(state: State) -> float:
    return outlook(state, A, NOW).at - NOW


def in_order(phase: object, **given: object) -> Engine:
    return engine(phase, TRAITS, timings=QUICK, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("a", "seconds", "doing"),
    [
        (awake(timings=QUICK), 0.0, "a is awake"),
        (asleep(timings=QUICK), 4.0, "Waking a"),
        (down(timings=QUICK), 60.0, "Starting a"),
        (in_order(Waking(ORDER, NOW - 1, ONE)), 3.0, "Waking a"),
        (in_order(Waking(ORDER, NOW - 99, ONE)), 0.0, "Waking a"),  # late: any moment now
        (in_order(Starting(ORDER, NOW - 10)), 50.0, "Starting a"),
        (in_order(FallingAsleep(ORDER, NOW - 0.5, ONE)), 1.5 + 4.0, "Putting a to sleep"),
        (in_order(Stopping(ORDER, NOW)), 5.0 + 60.0, "Stopping a"),
        (in_order(Down(NOW, Failure("x"), NOW + 20)), 20.0 + 60.0, "Starting a"),
    ],
)  # fmt: skip
def test_a_model_alone_takes_what_is_left_of_its_way_up(
    a: Engine, seconds: float, doing: str
) -> None:
    state = box(a=a)
    assert left(state) == pytest.approx(seconds)
    assert outlook(state, A, NOW).doing == doing


def test_who_is_in_the_way_goes_first() -> None:
    a = asleep(timings=QUICK)
    idle = box(a=a, b=awake(timings=QUICK))
    assert (left(idle), outlook(idle, A, NOW).doing) == (6.0, "Putting b to sleep")
    busy = box(a=a, b=awake(2, timings=QUICK))
    assert left(busy) == 6.0 + ANSWER_S
    assert outlook(busy, A, NOW).doing == "Waiting for 2 answers of b"
    short = replace(busy, policy=Policy(drain_s=3.0))
    assert left(short) == 6.0 + 3.0


def test_an_order_under_way_on_the_same_gpu_ends_first() -> None:
    b = in_order(Waking(ORDER, NOW - 1, ONE))
    state = box(a=asleep(timings=QUICK), b=b)
    assert (left(state), outlook(state, A, NOW).doing) == (3.0 + 2.0 + 4.0, "Waking b")
    apart = box(gpus=(80, 80), a=asleep(timings=QUICK, gpus=(1,)), b=b)
    assert left(apart) == 4.0


def test_who_has_waited_longer_has_his_turn_before() -> None:
    state = box(a=asleep(timings=QUICK), b=asleep(timings=QUICK), c=awake(timings=QUICK))
    first, second = ticket(1, "b", NOW - 2), ticket(2, "a", NOW - 1)
    waiting = replace(state, waiting=(first, second))
    assert left(waiting) == left(state) + 6.0 + ANSWER_S


def test_what_cannot_fit_is_looked_at_again_after_a_while() -> None:
    state = box(a=asleep(), b=awake(pinned=True))
    assert (left(state), outlook(state, A, NOW).doing) == (60.0, "No room for a")
    assert retry_s(state, ModelId("nobody"), NOW) == 60.0
    assert retry_s(box(a=awake()), A, NOW) == 1.0


def test_there_is_room_again_when_the_first_of_those_who_wait_go_on() -> None:
    state = box(gpus=(80, 80), a=asleep(timings=QUICK), b=down(timings=QUICK, gpus=(1,)))
    assert room_s(state, NOW) == ANSWER_S  # what is held belongs to running answers
    waiting = replace(state, waiting=(ticket(1, "b"), ticket(2, "a")))
    assert room_s(waiting, NOW) == 4.0


def refusals(commands: tuple[object, ...]) -> list[float | None]:
    return [each.refusal.retry_after_s for each in commands if isinstance(each, Refuse)]


def test_a_refusal_for_want_of_room_says_when_the_model_will_be_awake() -> None:
    run = Run(box(Policy(max_waiting=1), a=asleep(timings=QUICK)))
    run.request(1, "a")
    assert refusals(run.request(2, "a", after=1.0)) == [3.0]


def test_who_waited_too_long_hears_how_long_it_will_still_take() -> None:
    run = Run(box(a=down(timings={**QUICK, "start": 700.0})))
    run.request(1, "a")
    assert refusals(run.wait(600.0)) == [100.0]
