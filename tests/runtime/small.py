"""Two engines in memory that do as they are told, and when told so, do not."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from homegptd.core.events import Event
from homegptd.core.machine import initial
from homegptd.core.memory import Figures
from homegptd.core.model import (
    Awake,
    Engine,
    EngineSpec,
    Exit,
    Gpu,
    ModelId,
    Policy,
    Proof,
    Running,
    SleepLevel,
    SleepMode,
    Startup,
    Traits,
)
from homegptd.core.refusals import Fault
from homegptd.runtime.bootstrap import observe
from homegptd.runtime.orders import Limits, Orders
from homegptd.runtime.ports import MeterPort
from homegptd.runtime.scheduler import Scheduler

A, B = ModelId("a"), ModelId("b")
START_S, SLEEP_S, WAKE_S, STOP_S, LIMIT_S = 10.0, 2.0, 1.0, 3.0, 60.0


@dataclass
class SmallEngine:
    """Fits EnginePort. `breaks` maps a method to what it raises."""

    name: ModelId
    running: bool = False
    up: bool = False
    asleep: bool = False
    hung: bool = False
    never_up: bool = False
    breaks: dict[str, BaseException] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    ended: asyncio.Future[Exit] | None = None
    exits: Exit | None = None
    """It ends like this instead of getting healthy."""
    probes: list[float] = field(default_factory=list)
    canary_reference: str | None = None

    async def _does(self, what: str, seconds: float) -> None:
        self.calls.append(what)
        await asyncio.sleep(seconds)
        if what in self.breaks:
            raise self.breaks[what]

    async def ready(self) -> bool:
        return self.up

    async def identify(self) -> Traits:
        await self._does("identify", 0.1)
        if not self.asleep:
            self.canary_reference = f"{self.name} sings"
        return Traits("0.32.0", frozenset({SleepLevel.ONE}), asleep=self.asleep)

    async def sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        await self._does("sleep", 1000.0 if self.hung else SLEEP_S)
        if not self.up:  # a zombie never answers a call that is out
            await asyncio.get_running_loop().create_future()
        self.asleep = True

    async def rouse(self, level: SleepLevel) -> None:
        await self._does("rouse", WAKE_S)

    async def wake(self, level: SleepLevel, *, frozen: bool, roused: bool) -> None:
        await self._does("wake", WAKE_S)
        self.asleep = False

    async def is_sleeping(self) -> bool:
        await self._does("is_sleeping", 0.0)
        return self.asleep

    async def check(self) -> None:
        self.probes.append(asyncio.get_running_loop().time())
        await self._does("check", 0.0)
        if self.hung:
            raise Fault(f'"{self.name}" hangs')

    async def speak(self) -> None:
        await self._does("speak", 1.0)

    async def prove(self, proof: Proof) -> str:
        await self._does("prove", 1.0)
        return "equal"

    def end(self, exit_: Exit) -> None:
        self.running = self.up = self.asleep = False
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(exit_)


class SmallUnits:
    """Fits UnitsPort."""

    def __init__(self, engines: Mapping[ModelId, SmallEngine]) -> None:
        self.engines = engines
        self.images: dict[ModelId, str] = {}

    async def observe(self) -> Mapping[ModelId, Running]:
        return {name: Running(1, 0.0) for name, e in self.engines.items() if e.running}

    async def start(self, model: ModelId) -> None:
        engine, loop = self.engines[model], asyncio.get_running_loop()
        engine.calls.append("start")
        if "start" in engine.breaks:
            raise engine.breaks["start"]
        engine.running, engine.ended = True, loop.create_future()
        if engine.exits is not None:
            loop.call_later(START_S, engine.end, engine.exits)
        elif not engine.never_up:
            loop.call_later(START_S, setattr, engine, "up", True)

    async def stop(self, model: ModelId) -> None:
        engine = self.engines[model]
        engine.calls.append("stop")
        await asyncio.sleep(STOP_S)
        if "stop" in engine.breaks:
            raise engine.breaks["stop"]
        engine.end(Exit(0, "was stopped"))
        engine.calls.append("stopped")

    async def gone(self, model: ModelId) -> Exit:
        engine = self.engines[model]
        if "gone" in engine.breaks:
            raise engine.breaks["gone"]
        if engine.ended is None:
            return Exit(None, "was not running")
        await asyncio.wait([engine.ended])
        return engine.ended.result()

    def image(self, model: ModelId) -> str:
        return self.images.get(model, "")

    async def log_tail(self, model: ModelId, lines: int) -> Sequence[str]:
        return ()


class SmallStore:
    """Fits StorePort."""

    def __init__(self) -> None:
        self.known: dict[tuple[ModelId, str, Proof], tuple[bool, str]] = {}
        self.took: list[tuple[ModelId, str, float]] = []
        self.canaries: dict[tuple[ModelId, str], str] = {}
        self.notes: dict[str, str] = {}
        self.learnt: dict[tuple[ModelId, str], Figures] = {}

    def canary(self, model: ModelId, key: str) -> str | None:
        return self.canaries.get((model, key))

    def remember_canary(self, model: ModelId, key: str, said: str) -> None:
        self.canaries[model, key] = said

    def proofs(self, model: ModelId, key: str) -> Mapping[Proof, bool]:
        return {p: holds for (m, k, p), (holds, _) in self.known.items() if (m, k) == (model, key)}

    def remember_proof(
        self, model: ModelId, key: str, proof: Proof, *, holds: bool, detail: str
    ) -> None:
        self.known[model, key, proof] = (holds, detail)

    def note(self, name: str) -> str | None:
        return self.notes.get(name)

    def remember_note(self, name: str, text: str) -> None:
        self.notes[name] = text

    def figures(self, model: ModelId, key: str) -> Figures:
        return self.learnt.get((model, key), {})

    def remember_figures(self, model: ModelId, key: str, figures: Figures) -> None:
        self.learnt[model, key] = figures

    def durations(self) -> Mapping[tuple[ModelId, str], Sequence[float]]:
        return {}

    def remember_duration(self, model: ModelId, act: str, seconds: float) -> None:
        self.took.append((model, act, seconds))


class Small:
    """The runtime on two models of which one fits; `a` is to be awake."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        meter: Callable[[Mapping[ModelId, SmallEngine]], MeterPort] | None = None,
    ) -> None:
        self.engines = {A: SmallEngine(A), B: SmallEngine(B)}
        self.meter = meter(self.engines) if meter else None
        self.units = SmallUnits(self.engines)
        self.store = SmallStore()
        self.events: list[Event] = []
        self.lines: list[str] = []
        self.loop = asyncio.get_running_loop()
        self.orders = Orders(
            self.units,
            self.engines,
            self.store,
            start_limit_s=lambda model: LIMIT_S,
            limits=Limits(probe_s=10.0, strikes=2),
            meter=self.meter,
        )
        specs = (_spec(A, Startup.ACTIVE), _spec(B, Startup.SLEEP))
        policy = policy or Policy(default=A, patience_s=5.0, residency_s=5.0)
        state = initial(specs, policy, {Gpu(0): 100}, 1000)
        self.scheduler = Scheduler(state, self.orders, max_wait_s=100.0)
        self.orders.connect(self._post, lambda: self.scheduler.state)

    def _post(self, event: Event) -> None:
        self.events.append(event)
        self.scheduler.post(event)

    def engine(self, model: ModelId) -> Engine:
        return self.scheduler.state.engines[model]

    def found(self, model: ModelId, *, asleep: bool = False) -> None:
        """It ran before us."""
        engine = self.engines[model]
        engine.running = engine.up = True
        engine.asleep = asleep
        engine.ended = self.loop.create_future()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Small"]:
        """Observed, so that orders are given."""
        async with self.scheduler.running():
            with self.scheduler.watched(lambda lines: self.lines.extend(x.text for x in lines)):
                self.scheduler.post(await observe(self.units, self.engines, self.orders.identify))
                yield self

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(1000.0):
            while not holds():  # noqa: ASYNC110  # on a clock that jumps
                await asyncio.sleep(0.25)

    async def until_booted(self) -> None:
        await self.until(lambda: self.scheduler.state.booted)

    def told(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def nothing_is_left(self) -> bool:
        """No ticket anywhere."""
        state = self.scheduler.state
        leases = [e.phase.leases for e in state.engines.values() if isinstance(e.phase, Awake)]
        return not state.waiting and not state.granted and not any(leases)


def _spec(model: ModelId, startup: Startup) -> EngineSpec:
    return EngineSpec(
        model, (Gpu(0),), awake_mib=80, residue_mib=5, pinned_mib=50, host_mib=10, startup=startup
    )
