"""As before, on a box that measures: what the configuration says of sizes is wrong, engines leak,
and strangers come and go. Once an engine is measured, no card runs out of memory any more."""

from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import precondition, rule
from msgspec.structs import replace

from homegptd.core import foreign
from homegptd.core.events import (
    Event,
    Found,
    MemorySeen,
    ProveEnded,
    RouseEnded,
    SleepEnded,
    StartEnded,
    TimePassed,
    WakeEnded,
)
from homegptd.core.memory import HOST, Held, Kind, Seen
from homegptd.core.model import (
    EngineSpec,
    Failure,
    ModelId,
    OrderId,
    State,
    Traits,
)
from tests.properties.test_machine import NAMES, Machine, specs
from tests.properties.world import Box, Given, Rouse, Start, Wake

SCALE = 200


class MeasuredBox(Box):
    """Carries out orders as a runtime with a meter does."""

    def __init__(self, state: State, **given: Any) -> None:
        super().__init__(state, **given)
        self.before: dict[OrderId, Held | None] = {}
        self.crowded: dict[OrderId, Seen] = {}
        self.doomed: set[OrderId] = set()

    def found(self, model: ModelId, traits: Traits) -> Found:
        return Found(traits, self.physics.held(model, self.now))

    def _take(self, command: Given) -> None:
        engine, seen = self.state.engines[command.model], self.physics.seen()
        adopts = command.model in self.physics.mute
        takes = isinstance(command, Start | Rouse | Wake) and not adopts
        if takes and not foreign.suffices(engine, seen):
            self.crowded[command.order] = seen
        elif not self.physics.fits(command, engine.spec):
            known = {kind for kind, _ in engine.learnt.figures}
            sure = {Kind.ROUSED} if isinstance(command, Rouse) else {Kind.AWAKE, Kind.HOST}
            assert not sure <= known, f"{command} runs out of memory, measured"
            assert takes, f"{command} runs out of memory"
            self.doomed.add(command.order)
        else:
            self.before[command.order] = self.physics.held(command.model, self.now)
            super()._take(command)

    def end(self, order: OrderId, failure: Failure | None = None) -> None:
        if order in self.crowded:
            given, seen = self.orders.pop(order), self.crowded.pop(order)
            self.feed(replace(super().result(given, Failure("")), failure=None, crowded=seen))
            return
        super().end(order, Failure("CUDA out of memory") if order in self.doomed else failure)

    def result(self, given: Given, failure: Failure | None = None) -> Event:
        event = super().result(given, failure)
        after = self.physics.held(given.model, self.now) if failure is None else None
        match event:
            case StartEnded() | RouseEnded() | WakeEnded() | SleepEnded():
                return replace(event, before=self.before.get(given.order), after=after)
            case ProveEnded():
                return replace(event, after=after)
            case _:
                return event

    def look(self) -> None:
        missing = foreign.missing(self.state, self.physics.seen())
        self.feed(MemorySeen(missing))


class MeasuredMachine(Machine):
    scale = SCALE

    def spec(self, data: st.DataObject, name: ModelId, gpus: int) -> EngineSpec:
        small = data.draw(specs(name, gpus), label=name)
        sizes = {
            key: getattr(small, key) * SCALE
            for key in ("awake_mib", "residue_mib", "pinned_mib", "host_mib")
        }
        return replace(small, **sizes, pinned_margin_mib=sizes["pinned_mib"])

    def a_world(self, data: st.DataObject, state: State, known: dict[ModelId, Traits]) -> Box:
        box = MeasuredBox(state, traits=known)
        shares = st.sampled_from([0.8, 0.95, 1.0, 1.0, 1.1])
        wrong = {name: [data.draw(shares) for _ in range(2)] for name in NAMES}
        leaks = {name: data.draw(st.sampled_from([0, 0, 3, 20])) for name in NAMES}
        pinned = {name: data.draw(st.sampled_from([1.0, 1.3, 1.9])) for name in NAMES}

        def true(spec: EngineSpec) -> EngineSpec:
            awake, residue = wrong[spec.model]
            return replace(
                spec,
                awake_mib=round(spec.awake_mib * awake),
                residue_mib=round(spec.residue_mib * residue),
                pinned_mib=round(spec.pinned_mib * pinned[spec.model]),
            )

        box.physics.true = true
        box.physics.leak = leaks.__getitem__
        policy = replace(state.policy, leak_mib=50)
        box.state = replace(state, policy=policy)
        return box

    @precondition(lambda self: self.box.state.since is not None)
    @rule()
    def somebody_looks(self) -> None:
        self.box.look()

    @rule(data=st.data(), share=st.sampled_from([0.3, 0.8, 1.0]))
    def a_stranger_comes(self, data: st.DataObject, share: float) -> None:
        gpu = data.draw(st.sampled_from(sorted(self.gpus)))
        self.box.physics.strangers[gpu] = 0
        self.box.physics.strangers[gpu] = max(0, round(self.box.physics.free(gpu) * share))

    @rule(data=st.data(), rounds=st.integers(2, 6))
    def engines_take_turns(self, data: st.DataObject, rounds: int) -> None:
        """Switch after switch, as leaks and figures need to show."""
        for _ in range(rounds):
            ticket = self.box.arrive(self.one_of_the_models(data))
            for _ in range(12):
                if self.box.orders:
                    self.box.now += 1.0
                    self.box.end(min(self.box.orders))
                elif ticket in self.box.granted or self.box.wake_at is None:
                    break
                else:
                    self.box.now = self.box.wake_at
                    self.box.feed(TimePassed())
            self.box.close(ticket)

    @precondition(lambda self: any(self.box.physics.strangers.values()))
    @rule()
    def strangers_go(self) -> None:
        self.box.physics.strangers.clear()
        self.box.look()

    def teardown(self) -> None:
        if hasattr(self, "box") and self.box.sound:
            self.box.physics.strangers.clear()
            self.box.look()
            assert HOST not in self.box.state.foreign
        super().teardown()


TestMeasuredMachine = MeasuredMachine.TestCase
