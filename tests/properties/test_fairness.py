"""Nobody starves, nobody thrashes: the bounds, with the real machine on a virtual clock."""

import heapq
import random
from collections.abc import Callable
from itertools import count

import hypothesis.strategies as st
import pytest
from hypothesis import given

from homegptd.core.commands import Cut, Grant, Prove, Sleep, Start, Stop, Wake
from homegptd.core.drains import CUT_GRACE_S
from homegptd.core.events import Observed, RequestArrived, TicketClosed, TimePassed
from homegptd.core.fairness import MOST_QUIET_S
from homegptd.core.machine import initial
from homegptd.core.model import (
    EngineSpec,
    Gpu,
    ModelId,
    OnDeadline,
    Policy,
    Proof,
    SleepLevel,
    Startup,
    Ticket,
    TicketId,
    Traits,
)
from tests.properties.world import Box

TAKES = {Start: 60.0, Stop: 2.0, Sleep: 3.0, Wake: 3.0, Prove: 6.0}
TRAITS = Traits("0.32", frozenset({SleepLevel.ONE}), can_keep=True, proofs={Proof.FREEZE: True})


class World:
    """Runs a `Box` by itself: orders take what they take, answers last as long as they want."""

    def __init__(self, models: int, policy: Policy) -> None:
        self.names = [ModelId(f"m{n}") for n in range(models)]
        specs = tuple(
            EngineSpec(name, (Gpu(0),), 70, 1, 10, 1, startup=Startup.SLEEP) for name in self.names
        )
        state = initial(specs, policy, {Gpu(0): 100}, 1000)
        self.box = Box(state, traits=dict.fromkeys(self.names, TRAITS))
        self.agenda: list[tuple[float, int, object]] = []
        self.serial = count()
        self.lasts: dict[TicketId, float] = {}
        self.again: dict[TicketId, Callable[[], float]] = {}
        self.left: dict[TicketId, float] = {}
        self.switching_s = 0.0
        self.seen: set[int] = set()
        self.watch(self.box.feed(Observed()))
        self.run_until(lambda: self.box.state.booted)

    def at(self, instant: float, what: object) -> None:
        heapq.heappush(self.agenda, (instant, next(self.serial), what))

    def request(self, model: ModelId, since: float, lasts: float, *, freezable: bool) -> None:
        self.at(since, ("arrive", model, lasts, freezable))

    def loop(self, model: ModelId, lasts: float, pause: Callable[[], float]) -> None:
        """A client that asks again, a pause after each answer, for ever."""
        self.at(self.box.now, ("ask", model, lasts, pause))

    def watch(self, outcome) -> None:
        for command in outcome.commands:
            match command:
                case Start() | Stop() | Sleep() | Wake() | Prove():
                    self.switching_s += TAKES[type(command)]
                    self.at(self.box.now + TAKES[type(command)], ("end", command.order))
                case Grant(ticket):
                    self.at(self.box.now + self.lasts[ticket], ("close", ticket))
                case Cut(ticket):
                    self.at(self.box.now, ("close", ticket))
                case _:
                    pass

    def run_until(self, done, limit: float = 1e6) -> None:
        while not done() and (self.agenda or self.box.wake_at is not None):
            alarm = self.box.wake_at if self.box.wake_at is not None else 1e9
            if self.agenda and self.agenda[0][0] <= alarm:
                self.box.now, _, what = heapq.heappop(self.agenda)
                self.do(what)
            elif alarm <= limit:
                self.box.now = alarm
                self.watch(self.box.feed(TimePassed()))
            else:
                return

    def do(self, what) -> None:
        match what:
            case ("arrive", model, lasts, freezable):
                self.box.numbers += 1
                number, now = TicketId(self.box.numbers), self.box.now
                self.lasts[number] = lasts
                ticket = Ticket(number, model, now, now + 1e7, freezable=freezable)
                self.watch(self.box.feed(RequestArrived(ticket)))
            case ("ask", model, lasts, pause):
                self.again[TicketId(self.box.numbers + 1)] = pause
                self.do(("arrive", model, lasts, True))
            case ("close", ticket):
                if ticket in self.box.granted:
                    asked = self.box.granted[ticket]
                    self.watch(self.box.feed(TicketClosed(ticket, served=True)))
                    if pause := self.again.pop(ticket, None):
                        ask = ("ask", asked.model, self.lasts[ticket], pause)
                        self.at(self.box.now + pause(), ask)
            case ("end", order):
                given = self.box.orders.pop(order)
                self.box.physics.end(given, well=True)
                self.watch(self.box.feed(self.box.result(given)))


def bound_s(models: int, policy: Policy, patience: float, residency: float) -> float:
    """Each other model has at most one turn before mine: it stays, drains, is cut, and switches."""
    switch = TAKES[Sleep] + TAKES[Wake]
    turn = max(residency, patience) + policy.max_answer_s + CUT_GRACE_S + switch
    return patience + models * turn


arrivals = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.floats(0, 300),
        st.sampled_from([0.5, 5.0, 50.0, 1000.0]),
        st.booleans(),
    ),
    max_size=60,
)


@given(
    models=st.integers(2, 4),
    patience=st.sampled_from([0.0, 5.0, 30.0]),
    residency=st.sampled_from([0.0, 5.0, 30.0]),
    on_deadline=st.sampled_from(OnDeadline),
    pattern=arrivals,
)
def test_nobody_waits_longer_than_the_bound(
    models: int, patience: float, residency: float, on_deadline: OnDeadline, pattern: list
) -> None:
    policy = Policy(
        patience_s=patience,
        residency_s=residency,
        on_deadline=on_deadline,
        max_answer_s=60.0,
        freeze_max_s=90.0,
        max_waiting=1000,
    )
    world = World(models, policy)
    began = world.box.now
    for model, at, lasts, freezable in pattern:
        world.request(world.names[model % models], began + at, lasts, freezable=freezable)
    world.run_until(lambda: not (world.agenda or world.box.waiting or world.box.granted))
    assert not world.box.waiting
    longest = max((wait for _, wait in world.box.waits), default=0.0)
    assert longest <= bound_s(models, policy, patience, residency)


@pytest.mark.parametrize("on_deadline", list(OnDeadline))
def test_two_overlapping_streams_to_one_model_do_not_starve_another(
    on_deadline: OnDeadline,
) -> None:
    """The measured flaw of a router that always grants what is loaded: its wait is unbounded."""
    policy = Policy(patience_s=5.0, residency_s=10.0, on_deadline=on_deadline, max_answer_s=60.0)
    world = World(2, policy)
    a, b = world.names
    began = world.box.now
    for n in range(400):
        world.request(a, began + n, 1.9, freezable=False)
    world.request(b, began + 20.0, 1.0, freezable=False)
    world.run_until(lambda: any(model == b for model, _ in world.box.waits))
    wait = next(wait for model, wait in world.box.waits if model == b)
    assert wait <= 5.0 + 1.9 + TAKES[Sleep] + TAKES[Wake] + 0.1


@pytest.mark.parametrize("models", [2, 4])
@pytest.mark.parametrize("lasts", [2.0, 8.0])
def test_full_contention_spends_no_more_than_its_share_on_switching(
    models: int, lasts: float
) -> None:
    """Every model is wanted all the time; patience and residency follow from what switches take."""
    world = World(models, Policy(switch_share=0.2, max_waiting=10**6))
    began, length = world.box.now, 400.0
    world.switching_s = 0.0
    for name in world.names:
        for n in range(int(length / lasts * 2)):
            world.request(name, began + n * lasts / 2, lasts, freezable=False)
    world.run_until(lambda: world.box.now >= began + length)
    elapsed = world.box.now - began
    assert len({model for model, _ in world.box.waits}) == models
    assert world.switching_s / elapsed <= 0.2 + 0.01


@pytest.mark.parametrize(
    ("models", "clients", "lasts", "pause"),
    [(2, 1, 0.5, 0.02), (2, 3, 5.0, 0.02), (3, 1, 5.0, 1.0), (3, 3, 2.0, 0.0), (2, 1, 2.0, 1.0)],
)
def test_programs_that_ask_again_after_each_answer_do_not_make_the_box_thrash(
    models: int, clients: int, lasts: float, pause: float
) -> None:
    """One instant without a lease is no reason to leave: the next question is about to come."""
    world = World(models, Policy(switch_share=0.2, max_waiting=10**6))
    began, length = world.box.now, 600.0
    world.switching_s = 0.0
    for name in world.names:
        for _ in range(clients):
            world.loop(name, lasts, lambda: pause)
    world.run_until(lambda: world.box.now >= began + length)
    assert {model for model, _ in world.box.waits} == set(world.names)
    assert world.switching_s / (world.box.now - began) <= 0.2 * 1.1
    policy, longest = world.box.state.policy, max(wait for _, wait in world.box.waits)
    assert longest <= bound_s(models, policy, 4 * 6.0, 4 * 6.0)


@pytest.mark.parametrize("mean", [2.0, 10.0, 60.0])
def test_now_and_then_a_question_to_each_of_three_models_leaves_most_time_for_answers(
    mean: float,
) -> None:
    """Each visit is at least an answer and a quiet gap long, whatever comes."""
    rng = random.Random(1)
    world = World(3, Policy(switch_share=0.2, max_waiting=10**6))
    began, answer, switch = world.box.now, 2.0, TAKES[Sleep] + TAKES[Wake]
    world.switching_s = 0.0
    for name in world.names:
        world.loop(name, answer, lambda: rng.expovariate(1 / mean))
    world.run_until(lambda: world.box.now >= began + 2000.0)
    share = world.switching_s / (world.box.now - began)
    assert share <= switch / (switch + answer + MOST_QUIET_S) * 1.05


def test_who_reads_an_answer_and_then_asks_another_model_waits_for_the_switch_alone() -> None:
    world = World(2, Policy())
    a, b = world.names
    for n in range(8):
        world.request((a, b)[n % 2], world.box.now, 2.0, freezable=True)
        world.run_until(lambda: not (world.agenda or world.box.granted or world.box.waiting))
        world.at(world.box.now + 5.0, None)
        world.run_until(lambda: not world.agenda)
    assert max(wait for _, wait in world.box.waits) <= TAKES[Sleep] + TAKES[Wake]
