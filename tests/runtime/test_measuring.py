"""What is looked at around orders, on virtual time."""

import asyncio
from collections.abc import Mapping

import pytest
from msgspec.structs import replace

from homegptd.core.events import MemorySeen, SleepEnded, StartEnded, WakeEnded
from homegptd.core.memory import HOST, Card, Foreign, Gpu, Held, Kind, Seen, Source
from homegptd.core.model import Asleep, Awake, ModelId, State
from homegptd.runtime.lease import Refused
from homegptd.runtime.measuring import LOOK_S, SETTLE_S, watch
from tests.runtime.jumping import jumping
from tests.runtime.small import A, B, Small, SmallEngine

G0 = Gpu(0)


class SmallMeter:
    """Fits MeterPort: 78 MiB awake, 4 asleep, on a card of 100."""

    def __init__(self, engines: Mapping[ModelId, SmallEngine]) -> None:
        self.engines = engines
        self.strangers = 0
        self.stuck: set[ModelId] = set()
        """Their sleep gives nothing back."""
        self.late_s = 0.0
        self.looks = 0

    def holds(self, model: ModelId) -> int:
        engine = self.engines[model]
        return 0 if not engine.running else 4 if engine.asleep and model not in self.stuck else 78

    async def seen(self) -> Seen:
        self.looks += 1
        used = sum(self.holds(model) for model in self.engines) + self.strangers
        return Seen({G0: Card("card", 100, used)}, {G0: "game (pid 3)"}, 1000)

    async def held(self, model: ModelId) -> Held:
        await asyncio.sleep(self.late_s)
        free = (await self.seen()).free_mib
        pinned = 45 if self.engines[model].calls.count("sleep") else 0
        return Held(1.0, {G0: self.holds(model)}, 8 + pinned, free)


def measured() -> tuple[Small, SmallMeter]:
    small = Small(meter=SmallMeter)
    assert isinstance(small.meter, SmallMeter)
    return small, small.meter


@jumping
async def test_starts_and_sleeps_teach_what_is_held() -> None:
    small, _ = measured()
    async with small.running():
        await small.until_booted()
        figures = small.engine(B).learnt.figures
        assert {key: figure.mib for key, figure in figures.items()} == {
            (Kind.AWAKE, G0): 78,
            (Kind.RESIDUE, G0): 4,
            (Kind.PINNED, HOST): 45,
            (Kind.HOST, HOST): 8,
        }
        key = f"{small.engine(B).spec.fingerprint}/0.32.0"
        assert small.store.figures(B, key) == figures


@jumping
async def test_what_was_learnt_comes_back_with_the_same_version() -> None:
    small, _ = measured()
    async with small.running():
        await small.until_booted()
    again, _ = measured()
    again.store.learnt = small.store.learnt
    async with again.running():
        await again.until(lambda: again.engine(A).traits is not None)
        traits = again.engine(A).traits
        assert traits
        assert traits.figures[Kind.RESIDUE, G0].source is Source.MEASURED


@jumping
async def test_a_wake_without_room_is_not_begun() -> None:
    small, meter = measured()
    async with small.running():
        await small.until_booted()
        meter.strangers = 40  # not even a's end would make room
        with pytest.raises(Refused, match=r"held by game \(pid 3\)"):
            await small.scheduler.lease(B, freezable=True).__aenter__()
        assert "wake" not in small.engines[B].calls
        told = [e for e in small.told(WakeEnded) if isinstance(e, WakeEnded) and e.crowded]
        assert len(told) == 1
        assert (B, "wake-1") not in [(model, act) for model, act, _ in small.store.took]
        assert isinstance(small.engine(B).phase, Asleep)


@jumping
async def test_room_that_comes_late_is_waited_for() -> None:
    small, meter = measured()
    async with small.running():
        await small.until_booted()
        meter.strangers = 20
        small.loop.call_later(10.0, setattr, meter, "strangers", 0)  # B waits for A's residency
        async with small.scheduler.lease(B, freezable=True):
            assert isinstance(small.engine(B).phase, Awake)


@jumping
async def test_a_start_without_room_launches_nothing() -> None:
    small, meter = measured()
    meter.strangers = 30
    async with small.running():
        await small.until_booted()
        assert "start" not in small.engines[A].calls
        told = small.told(StartEnded)
        assert all(isinstance(e, StartEnded) and e.crowded for e in told)


@jumping
async def test_a_sleep_that_gives_nothing_back_gets_its_time_and_no_more() -> None:
    small, meter = measured()
    async with small.running():
        await small.until_booted()
        meter.stuck.add(A)
        began = small.loop.time()
        async with small.scheduler.lease(B, freezable=True):
            pass
        ended = next(e for e in reversed(small.told(SleepEnded)) if getattr(e, "model", "") == A)
        assert isinstance(ended, SleepEnded)
        assert ended.after
        assert ended.after.gpu_mib == {G0: 78}
        assert small.loop.time() - began > SETTLE_S
        assert any("came back on gpu0" in line for line in small.lines)
        assert small.engines[A].calls.count("stopped") == 1


@jumping
async def test_strangers_are_told_when_they_were_seen_twice() -> None:
    _, meter = measured()
    told: list[MemorySeen] = []
    state = replace(State(), gpus={G0: 100}, host_mib=1000)

    async def looking() -> None:
        await watch(meter, lambda: state, told.append)  # type: ignore[arg-type]

    meter.strangers = 0
    async with asyncio.TaskGroup() as group:
        task = group.create_task(looking())
        await asyncio.sleep(LOOK_S * 1.5)
        meter.strangers = 90
        await asyncio.sleep(LOOK_S)
        assert told == []  # it may be what an engine gave back a moment ago
        await asyncio.sleep(LOOK_S)
        assert told[0].missing == {G0: 90, HOST: 0}
        assert told[0].strangers == {G0: "game (pid 3)"}
        task.cancel()


@jumping
async def test_what_kept_a_wake_out_is_not_forgotten_at_the_next_look() -> None:
    """While an order is in flight little is missing; what it then tells needs no second look."""
    _, meter = measured()
    told: list[MemorySeen] = []
    state = replace(State(), gpus={G0: 100}, host_mib=1000)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(watch(meter, lambda: state, told.append))  # type: ignore[arg-type]
        await asyncio.sleep(LOOK_S * 0.5)
        meter.strangers = 90
        state = replace(state, foreign={G0: Foreign(90, "game (pid 3)")})
        await asyncio.sleep(LOOK_S * 2)
        assert told == []
        meter.strangers = 0
        await asyncio.sleep(LOOK_S)
        assert told[0].missing == {G0: 0, HOST: 0}
        task.cancel()
