"""`make_room` beside brute force: feasible, complete and cheapest, on every small fleet."""

from itertools import product

import hypothesis.strategies as st
from hypothesis import given, settings
from msgspec.structs import replace

from homegptd.core import ledger, levels, plans
from homegptd.core.durations import takes
from homegptd.core.model import (
    Asleep,
    Awake,
    Draining,
    Engine,
    FallingAsleep,
    Gpu,
    ModelId,
    OrderId,
    Policy,
    Proof,
    Starting,
    State,
    Stopping,
    TicketId,
    Traits,
    Waking,
)
from tests.core.builders import ONE, TRAITS, TWO, awake, box, down, engine

TARGET = ModelId("a")
ORDER = OrderId(1)
CARD = 60
sizes = st.integers(5, CARD)
traits = st.sampled_from(
    [
        TRAITS,
        replace(TRAITS, proofs={Proof.RELOAD: True}),
        Traits("0.31", frozenset({ONE})),
        Traits("0.10"),
    ]
)
TAKES = {"start": (40.0,), "wake-1": (2.0,), "wake-2": (9.0,)}


@st.composite
def engines(draw: st.DrawFn, gpus: int, *, target: bool = False) -> Engine:
    places = draw(st.sets(st.integers(0, gpus - 1), min_size=1, max_size=gpus))
    given = {
        "gpus": tuple(Gpu(place) for place in sorted(places)),
        "awake_mib": draw(sizes),
        "residue_mib": draw(st.integers(0, 5)),
        "pinned_mib": draw(sizes),
        "host_mib": 1,
        "priority": draw(st.sampled_from([0, 0, 0, 1])),
        "level": draw(st.sampled_from([None, None, ONE, TWO])),
        "pinned": not target and draw(st.integers(0, 5)) == 0,
        "last_used": float(draw(st.integers(0, 9))),
        "took": draw(st.sampled_from([{}, TAKES, {"wake-2": (1.0,)}])),
    }
    phases = ["down", "asleep", "deeply asleep"]
    if not target:
        phases += ["awake"] * 3 + ["busy", "draining", "falling", "starting", "waking", "stopping"]
    phase = draw(st.sampled_from(phases))
    if phase == "down":
        return down(**given)
    given["traits"], given["holds_pinned"] = draw(traits), draw(st.booleans())
    busy = Awake(0.0, frozenset({TicketId(1)}))
    match phase:
        case "asleep":
            return engine(Asleep(ONE, 0.0), **{**given, "holds_pinned": True})
        case "deeply asleep":
            return engine(Asleep(TWO, 0.0), **given)
        case "awake":
            return awake(**given)
        case "busy":
            return engine(busy, **given)
        case "draining":
            return engine(Draining(busy, busy.leases, 0.0, 10.0), **given)
        case "falling":
            return engine(FallingAsleep(ORDER, 0.0, ONE), **{**given, "holds_pinned": True})
        case "starting":
            return engine(Starting(ORDER, 0.0), **given)
        case "waking":
            return engine(Waking(ORDER, 0.0, ONE), **{**given, "holds_pinned": True})
        case _:
            return engine(Stopping(ORDER, 0.0), **given)


@st.composite
def fleets(draw: st.DrawFn) -> State:
    gpus = draw(st.integers(1, 4))
    others = draw(st.lists(engines(gpus), min_size=1, max_size=5))
    named = dict(zip("abcdef", [draw(engines(gpus, target=True)), *others], strict=False))
    state = box(Policy(level=draw(st.sampled_from([ONE, ONE, TWO]))), **named)
    wanted = tuple(draw(st.lists(st.sampled_from(sorted(state.engines)), max_size=6)))
    return replace(
        state,
        gpus={Gpu(number): CARD for number in range(gpus)},
        host_mib=draw(st.sampled_from([30, 60, 100, 200])),
        wanted=wanted,
    )


@settings(max_examples=300, deadline=None)
@given(fleets(), st.booleans(), st.booleans())
def test_make_room_is_feasible_and_as_cheap_as_brute_force(
    state: State, may_stop: bool, may_stop_sleepers: bool
) -> None:
    found = plans.make_room(
        state,
        TARGET,
        may_displace=lambda e: not e.spec.pinned,
        may_stop=may_stop,
        may_stop_sleepers=may_stop_sleepers,
    )
    best = brute_force(state, may_stop, may_stop_sleepers)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert fits(state, found)
        assert not any(state.engines[name].spec.pinned for name in found)
        assert abs(cost(state, found) - best) < 1e-6


@settings(max_examples=200, deadline=None)
@given(fleets())
def test_nobody_is_displaced_without_need(state: State) -> None:
    """Each of them: the target would not fit if this one alone were left as it is."""
    found = plans.make_room(state, TARGET, may_displace=lambda e: not e.spec.pinned) or {}
    for name in found:
        assert not fits(state, {other: how for other, how in found.items() if other != name})


def brute_force(state: State, may_stop: bool, may_stop_sleepers: bool) -> float | None:
    names = [n for n, e in state.engines.items() if n != TARGET and ledger.eventual(e)]
    ways = [["keep", *ways_out(state, n, may_stop, may_stop_sleepers)] for n in names]
    costs = []
    for chosen in product(*ways):
        room = {n: how for n, how in zip(names, chosen, strict=True) if how != "keep"}
        if fits(state, room):
            costs.append(cost(state, room))
    return min(costs, default=None)


def ways_out(state: State, name: ModelId, may_stop: bool, may_stop_sleepers: bool) -> list:
    one = state.engines[name]
    if one.spec.pinned:
        return []
    if isinstance(one.phase, Asleep | FallingAsleep):
        return [None] if may_stop_sleepers else []
    resting = list(levels.levels(one, state.policy))
    return [*resting, None] if may_stop or not resting else resting


def fits(state: State, room) -> bool:
    """Added up place by place, from the figures of the specs alone."""
    used = dict.fromkeys(state.gpus, 0)
    ram = 0
    for name, one in state.engines.items():
        level = room.get(name, "keep")
        match one.phase:
            case _ if name == TARGET:
                gpu, pins = one.spec.awake_mib, one.holds_pinned
            case _ if level is None:
                continue
            case _ if level != "keep":
                gpu, pins = one.spec.residue_mib, one.holds_pinned or level is ONE
            case Asleep(level=slept) | FallingAsleep(level=slept):
                gpu, pins = one.spec.residue_mib, one.holds_pinned or slept is ONE
            case Awake() | Draining() | Starting() | Waking():
                gpu, pins = one.spec.awake_mib, one.holds_pinned
            case _:
                continue
        ram += one.spec.host_mib + one.spec.pinned_mib * pins
        for place in one.spec.gpus:
            used[place] += gpu
    return ram <= state.host_mib and all(mib <= CARD for mib in used.values())


def cost(state: State, room) -> float:
    """Seconds that somebody will probably wait for, spelt out."""
    result = 0.0
    for name, level in room.items():
        one, chance = state.engines[name], chance_of(state, name)
        cold = 10.0 + max(takes(one, "start"), takes(one, "wake-1"))
        if isinstance(one.phase, Asleep | FallingAsleep):
            result += 1.0 + chance * max(cold - takes(one, f"wake-{one.phase.level}"), 0.0)
            continue
        result += 1.0 + chance * (cold if level is None else takes(one, f"wake-{level}"))
        if plans.running(one):
            result += 30.0 if isinstance(one.phase, Draining) else 60.0
    return result


def chance_of(state: State, name: ModelId) -> float:
    """Times it followed the target, and 1, 1/2, 1/3 … from the last used; as a share of all."""

    def worth(one: Engine) -> tuple:
        return one.spec.priority, one.last_used, isinstance(one.phase, Awake | Draining)

    others = [n for n in state.engines if n != TARGET]
    pairs = list(zip(state.wanted, state.wanted[1:], strict=False))
    weight = {
        n: pairs.count((TARGET, n))
        + 1 / (1 + sum(worth(state.engines[o]) > worth(state.engines[n]) for o in others))
        for n in others
    }
    return weight[name] / sum(weight.values())
