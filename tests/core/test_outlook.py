"""When a model will probably be awake, in words and as one instant."""

import pytest
from msgspec.structs import replace

from homegptd.core.commands import Refuse
from homegptd.core.forecast import wait_s
from homegptd.core.model import (
    Down,
    Engine,
    Failure,
    FallingAsleep,
    ModelId,
    OrderId,
    Phase,
    Policy,
    Starting,
    Stopping,
    Waking,
)
from homegptd.core.outlook import outlook, retry_s, room_s
from tests.core.builders import ONE, TRAITS, Run, asleep, awake, box, down, engine, ticket

A, NOW = ModelId("a"), 100.0
_S = {"start": 60.0, "sleep-1": 2.0, "wake-1": 4.0, "stop": 5.0, "drain": 6.0}
TOOK = {act: (seconds,) * 9 for act, seconds in _S.items()}
ORDER = OrderId(1)


def ordered(phase: Phase) -> Engine:
    return engine(phase, traits=TRAITS, took=TOOK)


@pytest.mark.parametrize(
    ("a", "doing"),
    [
        (awake(took=TOOK), "a is awake"),
        (asleep(took=TOOK), "Waking a"),
        (down(took=TOOK), "Starting a"),
        (ordered(Waking(ORDER, NOW - 1, ONE)), "Waking a"),
        (ordered(Starting(ORDER, NOW - 10)), "Starting a"),
        (ordered(FallingAsleep(ORDER, NOW - 0.5, ONE)), "Putting a to sleep"),
        (ordered(Stopping(ORDER, NOW)), "Stopping a"),
        (ordered(Down(NOW, Failure("x"), NOW + 20)), "Starting a"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_a_model_alone_goes_its_way_up(a: Engine, doing: str) -> None:
    state = box(a=a)
    span = wait_s(state, A, NOW)
    assert span is not None
    assert outlook(state, A, NOW).doing == doing
    assert outlook(state, A, NOW).at == NOW + span.mid_s


def test_who_is_in_the_way_goes_first() -> None:
    idle = box(a=asleep(took=TOOK), b=awake(took=TOOK))
    assert outlook(idle, A, NOW).doing == "Putting b to sleep"
    busy = box(a=asleep(took=TOOK), b=awake(2, took=TOOK))
    assert outlook(busy, A, NOW).doing == "Waiting for 2 answers of b"
    assert outlook(busy, A, NOW).at > outlook(idle, A, NOW).at


def test_an_order_under_way_on_the_same_gpu_is_what_goes_on() -> None:
    b = ordered(Waking(ORDER, NOW - 1, ONE))
    assert outlook(box(a=asleep(took=TOOK), b=b), A, NOW).doing == "Waking b"
    apart = box(gpus=(80, 80), a=asleep(took=TOOK, gpus=(1,)), b=b)
    assert outlook(apart, A, NOW).doing == "Waking a"


def test_who_has_waited_longer_has_his_turn_before() -> None:
    state = box(a=asleep(took=TOOK), b=asleep(took=TOOK), c=awake(took=TOOK))
    waiting = replace(state, waiting=(ticket(1, "b", NOW - 2), ticket(2, "a", NOW - 1)))
    assert outlook(waiting, A, NOW).doing == "Waiting for the turn of b"
    assert outlook(waiting, A, NOW).at > outlook(state, A, NOW).at


def test_what_cannot_fit_is_looked_at_again_after_a_while() -> None:
    state = box(a=asleep(), b=awake(pinned=True))
    assert outlook(state, A, NOW).doing == "No room for a"
    assert retry_s(state, A, NOW) == 60.0
    assert retry_s(state, ModelId("nobody"), NOW) == 60.0
    assert retry_s(box(a=awake()), A, NOW) == 1.0


def test_there_is_room_again_when_the_first_of_those_who_wait_go_on() -> None:
    state = box(gpus=(80, 80), a=asleep(took=TOOK), b=down(took=TOOK, gpus=(1,)))
    assert room_s(state, NOW) == 10.0  # what is held belongs to running answers
    waiting = replace(state, waiting=(ticket(1, "b"), ticket(2, "a")))
    assert room_s(waiting, NOW) == retry_s(waiting, A, NOW) == 4.0


def refusals(commands: tuple[object, ...]) -> list[float | None]:
    return [each.refusal.retry_after_s for each in commands if isinstance(each, Refuse)]


def test_a_refusal_for_want_of_room_says_when_the_model_will_be_awake() -> None:
    run = Run(box(Policy(max_waiting=1), a=asleep(took=TOOK)))
    run.request(1, "a")
    assert refusals(run.request(2, "a", after=1.0)) == [3.0]


def test_who_waited_too_long_hears_how_long_it_will_still_take() -> None:
    run = Run(box(a=down(took={**TOOK, "start": (700.0,) * 9})))
    run.request(1, "a")
    assert refusals(run.wait(600.0)) == [100.0]
