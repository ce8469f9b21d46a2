"""What the machine learns by itself is there again in the next life."""

import pytest
from msgspec.structs import replace

from homegptd.core.events import OperationAsked, TicketClosed
from homegptd.core.likely import KEPT
from homegptd.core.machine import initial
from homegptd.core.model import (
    Act,
    Gpu,
    Lent,
    ModelId,
    Operation,
    OperationId,
    Policy,
    Running,
    TicketId,
)
from homegptd.runtime.keeper import FREED, PINS, WANTED, Keeper, Pins, recall
from tests.core.builders import Run, asleep, awake, box
from tests.runtime.small import SmallStore

A, B = ModelId("a"), ModelId("b")


def test_a_freed_gpu_stays_freed_over_a_restart() -> None:
    run, store = Run(box(a=awake(), b=asleep())), SmallStore()
    keeper = Keeper(store, run.state)
    asked = Operation(OperationId(1), Act.FREE, ModelId(""), "root", run.now)
    run(OperationAsked(asked))
    keeper.tell(run.state, ())
    again = recall(store, box(a=awake(), b=asleep()))
    assert again.freed == {Gpu(0): Lent("root", (A,))}
    run(OperationAsked(replace(asked, id=OperationId(2), act=Act.RECLAIM)))
    keeper.tell(run.state, ())
    assert recall(store, box(a=awake(), b=asleep())).freed == {}


def test_drains_and_the_last_wakes_are_remembered() -> None:
    policy = Policy(patience_s=0.0, residency_s=0.0)
    run, store = Run(box(policy, a=awake(1), b=asleep())), SmallStore()
    keeper = Keeper(store, run.state)
    run.request(2, "b")
    run(TicketClosed(TicketId(1)), after=3.0)
    run.done("a")
    run.done("b")
    keeper.tell(run.state, ())
    keeper.tell(run.state, ())
    assert store.took == [(A, "drain", 3.0)]
    assert recall(store, box(a=awake(), b=asleep())).wanted == (B,)


def test_who_has_pinned_host_ram_is_remembered() -> None:
    store, clock = SmallStore(), iter((50.0, 60.0, 70.0))
    run = Run(box(a=awake(holds_pinned=False), b=asleep(), c=awake(pins_unsure=True)))
    keeper = Keeper(store, initial((), Policy(), {}, 0), clock=lambda: next(clock))
    assert pins(store, started_at=9.0) == [None, None, None]
    keeper.tell(run.state, ())
    assert pins(store, started_at=9.0) == [False, True, None]
    assert pins(store, started_at=55.0) == [False, None, None]  # another process, by hand
    run.ask(Act.SLEEP, "a")
    keeper.tell(run.state, ())  # before the order is out
    assert pins(store, started_at=55.0) == [True, True, None]
    run.done("a")
    run.ask(Act.STOP, "a")
    run.done("a")
    keeper.tell(run.state, ())
    assert pins(store, started_at=9.0) == [None, True, None]


def pins(store: SmallStore, *, started_at: float) -> list[bool | None]:
    known = Pins(store)
    return [known.has_pinned(ModelId(name), Running(1, started_at)) for name in "abc"]


@pytest.mark.parametrize("note", ["", "nonsense", "[]", "{}", "3", '{"x": 1, "9": {}, "0": 3}'])
def test_a_note_that_cannot_be_read_says_nothing(note: str) -> None:
    store = SmallStore()
    store.remember_note(FREED, note)
    store.remember_note(WANTED, note)
    store.remember_note(PINS, note)
    assert pins(store, started_at=0.0) == [None, None, None]
    state = recall(store, box(a=awake()))
    assert (dict(state.freed), state.wanted) == ({}, ())


def test_no_more_wakes_are_remembered_than_count() -> None:
    store = SmallStore()
    store.remember_note(WANTED, "[" + ", ".join(['"a"'] * 500) + "]")
    assert len(recall(store, box(a=awake())).wanted) == KEPT
