"""Whatever happens in whatever order, the machine keeps its promises."""

import hypothesis.strategies as st
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from msgspec.structs import replace

from homegptd.core.events import (
    CancelAsked,
    ConfigChanged,
    EngineDied,
    EngineSilent,
    Found,
    Observed,
    OperationAsked,
    ShutdownAsked,
    TimePassed,
)
from homegptd.core.machine import initial
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    EngineSpec,
    Failure,
    Gpu,
    ModelId,
    OnDeadline,
    Operation,
    OperationId,
    Policy,
    Proof,
    SleepLevel,
    Startup,
    State,
    Traits,
)
from tests.properties.world import Box, Process

NAMES = [ModelId(name) for name in "abcdef"]
ONE, TWO = SleepLevel.ONE, SleepLevel.TWO

traits = st.builds(
    Traits,
    version=st.just("0.32"),
    levels=st.sampled_from(
        [frozenset({ONE, TWO}), frozenset({ONE, TWO}), frozenset({ONE}), frozenset()]
    ),
    can_keep=st.sampled_from([True, True, False]),
    can_rouse=st.sampled_from([True, True, True, False]),
    proofs=st.sampled_from(
        [{}, {Proof.FREEZE: True}, {Proof.FREEZE: True, Proof.RELOAD: True}, {Proof.RELOAD: False}]
    ),
)
lengths = st.none() | st.sampled_from([0.0, 5.0, 30.0])
policies = st.builds(
    Policy,
    default=st.none() | st.sampled_from(NAMES),
    level=st.sampled_from([ONE, ONE, TWO]),
    patience_s=lengths,
    residency_s=lengths,
    drain_s=st.sampled_from([0.0, 10.0]),
    on_deadline=st.sampled_from([OnDeadline.AUTO, OnDeadline.FREEZE, *OnDeadline]),
    max_answer_s=st.sampled_from([20.0, 60.0]),
    freeze_max_s=st.sampled_from([10.0, 60.0]),
    max_waiting=st.sampled_from([3, 100]),
    return_to_default_s=st.none() | st.just(15.0),
)


@st.composite
def specs(draw: st.DrawFn, name: ModelId, gpus: int) -> EngineSpec:
    places = st.lists(st.integers(0, gpus - 1), min_size=1, max_size=gpus, unique=True)
    residue = draw(st.integers(1, 8))
    return EngineSpec(
        model=name,
        gpus=tuple(Gpu(n) for n in sorted(draw(places))),
        awake_mib=residue + draw(st.integers(10, 88)),
        residue_mib=residue,
        pinned_mib=draw(st.integers(1, 12) | st.integers(1, 60)),
        host_mib=draw(st.sampled_from([1, 3, 8, 25])),
        startup=draw(st.sampled_from([Startup.SLEEP, Startup.ACTIVE, *Startup])),
        level=draw(st.sampled_from([None, None, ONE, TWO])),
        pinned=draw(st.integers(0, 7)) == 0,
        priority=draw(st.integers(-1, 1)),
        auto_switch=draw(st.integers(0, 7)) != 0,
        sleep_after_s=draw(st.none() | st.sampled_from([0.0, 20.0])),
        stop_after_s=draw(st.none() | st.none() | st.just(40.0)),
        fingerprint=draw(st.sampled_from("xy")),
    )


class Machine(RuleBasedStateMachine):
    """One box: 1 to 3 GPUs, 1 to 6 engines, and everything that can befall them."""

    @initialize(data=st.data(), gpus=st.integers(1, 3), count=st.integers(1, 6))
    def a_box(self, data: st.DataObject, gpus: int, count: int) -> None:
        names = NAMES[:count]
        given = tuple(self.spec(data, name, gpus) for name in names)
        sizes = st.sampled_from([60, 100, 140])
        self.gpus = {Gpu(n): data.draw(sizes) * self.scale for n in range(gpus)}
        host = data.draw(st.sampled_from([60, 120, 400])) * self.scale
        state = initial(given, data.draw(policies), self.gpus, host)
        known = {name: data.draw(traits) for name in NAMES}
        self.box = self.a_world(data, state, known)
        self.asked = 0
        self.box.feed(Observed(self.found(data, given, known)))

    scale = 1
    """Multiplies all sizes: margins are shares, and a share of little is nothing."""

    def a_world(self, data: st.DataObject, state: State, known: dict[ModelId, Traits]) -> Box:
        return Box(state, traits=known)

    def spec(self, data: st.DataObject, name: ModelId, gpus: int) -> EngineSpec:
        return data.draw(specs(name, gpus), label=name)

    def found(self, data, given, known) -> dict[ModelId, Found]:
        """Engines that survived the daemon: as many as really fit."""
        found: dict[ModelId, Found] = {}
        for spec in given:
            how = data.draw(st.sampled_from(["down", "down", "asleep", "awake", "mute"]))
            if how == "down":
                continue
            true = self.box.physics.true(spec)
            gpu = true.residue_mib if how == "asleep" else true.awake_mib
            level = data.draw(st.sampled_from([None, ONE]))
            told = how == "asleep" and level is ONE
            slept = ONE in known[spec.model].levels or told  # who cannot sleep has pinned nothing
            pinned = true.pinned_mib if slept else 0
            self.box.physics.running[spec.model] = Process(true, gpu, pinned)
            try:
                self.box.physics.check()
            except AssertionError:
                del self.box.physics.running[spec.model]
                continue
            now = replace(known[spec.model], asleep=how == "asleep", asleep_level=level)
            found[spec.model] = Found() if how == "mute" else self.box.found(spec.model, now)
        self.box.physics.mute = {name for name, f in found.items() if f.traits is None}
        return found

    # ------------------------------------------------------------ what befalls it

    def one_of_the_models(self, data) -> ModelId:
        """Mostly one that there is."""
        known = sorted(self.box.state.engines)
        return data.draw(st.sampled_from([*known, *known, *known, "f"]))

    @rule(
        data=st.data(),
        freezable=st.integers(0, 4).map(bool),
        may_switch=st.integers(0, 9).map(bool),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def a_request_arrives(self, data, freezable, may_switch, priority) -> None:
        model = self.one_of_the_models(data)
        self.box.arrive(model, freezable=freezable, may_switch=may_switch, priority=priority)

    @rule(data=st.data(), count=st.integers(2, 4))
    def requests_arrive(self, data, count) -> None:
        for _ in range(count):
            self.box.arrive(self.one_of_the_models(data), freezable=True)

    @precondition(lambda self: self.box.granted or self.box.waiting)
    @rule(data=st.data(), served=st.booleans())
    def a_request_ends(self, data, served) -> None:
        tickets = sorted([*self.box.granted, *self.box.waiting])
        self.box.close(data.draw(st.sampled_from(tickets)), served=served)

    @precondition(lambda self: self.box.orders)
    @rule(data=st.data(), took=st.sampled_from([0.0, 1.0, 7.0]))
    def an_order_ends_well(self, data, took) -> None:
        self.box.now += took
        self.box.end(data.draw(st.sampled_from(sorted(self.box.orders))))

    @precondition(lambda self: self.box.orders)
    @rule(count=st.integers(1, 8))
    def orders_end_well(self, count) -> None:
        for _ in range(count):
            if self.box.orders:
                self.box.now += 1.0
                self.box.end(min(self.box.orders))

    @precondition(lambda self: self.box.orders)
    @rule(data=st.data(), lasting=st.sampled_from([False, False, True]))
    def an_order_fails(self, data, lasting) -> None:
        failure = Failure("it did not work", lasting=lasting)
        self.box.end(data.draw(st.sampled_from(sorted(self.box.orders))), failure)

    @precondition(lambda self: self.box.stale)
    @rule(data=st.data(), fails=st.booleans())
    def a_result_comes_late(self, data, fails) -> None:
        phases = {e.spec.model: e.phase for e in self.box.engines()}
        likely = [o for o in self.box.stale if _is_like(o, phases.get(o.model))]
        order = data.draw(st.sampled_from(likely or self.box.stale))
        self.box.feed(self.box.result(order, Failure("late") if fails else None))

    @rule(data=st.data(), stale=st.integers(0, 4))
    def an_engine_dies(self, data, stale) -> None:
        if data.draw(st.booleans()):
            return
        name = data.draw(st.sampled_from(sorted(self.box.state.engines) or NAMES))
        engine = self.box.state.engines.get(name)
        now = engine.incarnation if engine else 0
        self.box.feed(EngineDied(name, now - (stale == 0), Failure("killed")))

    @rule(data=st.data(), stale=st.booleans())
    def an_answer_is_waited_for_in_vain(self, data, stale) -> None:
        model = self.one_of_the_models(data)
        engine = self.box.state.engines.get(model)
        self.box.feed(EngineSilent(model, (engine.incarnation if engine else 0) - stale, 600.0))

    @rule(
        data=st.data(),
        act=st.sampled_from(Act),
        cut=st.booleans(),
        force=st.booleans(),
        level=st.sampled_from([None, None, ONE, TWO]),
    )
    def an_operator_asks(self, data, act, cut, force, level) -> None:
        model = ModelId("") if act.of_gpus else self.one_of_the_models(data)
        gpus: tuple[Gpu, ...] = ()
        if act.of_gpus and data.draw(st.booleans()):
            gpus = (Gpu(data.draw(st.integers(0, len(self.gpus) - 1))),)
        self.asked += 1
        number, at = OperationId(self.asked), self.box.now
        asked = Operation(
            number, act, model, "root", at, cut=cut, force=force, level=level, gpus=gpus
        )
        self.box.feed(OperationAsked(asked))

    @precondition(lambda self: self.box.operations)
    @rule(data=st.data())
    def an_operator_cancels(self, data) -> None:
        number = data.draw(st.sampled_from(sorted(self.box.operations)))
        self.box.feed(CancelAsked(number))

    @precondition(lambda self: self.box.wake_at and self.box.wake_at < self.box.now + 1000)
    @rule(late=st.sampled_from([0.0, 0.0, 3.0]))
    def the_alarm_rings(self, late) -> None:
        self.box.now = self.box.wake_at + late
        self.box.feed(TimePassed())

    @rule(data=st.data(), rings=st.integers(1, 6))
    def streams_contend(self, data, rings) -> None:
        """Somebody streams, somebody else waits, and time goes on until something gives."""
        for _ in range(2):
            self.box.arrive(self.one_of_the_models(data), freezable=True)
        for _ in range(rings):
            if self.box.orders:
                self.box.now += 1.0
                self.box.end(min(self.box.orders))
            elif self.box.wake_at and self.box.wake_at < self.box.now + 1000:
                self.box.now = self.box.wake_at
                self.box.feed(TimePassed())

    def rivals(self) -> list[tuple[ModelId, ModelId]]:
        """An engine that is awake, and one that sleeps on the same GPU."""
        engines = self.box.state.engines.values()
        return [
            (up.spec.model, down.spec.model)
            for up in engines
            for down in engines
            if isinstance(up.phase, Awake) and isinstance(down.phase, Asleep)
            and not set(up.spec.gpus).isdisjoint(down.spec.gpus)
        ]  # fmt: skip

    @precondition(lambda self: self.rivals())
    @rule(data=st.data(), stays=st.booleans(), patience=st.sampled_from([0.0, 40.0]))
    def a_sleeper_is_wanted_while_another_answers(self, data, stays, patience) -> None:
        up, down = data.draw(st.sampled_from(self.rivals()))
        self.box.arrive(up, freezable=True)
        wish = self.box.arrive(down)
        self.box.now += patience
        self.box.feed(TimePassed())
        if not stays and wish in self.box.waiting:
            self.box.close(wish)

    @rule(share=st.floats(0.1, 0.9))
    def time_passes(self, share) -> None:
        ahead = self.box.wake_at - self.box.now if self.box.wake_at is not None else 10.0
        self.box.now += min(ahead, 50.0) * share
        self.box.feed(TimePassed())

    @rule(data=st.data(), really=st.integers(0, 5))
    def the_configuration_changes(self, data, really) -> None:
        if really:
            return
        count = data.draw(st.integers(1, 6))
        names = data.draw(st.permutations(NAMES))[:count]
        given = []
        for name in names:
            old = self.box.state.engines.get(name)
            spec = self.spec(data, name, len(self.gpus))
            if old is not None and spec.fingerprint == old.spec.fingerprint:
                spec = replace(old.spec, startup=spec.startup, pinned=spec.pinned, level=spec.level)
            given.append(spec)
        policy = data.draw(policies)
        self.box.feed(ConfigChanged(tuple(given), policy, self.gpus, self.box.state.host_mib))

    @precondition(lambda self: not self.box.state.stopping)
    @rule(really=st.integers(0, 60))
    def the_box_shuts_down(self, really) -> None:
        if really == 60:
            self.box.feed(ShutdownAsked())

    def teardown(self) -> None:
        if hasattr(self, "box") and self.box.sound:
            note(repr(self.box.state))
            count = len(self.box.state.engines)
            self.box.come_to_rest(max_steps=600, max_s=2000.0 * (count + 1))


def _is_like(order, phase) -> bool:
    """Whether a late result of this order could be taken for one of the order in flight."""
    doing = {"Start": "Starting", "Rouse": "Rousing", "Wake": "Waking", "Prove": "Proving",
             "Sleep": "FallingAsleep"}  # fmt: skip
    return doing.get(type(order).__name__, "Stopping") == type(phase).__name__


TestMachine = Machine.TestCase
