"""Figures with their source, sleeps that give too little back, leaks, and what others hold."""

from typing import Any

import pytest
from msgspec.structs import replace

from homegptd.core import figures, foreign, ledger, plans
from homegptd.core.commands import Refuse, Sleep, Start, Stop, Wake
from homegptd.core.events import (
    ConfigChanged,
    MemorySeen,
    SleepEnded,
    StartEnded,
    StopEnded,
    WakeEnded,
)
from homegptd.core.memory import (
    HOST,
    Card,
    Figure,
    Foreign,
    Held,
    Kind,
    Learnt,
    Seen,
    Source,
)
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    Down,
    Engine,
    Gpu,
    ModelId,
    OrderId,
    SleepLevel,
    Stopping,
    Waking,
)
from homegptd.core.refusals import Reason

from .builders import GB, ONE, TRAITS, Run, asleep, awake, box, down, engine

A, B, G0, G1 = ModelId("a"), ModelId("b"), Gpu(0), Gpu(1)


def held(gpu_gb: float | None, host_gb: float = 4, *, free_gb: float = 0, at: float = 1.0) -> Held:
    gpu = {} if gpu_gb is None else {G0: round(gpu_gb * GB)}
    return Held(at, gpu, round(host_gb * GB), {G0: round(free_gb * GB), HOST: 100 * GB})


def seen(free_gb: float, who: str = "", *, total_gb: int = 80, ram_gb: int = 200) -> Seen:
    card = Card("card", total_gb * GB, round((total_gb - free_gb) * GB))
    return Seen({G0: card}, {G0: who} if who else {}, ram_gb * GB)


def learnt(engine: Engine, kind: Kind, gb: float, place: Gpu = G0) -> Engine:
    known = {**engine.learnt.figures, (kind, place): Figure(round(gb * GB), Source.MEASURED)}
    return replace(engine, learnt=Learnt(known, "0.32.0"))


def sleeps(run: Run, name: str, before: Held | None, after: Held | None) -> Any:
    order = run.orders.pop(name)
    assert isinstance(order, Sleep)
    return run(SleepEnded(order.model, order.order, before=before, after=after), after=1.0)


# ---------------------------------------------------------------- which figure counts


def test_a_measured_figure_wins_over_a_given_one():
    one = awake()
    assert figures.figure(one, Kind.AWAKE, G0) == Figure(60 * GB, Source.CONFIGURED)
    one = figures.started(one, held(None), held(50, 3))
    assert figures.figure(one, Kind.AWAKE, G0).source is Source.MEASURED
    assert ledger.awake(one)[G0] == round(50 * GB * 1.01)
    assert ledger.awake(replace(one, holds_pinned=False))[HOST] == round(3 * GB * 1.125)


def test_trusted_figures_stand_but_guesses_give_way():
    one = awake(trust_given=True, estimated=frozenset({Kind.RESIDUE}))
    one = figures.slept(one, held(50), held(1, 24))
    assert figures.figure(one, Kind.AWAKE, G0).mib == 60 * GB
    assert figures.figure(one, Kind.RESIDUE, G0) == Figure(GB, Source.MEASURED, GB // 8, 1.0)
    assert one.learnt.figures[Kind.AWAKE, G0].mib == 50 * GB  # and yet it is known


def test_a_figure_rises_at_once_and_falls_slowly():
    one = awake()
    for gb, after in ((50, 50.0), (40, 47.0), (48, 48.0), (47, 47.7)):
        one = figures.started(one, None, held(gb))
        assert figures.figure(one, Kind.AWAKE, G0).mib == pytest.approx(after * GB, abs=1)


def test_each_gpu_has_its_own_figure():
    one = awake(gpus=(G0, G1))
    one = figures.started(one, None, Held(1.0, {G0: 50 * GB, G1: 48 * GB}, None))
    assert ledger.awake(one)[G0] - ledger.awake(one)[G1] == round(2 * GB * 1.01)


def test_what_was_pinned_is_what_the_first_sleep_added():
    one = replace(awake(pinned_mib=20 * GB, pinned_margin_mib=20 * GB), holds_pinned=False)
    assert ledger.asleep(one, ONE)[HOST] == 44 * GB  # nobody knows better: up to twice the weights
    one = figures.started(one, None, held(50, 5))
    one = figures.slept(replace(one, holds_pinned=True), held(50, 5), held(1, 32))
    assert figures.figure(one, Kind.PINNED).mib == 27 * GB
    assert ledger.asleep(one, ONE)[HOST] == pytest.approx((27 * 1.02 + 5 * 1.125) * GB, abs=2)


def test_pages_that_no_process_is_charged_for_show_in_what_the_box_has_left():
    one = figures.started(awake(pinned_mib=20 * GB), None, held(50, 5))
    before, after = held(50, 5), replace(held(1, 5), free_mib={HOST: 75 * GB})
    one = figures.slept(replace(one, holds_pinned=True), before, after)
    assert figures.figure(one, Kind.PINNED).mib == 25 * GB


def test_where_the_driver_names_no_processes_the_device_tells():
    one = figures.started(awake(), held(None, free_gb=78), held(None, free_gb=28))
    assert figures.figure(one, Kind.AWAKE, G0).mib == 50 * GB
    asleep_now = held(None, free_gb=77)
    assert figures.hoarded(one, held(None, free_gb=28), asleep_now) is None
    one = figures.slept(one, held(None, free_gb=28), asleep_now)
    assert figures.figure(one, Kind.RESIDUE, G0).mib == GB
    assert figures.hoarded(one, held(None, free_gb=28), held(None, free_gb=40)) is not None


def test_another_version_makes_estimates_of_measurements():
    one = figures.identified(learnt(awake(), Kind.AWAKE, 50), TRAITS)
    assert figures.figure(one, Kind.AWAKE, G0).source is Source.MEASURED
    one = figures.identified(one, replace(TRAITS, version="0.33.0"))
    assert figures.figure(one, Kind.AWAKE, G0).source is Source.CONFIGURED
    known = {(Kind.AWAKE, G0): Figure(40 * GB, Source.MEASURED)}
    one = figures.identified(one, replace(TRAITS, version="0.34.0", figures=known))
    assert figures.figure(one, Kind.AWAKE, G0).mib == 40 * GB


def test_another_image_of_the_same_version_makes_estimates_of_measurements():
    one = figures.identified(learnt(awake(), Kind.AWAKE, 50), TRAITS)
    one = figures.identified(one, replace(TRAITS, image="sha256:4f1e"))
    assert figures.figure(one, Kind.AWAKE, G0).source is Source.CONFIGURED
    assert one.learnt.build == "0.32.0 (sha256:4f1e)"


def test_another_build_is_forgiven_what_an_older_one_did() -> None:
    one = figures.identified(awake(), TRAITS)
    for _ in range(figures.HOARDS):
        one = figures.hoarding(one)
    assert not figures.identified(one, TRAITS).traits.levels
    assert figures.identified(one, replace(TRAITS, version="0.33.0")).traits.levels


def test_an_engine_that_may_have_pinned_nothing_does_not_tell_what_pinning_takes() -> None:
    one = learnt(awake(pinned_mib=4 * GB, pinned_margin_mib=4 * GB), Kind.HOST, 4, HOST)
    unsure = figures.adopted(replace(one, pins_unsure=True), held(15, 6.2))
    assert figures.figure(unsure, Kind.PINNED).source is Source.CONFIGURED
    sure = figures.adopted(one, held(15, 6.2))
    assert figures.figure(sure, Kind.PINNED).source is Source.MEASURED


def test_other_flags_make_estimates_of_measurements():
    run = Run(box(a=learnt(asleep(fingerprint="x"), Kind.AWAKE, 50)))
    spec = replace(run.engine("a").spec, fingerprint="y")
    run(ConfigChanged((spec,), run.state.policy, run.state.gpus, run.state.host_mib))
    assert ledger.charge(run.engine("a"))[HOST] > 0  # what runs is charged as it is
    run.done("a")
    assert run.engine("a").learnt == Learnt()


# ---------------------------------------------------------------- sleeps that are none


def test_a_sleep_that_gives_nothing_back_is_a_fault_and_the_engine_starts_anew():
    run = Run(box(a=awake(), b=asleep()))
    run.ask(Act.SLEEP, "a")
    sleeps(run, "a", held(58), held(57.5))
    phase = run.phase("a")
    assert isinstance(phase, Stopping)
    assert phase.failure
    assert phase.failure.message == (
        "vLLM says that it sleeps, but only 0.5 of 58.0 GB came back on gpu0"
    )
    assert isinstance(run.orders["a"], Stop)
    assert ledger.charge(run.engine("a"))[G0] == 60 * GB  # until it is gone
    run.done("a")
    assert isinstance(run.orders["a"], Start)


def test_half_of_it_is_enough():
    run = Run(box(a=awake()))
    run.ask(Act.SLEEP, "a")
    sleeps(run, "a", held(58), held(29.5))
    assert isinstance(run.phase("a"), Asleep)


def test_who_never_gives_back_is_stopped_instead_of_slept():
    run = Run(box(a=awake(), b=asleep()))
    run.ask(Act.SLEEP, "a")
    for _ in range(figures.HOARDS):
        sleeps(run, "a", held(58), held(57.5))
        run.done("a")
        run.wait(60.0)
        run.done("a")  # started again, and put to sleep once more
    assert isinstance(run.phase("a"), Awake)
    assert "a" not in run.orders
    assert run.engine("a").traits == replace(
        TRAITS, levels=frozenset(), why_no_sleep="its sleep gave too little memory back"
    )
    run.request(1, "b")
    run.wait(60.0)
    assert isinstance(run.orders["a"], Stop)


def test_an_operator_may_have_it_tried_again():
    one = figures.hoarding(figures.hoarding(awake()))
    assert figures.identified(one, TRAITS).traits != TRAITS
    assert figures.identified(figures.forgiven(one), TRAITS).traits == TRAITS


# ---------------------------------------------------------------- leaks


def cycle(run: Run, residue_gb: float) -> None:
    """One sleep that leaves so much, and a wake."""
    run.ask(Act.SLEEP, "a")
    sleeps(run, "a", held(58), held(residue_gb))


def wakes(run: Run) -> None:
    run.ask(Act.WAKE, "a")
    run.done("a")


def test_a_residue_that_grows_starts_the_engine_anew_in_a_quiet_moment():
    run = Run(box(a=awake(), b=down()))
    for residue in (1.2, 1.4, 1.6):
        cycle(run, residue)
        assert isinstance(run.phase("a"), Asleep)
        wakes(run)
    cycle(run, 1.8)
    phase = run.phase("a")
    assert isinstance(phase, Stopping)
    assert phase.failure
    assert phase.failure.message == (
        "it is started anew: what it keeps asleep on gpu0 grew from 1.2 to 1.8 GB"
    )
    assert run.engine("a").failures == 0  # it is no failure
    run.done("a")
    assert figures.figure(run.engine("a"), Kind.RESIDUE, G0).mib == pytest.approx(1.2 * GB, abs=2)
    assert isinstance(run.orders["a"], Start)  # quiet room: it is loaded again


def test_a_leak_waits_while_somebody_does():
    run = Run(box(a=awake(), b=asleep()))
    cycle(run, 1.2)
    wakes(run)
    run.request(1, "b")
    run.wait(60.0)
    sleeps(run, "a", held(58), held(2.0))
    assert isinstance(run.phase("a"), Asleep)
    assert isinstance(run.orders["b"], Wake)
    run.done("b")
    assert isinstance(run.phase("a"), Stopping)


def test_what_leaked_is_charged_awake_too():
    run = Run(box(a=awake()))
    cycle(run, 1.2)
    wakes(run)
    cycle(run, 1.6)
    assert figures.figure(run.engine("a"), Kind.AWAKE, G0).mib == pytest.approx(58.4 * GB, abs=2)


# ---------------------------------------------------------------- others on the card


def test_a_wake_without_room_is_refused_with_the_sum_and_the_culprit():
    run = Run(box(a=asleep(), b=asleep()))
    run.request(1, "a")
    order = run.orders.pop("a")
    commands = run(WakeEnded(A, order.order, crowded=seen(50, "blender (pid 7) 26.0 GB")), 1.0)
    refusal = next(c.refusal for c in commands if isinstance(c, Refuse))
    assert refusal.reason is Reason.DOES_NOT_FIT
    assert refusal.message == (
        'cannot bring up "a": needs 60.0 GB on gpu0; 80.0 total - 2.0 residue of b'
        " - 26.0 held by blender (pid 7) 26.0 GB = 52.0; 54.0 even with b stopped"
    )
    assert isinstance(run.phase("a"), Asleep)
    assert "a" not in run.orders


def test_it_is_woken_once_the_others_have_gone():
    run = Run(box(a=asleep(), b=asleep()))
    run.request(1, "a")
    run(WakeEnded(A, run.orders.pop("a").order, crowded=seen(50, "blender")), 1.0)
    run(MemorySeen({G0: 0, HOST: 0}))
    assert run.state.foreign == {}
    assert run.engine("a").no_room is None
    run.request(2, "a")
    assert isinstance(run.orders["a"], Wake)


def test_a_start_without_room_leaves_nothing_behind():
    run = Run(box(a=down(), b=asleep()))
    run.request(1, "a")
    commands = run(StartEnded(A, run.orders.pop("a").order, crowded=seen(50, "blender")), 1.0)
    assert any(isinstance(c, Refuse) for c in commands)
    assert isinstance(run.phase("a"), Down)
    assert run.engine("a").failures == 0


def test_what_others_hold_makes_more_room_necessary():
    """b could stay awake beside a, were it not for the game."""
    run = Run(box(a=asleep(awake_mib=40 * GB), b=awake(awake_mib=30 * GB)))
    run(MemorySeen({G0: 20 * GB}, {G0: "game (pid 3) 20.0 GB"}))
    run.request(1, "a")
    run.wait(60.0)
    assert isinstance(run.orders["b"], Sleep)


def test_others_elsewhere_are_in_nobodys_way():
    state = box(a=asleep(), b=awake(gpus=(G1,)), gpus=(80, 80))
    state = replace(state, foreign={G1: Foreign(40 * GB), HOST: Foreign(250 * GB)})
    assert plans.make_room(state, A, may_displace=lambda e: True) == {}


def test_frozen_answers_outlive_a_wake_without_room():
    run = Run(box(a=asleep(), b=down()))
    one = run.engine("a")
    phase = Waking(run.state.orders, 0.0, SleepLevel.ONE)  # type: ignore[arg-type]
    run.state = replace(run.state, engines={**run.state.engines, A: replace(one, phase=phase)})
    run(WakeEnded(A, phase.order, crowded=seen(10)), 1.0)
    assert isinstance(run.phase("a"), Asleep)


def test_memory_that_flickers_is_no_news():
    state = replace(box(a=awake()), foreign={G0: Foreign(1000, "Xorg")})
    assert not foreign.is_news(state, {G0: 1050}, 0.0)
    assert foreign.is_news(state, {G0: 1100}, 0.0)
    assert foreign.is_news(state, {G0: 0}, 0.0)
    assert foreign.is_news(state, {G0: 1000}, 30.0)


# ---------------------------------------------------------------- host RAM


def test_four_large_models_do_not_all_sleep_at_level_one_in_128_gb():
    """45 GB of weights each: a rule by RAM size would have pinned 240 GB."""
    sizes = {"pinned_mib": 45 * GB, "pinned_margin_mib": 45 * GB}
    names = "abcd"
    run = Run(box(ram=128, **{name: down(**sizes) for name in names}))
    for name in names:
        run.ask(Act.START, name)
        for _ in range(20):
            order = run.orders.pop(name, None)
            match order:
                case Start():
                    run(StartEnded(order.model, order.order, TRAITS, after=held(58, 4)), 1.0)
                case Sleep():
                    sleeps_at_once = SleepEnded(
                        order.model, order.order, before=held(58, 4), after=held(1, 64)
                    )
                    run(sleeps_at_once, 1.0)
                case Stop():
                    run(StopEnded(order.model, order.order), 1.0)
                case _:
                    break
        assert ledger.used(run.state)[HOST] <= 128 * GB
    asleep_now = [n for n in names if isinstance(run.phase(n), Asleep)]
    assert len(asleep_now) == 1
    assert sum(isinstance(run.phase(n), Awake) for n in names) <= 1


def test_want_of_host_ram_keeps_nobody_from_waking():
    """It takes none, and would be ordered again at once."""
    one = engine(Waking(OrderId(1), 0.0, ONE), holds_pinned=True)
    known = {(Kind.HOST, HOST): Figure(4 * GB, Source.MEASURED, margin_mib=GB)}
    one = replace(one, learnt=replace(one.learnt, figures=known))
    assert foreign.suffices(one, seen(80, ram_gb=0))
    assert not foreign.suffices(one, seen(10, ram_gb=200))
