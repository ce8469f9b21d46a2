"""Microseconds per event of `step`: 8 engines, 100 leases, 100 waiting. `python bench/step.py`."""

import time

from msgspec.structs import replace

from homegptd.core.events import Event, Found, Observed, RequestArrived, TicketClosed, TimePassed
from homegptd.core.machine import initial, step
from homegptd.core.model import (
    EngineSpec,
    Gpu,
    ModelId,
    Policy,
    SleepLevel,
    State,
    Ticket,
    TicketId,
    Traits,
)
from homegptd.core.story import tell

ENGINES = 8
TRAITS = Traits("0.32.0", frozenset({SleepLevel.ONE}), can_keep=True)
ASLEEP = replace(TRAITS, asleep=True, asleep_level=SleepLevel.ONE)


def ticket(number: int, model: int, now: float) -> Ticket:
    return Ticket(TicketId(number), ModelId(f"m{model}"), now, now + 600.0)


def box(leases: int, waiting: int) -> State:
    """m0 is awake with `leases`; the others sleep and `waiting` wait for them."""
    specs = tuple(
        EngineSpec(ModelId(f"m{n}"), (Gpu(0),), 60_000, 1_000, 20_000, 4_000)
        for n in range(ENGINES)
    )
    policy = Policy(max_waiting=1000, patience_s=1e6, residency_s=1e6)
    state = initial(specs, policy, {Gpu(0): 80_000}, 500_000)
    found = {spec.model: Found(ASLEEP) for spec in specs}
    found[specs[0].model] = Found(TRAITS)
    state = step(state, Observed(found), 0.0).state
    for n in range(leases):
        state = step(state, RequestArrived(ticket(n, 0, 1.0)), 1.0).state
    for n in range(waiting):
        model = 1 + n % (ENGINES - 1)
        state = step(state, RequestArrived(ticket(10_000 + n, model, 2.0)), 2.0).state
    assert len(state.granted) == leases
    assert len(state.waiting) == waiting
    return state


def measure(name: str, state: State, events: list[Event]) -> None:
    """The best of five runs, with and without the story."""
    best = best_told = float("inf")
    for _ in range(5):
        best = min(best, run(state, events, told=False))
        best_told = min(best_told, run(state, events, told=True))
    each, told = best / len(events) * 1e6, best_told / len(events) * 1e6
    print(f"{name:48} {each:7.1f} us/event  {told - each:5.1f} us for its story")


def run(state: State, events: list[Event], *, told: bool) -> float:
    began = time.perf_counter()
    for event in events:
        outcome = step(state, event, 10.0)
        if told:
            tell(state, event, outcome, 10.0)
        state = outcome.state
    return time.perf_counter() - began


def come_and_go(count: int) -> list[Event]:
    events: list[Event] = []
    for n in range(count):
        events.append(RequestArrived(ticket(100_000 + n, 0, 10.0)))
        events.append(TicketClosed(TicketId(100_000 + n), served=True))
    return events


def mixed(count: int) -> list[Event]:
    events: list[Event] = []
    for n in range(count):
        events.append(RequestArrived(ticket(200_000 + n, n % ENGINES, 10.0)))
        events.append(TimePassed())
        events.append(TicketClosed(TicketId(200_000 + n), served=True))
    return events


if __name__ == "__main__":
    measure("arrive, close; awake, nobody else there", box(1, 0), come_and_go(2000))
    measure("arrive, close; awake, 100 leases", box(100, 0), come_and_go(2000))
    measure("arrive, close; awake, 100 leases, 100 waiting", box(100, 100), come_and_go(500))
    measure("mixed, 100 leases, 100 waiting", box(100, 100), mixed(300))
