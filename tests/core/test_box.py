"""The life of the whole box: bootstrap, adoption, reload and shutdown."""

import pytest
from msgspec.structs import replace

from homegptd.core.commands import Finish, Refuse, Start, Stop, Watch
from homegptd.core.events import (
    ConfigChanged,
    Found,
    Observed,
    RequestArrived,
    ShutdownAsked,
    TicketClosed,
)
from homegptd.core.fairness import MOST_QUIET_S
from homegptd.core.machine import initial
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    Down,
    Draining,
    Gpu,
    ModelId,
    Policy,
    Startup,
    TicketId,
    Waking,
)
from homegptd.core.refusals import NEXT_LIFE_S, Reason
from homegptd.core.story import summary, tell
from tests.core.builders import (
    GB,
    ONE,
    TRAITS,
    TWO,
    Run,
    asleep,
    awake,
    box,
    down,
    engine,
    spec,
    ticket,
)

CARD = {Gpu(0): 80 * GB}
SLEEPS = replace(TRAITS, asleep=True, asleep_level=ONE)


def life(*specs, policy: Policy | None = None, ram: int = 256, **found: Found) -> Run:
    run = Run(initial(specs, policy or Policy(), CARD, ram * GB))
    run(Observed({ModelId(name): one for name, one in found.items()}))
    return run


def everything(run: Run) -> list[str]:
    """Let all orders end well, in the order in which they were given; what was ordered."""
    told = []
    while run.orders:
        name = next(iter(run.orders))
        told.append(f"{type(run.orders[name]).__name__.lower()} {name}")
        run.done(name)
    return told


def test_models_come_up_one_by_one_and_the_default_wakes_last() -> None:
    run = life(
        spec("a", startup=Startup.ACTIVE),
        spec("b"),
        spec("c", startup=Startup.DISABLED),
        policy=Policy(default=ModelId("a")),
    )
    assert everything(run) == ["start a", "sleep a", "start b", "sleep b", "wake a"]
    assert run.state.booted
    assert isinstance(run.phase("c"), Down)


def test_several_actives_are_awake_together_if_they_fit_and_do_not_displace_each_other() -> None:
    small = {"awake_mib": 35 * GB, "startup": Startup.ACTIVE}
    run = life(spec("a", **small), spec("b", **small))
    everything(run)
    assert isinstance(run.phase("a"), Awake)
    assert isinstance(run.phase("b"), Awake)
    big = {"startup": Startup.ACTIVE}
    run = life(spec("a", **big), spec("b", **big), policy=Policy(default=ModelId("b")))
    everything(run)
    assert isinstance(run.phase("a"), Asleep)
    assert isinstance(run.phase("b"), Awake)


def test_a_lone_model_that_has_no_ram_to_sleep_is_loaded_once_and_stays_awake() -> None:
    run = life(spec("a", startup=Startup.ACTIVE, level=ONE), ram=20)
    assert everything(run) == ["start a"]
    assert isinstance(run.phase("a"), Awake)
    assert run.state.booted


def test_loading_for_later_never_stops_and_starts_by_turns() -> None:
    run = life(spec("a", level=ONE), spec("b", level=ONE), ram=25)
    told = everything(run)
    assert told[:2] == ["start a", "sleep a"]
    assert run.state.chores == ()
    run.now += 10_000.0
    assert everything(run) == []


def test_a_failure_in_the_bootstrap_is_stepped_over() -> None:
    run = life(spec("a"), spec("b"))
    run.fails("a")
    run.done("a")
    run.done("b")
    run.done("b")
    assert run.state.booted
    assert run.phase("a").failure is not None


def test_nothing_is_ordered_or_granted_before_the_box_was_observed() -> None:
    run = Run(initial((spec("a"),), Policy(), CARD, 256 * GB))
    assert run(RequestArrived(ticket(1, "a", run.now))) == ()
    assert not run.state.booted
    assert run(Observed({ModelId("a"): Found(TRAITS)}))[0] == Watch(ModelId("a"), 1)
    assert run.phase("a").leases == {1}


def test_what_runs_is_adopted_as_it_is() -> None:
    run = life(spec("a"), spec("b"), a=Found(TRAITS), b=Found(SLEEPS))
    assert run.orders == {}
    assert isinstance(run.phase("a"), Awake)
    assert run.phase("b").level is ONE
    assert run.engine("b").holds_pinned


def test_a_sleeper_of_unknown_level_is_woken_as_one_of_level_2() -> None:
    run = life(spec("a"), a=Found(replace(SLEEPS, asleep_level=None)))
    assert run.phase("a").level is TWO


def test_a_second_observation_means_nothing() -> None:
    run = life(spec("a"), a=Found(TRAITS))
    before = run.state
    assert run(Observed()) == ()
    assert run.state == before


def test_of_two_that_do_not_answer_yet_on_one_gpu_the_second_is_stopped_first() -> None:
    small = {"awake_mib": 30 * GB}
    run = life(spec("a", **small), spec("b", **small), a=Found(), b=Found())
    assert [type(o) for o in run.orders.values()] == [Start, Stop]
    assert everything(run)[-2:] == ["start b", "sleep b"]


# ---------------------------------------------------------------- reload


def reload(run: Run, *specs, policy: Policy | None = None):
    return run(ConfigChanged(specs, policy or run.state.policy, run.state.gpus, 256 * GB))


def test_an_untouched_engine_notices_nothing() -> None:
    run = Run(box(a=awake(1)))
    before = run.engine("a")
    assert reload(run, before.spec) == ()
    assert run.engine("a") == before


def test_a_model_that_left_is_drained_stopped_and_forgotten() -> None:
    run = Run(box(a=awake(1), b=asleep()))
    run.request(2, "b")
    commands = reload(run, run.engine("b").spec)
    assert commands == ()
    assert isinstance(run.phase("a"), Draining)
    run(TicketClosed(TicketId(1)))
    run.done("a")
    assert set(run.state.engines) == {"b"}


def test_a_changed_engine_is_charged_for_what_it_runs_with_until_it_is_down() -> None:
    run = Run(box(gpus=(80, 80), a=awake(1)))
    moved = spec("a", gpus=(Gpu(1),), fingerprint="new")
    reload(run, moved)
    assert run.engine("a").spec.gpus == (Gpu(0),)
    run(TicketClosed(TicketId(1)))
    run.done("a")
    assert run.engine("a").spec == moved
    assert everything(run) == ["start a", "sleep a", "wake a"]


def test_a_model_is_disabled_and_enabled_by_its_start_up_mode_alone() -> None:
    run = Run(box(a=asleep()))
    off = replace(run.engine("a").spec, startup=Startup.DISABLED)
    assert [type(c) for c in reload(run, off)] == [Stop]
    run.done("a")
    (refusal,) = run.request(1, "a")
    assert refusal.refusal.reason is Reason.MODEL_DISABLED
    on = replace(off, startup=Startup.SLEEP)
    assert [type(c) for c in reload(run, on)] == [Start]


@pytest.mark.parametrize("fingerprint", ["", "new"])
def test_a_model_that_left_and_came_back_is_kept(fingerprint: str) -> None:
    run = Run(box(a=awake(1), b=asleep()))
    one, other = run.engine("a").spec, run.engine("b").spec
    reload(run, other)
    reload(run, replace(one, fingerprint=fingerprint), other)
    run(TicketClosed(TicketId(1)))
    everything(run)
    assert run.engine("a").enabled
    assert not run.engine("a").retiring
    assert not isinstance(run.phase("a"), Down)


def test_a_reload_that_renames_the_active_model_ends_with_it_awake() -> None:
    run = Run(box(a=awake(), b=asleep()))
    new = spec("new", startup=Startup.ACTIVE)
    reload(run, run.engine("b").spec, new, policy=Policy(default=ModelId("new")))
    assert everything(run) == ["stop a", "start new", "sleep new", "wake new"]
    assert isinstance(run.phase("new"), Awake)


def test_a_reload_wakes_again_what_a_load_displaced() -> None:
    run = Run(box(a=awake(), b=asleep()))
    reload(run, *(e.spec for e in run.state.engines.values()), spec("c"), spec("d"))
    told = everything(run)
    assert told == ["sleep a", "start c", "sleep c", "start d", "sleep d", "wake a"]
    assert run.state.chores == ()


@pytest.mark.parametrize(("default", "up"), [("a", "a"), ("c", "c"), (None, "c")])
def test_of_two_actives_a_reload_wakes_the_default(default: str | None, up: str) -> None:
    run = Run(box(a=awake(startup=Startup.ACTIVE)))
    policy = Policy(default=ModelId(default) if default else None)
    reload(run, run.engine("a").spec, spec("c", startup=Startup.ACTIVE), policy=policy)
    assert everything(run)[-1] == f"wake {up}"


def test_a_changed_active_model_is_awake_after_a_reload_even_if_it_slept() -> None:
    run = Run(box(a=asleep(startup=Startup.ACTIVE)))
    reload(run, spec("a", startup=Startup.ACTIVE, fingerprint="new"))
    assert everything(run) == ["stop a", "start a", "sleep a", "wake a"]


def test_a_model_that_becomes_active_is_woken_unless_its_place_is_in_use() -> None:
    run = Run(box(a=asleep()))
    reload(run, replace(run.engine("a").spec, startup=Startup.ACTIVE))
    assert everything(run) == ["wake a"]
    run = Run(box(a=asleep(), b=awake(1)))
    specs = [replace(run.engine("a").spec, startup=Startup.ACTIVE), run.engine("b").spec]
    assert reload(run, *specs) == ()
    assert run.state.chores == ()


def test_a_second_reload_while_a_model_restarts_still_ends_with_it_awake() -> None:
    run = Run(box(a=awake()))
    reload(run, spec("a", fingerprint="new"))
    run.done("a")
    reload(run, spec("a", fingerprint="newer"))
    everything(run)
    assert run.engine("a").spec.fingerprint == "newer"
    assert isinstance(run.phase("a"), Awake)


def test_a_reload_in_the_middle_of_the_bootstrap_loads_before_anybody_is_woken() -> None:
    run = life(spec("a", startup=Startup.ACTIVE))
    reload(run, run.engine("a").spec, spec("b"))
    assert everything(run) == ["start a", "sleep a", "start b", "sleep b", "wake a"]


def test_a_mended_configuration_tries_a_failed_engine_at_once() -> None:
    run = Run(box(a=down("bad flag", failures=5)))
    assert [type(c) for c in reload(run, spec("a", fingerprint="mended"))] == [Start]


# ---------------------------------------------------------------- shutdown


def test_shutdown_refuses_who_waits_and_leaves_engines_as_they_are() -> None:
    run = Run(box(a=awake(1), b=asleep()))
    run.request(2, "b")
    run.ask(Act.SWITCH, "b")
    commands = run(ShutdownAsked())
    assert [type(c) for c in commands] == [Refuse, Finish]
    assert isinstance(run.phase("a"), Awake)
    (refusal,) = run.request(3, "a")
    assert refusal.refusal.reason is Reason.SHUTTING_DOWN
    run(TicketClosed(TicketId(1)))
    assert run.wait(1000.0) == ()


def test_who_is_refused_at_the_end_comes_back_when_somebody_can_be_there() -> None:
    run = Run(box(a=awake(1), b=asleep()))
    run.request(2, "b")
    (refused,) = run(ShutdownAsked(patience_s=20.0))
    told = [refused.refusal.retry_after_s]
    run.wait(8.0)
    told += [each.refusal.retry_after_s for each in run.request(3, "a")]
    run(TicketClosed(TicketId(1)))
    told += [each.refusal.retry_after_s for each in run.request(4, "a")]
    assert told == [20.0 + NEXT_LIFE_S, 12.0 + NEXT_LIFE_S, NEXT_LIFE_S]


def test_a_shutdown_wakes_frozen_answers_as_soon_as_others_have_ended() -> None:
    frozen = Asleep(ONE, 0.0, frozenset({TicketId(1)}), 500.0)
    run = Run(box(a=engine(frozen), b=awake(1, first=2)))
    assert run(ShutdownAsked()) == ()
    assert run.wait(100.0) == ()
    assert run.phase("b").leases == {2}
    run(TicketClosed(TicketId(2)))
    run.wait(run.now + MOST_QUIET_S)
    run.done("b")
    run.done("a")
    assert run.phase("a").leases == {1}
    run(TicketClosed(TicketId(1)))
    assert run.wait(1000.0) == ()


def test_a_wake_for_frozen_answers_goes_on_in_a_shutdown() -> None:
    frozen = Asleep(ONE, 0.0, frozenset({TicketId(1)}), 500.0)
    run = Run(box(a=engine(frozen)))
    run.wait(1.0)
    assert isinstance(run.phase("a"), Waking)
    assert run(ShutdownAsked()) == ()
    run.done("a")
    assert run.phase("a").leases == {1}


def test_a_shutdown_in_the_middle_of_the_bootstrap_is_not_its_end() -> None:
    run = life(spec("a"), spec("b"))
    run(ShutdownAsked())
    run.done("a")
    assert not run.state.booted


def test_an_order_in_flight_ends_in_peace_during_shutdown() -> None:
    run = Run(box(a=awake(), b=asleep()))
    run.ask(Act.SWITCH, "b")
    run(ShutdownAsked())
    assert run.done("a") == ()
    assert isinstance(run.phase("a"), Asleep)


def test_an_adopted_engine_holds_pinned_ram_only_if_it_can_sleep_at_level_1() -> None:
    for levels in (frozenset({ONE, TWO}), frozenset({TWO}), frozenset()):
        run = life(spec("a"), a=Found(replace(TRAITS, levels=levels)))
        assert run.engine("a").holds_pinned is (ONE in levels)
        mute = life(spec("a"), a=Found(None))
        assert mute.engine("a").holds_pinned
        mute.done("a", traits=replace(TRAITS, levels=levels))
        assert mute.engine("a").holds_pinned is (ONE in levels)


def test_an_engine_that_is_known_to_have_pinned_nothing_is_adopted_as_such() -> None:
    assert not life(spec("a"), a=Found(TRAITS, pinned=False)).engine("a").holds_pinned
    mute = life(spec("a"), a=Found(None, pinned=False))
    assert not mute.engine("a").holds_pinned
    mute.done("a", traits=TRAITS)
    assert mute.phase("a").first


def test_an_engine_found_asleep_at_level_1_has_pinned_its_weights_whatever_was_noted() -> None:
    adopted = life(spec("a"), a=Found(SLEEPS, pinned=False)).engine("a")
    assert (adopted.holds_pinned, adopted.pins_unsure) == (True, False)


def test_pinned_ram_that_is_only_assumed_is_no_room_to_pin_it() -> None:
    """Of two found awake only one can have pinned its weights: no sleep may count on either."""
    traits = replace(TRAITS, levels=frozenset({ONE}))
    fresh = {"traits": traits, "sleep_after_s": 60.0, "pinned_mib": 50 * GB, "awake_mib": 20 * GB}
    unsure = awake(pins_unsure=True, **fresh)
    run = Run(box(ram=100, a=unsure, b=unsure))
    run.wait(100.0)
    assert not run.orders
    run = Run(box(ram=100, a=unsure, b=awake(holds_pinned=False, **fresh)))
    run.wait(100.0)
    assert list(run.orders) == ["a"]
    assert not run.engine("a").pins_unsure


def test_a_start_that_adopts_says_nothing_about_how_long_a_start_takes() -> None:
    run = life(spec("a"), a=Found(None))
    run.done("a", after=0.3)
    assert "start" not in run.engine("a").took
    fresh = life(spec("a"))
    fresh.done("a", after=50.0)
    assert fresh.engine("a").took["start"] == (50.0,)


def test_engines_that_leave_keep_their_order() -> None:
    names = [f"m{n}" for n in range(12)]
    run = life(*map(spec, names), ram=1000, **dict.fromkeys(names, Found(SLEEPS)))
    run(ConfigChanged((), Policy(), CARD, 1000 * GB))
    assert list(run.state.engines) == names


def test_a_model_that_never_fits_says_so_until_the_configuration_changes() -> None:
    big = spec("big", awake_mib=100 * GB, startup=Startup.ACTIVE)
    run = Run(initial((big,), Policy(), CARD, 256 * GB))
    before, event = run.state, Observed({})
    run(event)
    why = run.engine("big").no_room
    assert why is not None
    assert "needs 100.0 GB on gpu0" in why.message
    lines = tell(before, event, run.last, run.now)
    assert [line.text.split(":")[0] for line in lines if line.kind == "no-room"] == [
        'cannot bring up "big"'
    ]
    assert summary(run.state).startswith("degraded")
    run(ConfigChanged((big,), Policy(), {Gpu(0): 120 * GB}, 256 * GB))
    assert run.engine("big").no_room is None
    assert summary(run.state).startswith("ready")


def test_a_sleeper_that_pins_leave_no_room_for_says_so_until_it_comes_up() -> None:
    run = Run(box(a=awake(pinned=True), b=asleep()))
    run.request(1, "b")
    assert run.engine("b").no_room is not None
    run.ask(Act.SWITCH, "b", force=True)
    run.done("a")
    run.done("b")
    assert run.engine("b").no_room is None


def test_a_model_that_only_has_to_wait_for_room_is_not_called_too_large() -> None:
    run = life(spec("a"), spec("b"), policy=Policy(patience_s=5.0))
    everything(run)
    assert [e.no_room for e in run.state.engines.values()] == [None, None]
