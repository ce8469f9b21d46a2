"""Engines in memory, and the ports through which the runtime reaches them.

What they hold is `homegptd.sim.physics`, which knows nothing of the ledger: where the machine plans
badly, this box runs out of memory. Transitions belong to the engine and not to who asked: they go
on when the caller is cancelled or its daemon is killed, as vLLM's do.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from homegptd.core.memory import Card, Figures, Gpu, Held, Seen
from homegptd.core.model import (
    Exit,
    ModelId,
    Proof,
    Running,
    SleepLevel,
    SleepMode,
    Traits,
)
from homegptd.core.refusals import Fault
from homegptd.runtime.lease import Lease
from homegptd.sim.physics import Box, Memory, PhysicsError, Speeds

from .fleet import Model, Mood

SPEEDS = Speeds()
VERSION = "0.32.0"
DEADLINE_S = 40.0
"""Of each call to an engine."""
FIRST_BYTE_S = 0.3


class Answer:
    """One request inside an engine; its work is seconds of undisturbed generation."""

    def __init__(self, work_s: float, lease: Lease) -> None:
        self.loop = asyncio.get_running_loop()
        self.lease = lease
        self.done: asyncio.Future[str] = self.loop.create_future()
        self.begun = False
        self.was_frozen = False
        self._work_s = self._left_s = work_s
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def paused(self) -> bool:
        return self._timer is None and not self.done.done()

    def go_on(self) -> None:
        if self.paused:
            self._since = self.loop.time()
            self._timer = self.loop.call_later(self._left_s, self.end, "complete")

    def pause(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left_s -= self.loop.time() - self._since

    def end(self, how: str) -> None:
        """complete, aborted, died, or left: its client went away."""
        self.pause()
        self.begun = self._work_s - self._left_s > FIRST_BYTE_S
        if not self.done.done():
            self.done.set_result(how)


class Process:
    """One incarnation of an engine, from its launch until nothing of it is left."""

    def __init__(self, world: "Machines", model: Model, pid: int) -> None:
        self.world = world
        self.model = model
        self.pid = pid
        self.born_at = world.loop.time()
        self.memory = Memory(f"{model.id}#{pid}", model.foot)
        self.ended: asyncio.Future[Exit] = world.loop.create_future()
        self.up = False
        self.hung = False
        self.lost_at: float | None = None
        """Since when it is dead or hangs."""
        self.lucky = False
        self.stopping = False
        """Something ends it: it only gives memory back."""
        self.asleep: SleepLevel | None = None
        self.roused = False
        self.moving: asyncio.Future[str] | None = None
        self.answers: list[Answer] = []
        self._timers: list[asyncio.TimerHandle] = []

    @property
    def owner(self) -> str:
        return self.memory.owner

    @property
    def alive(self) -> bool:
        return not self.ended.done()

    @property
    def serves(self) -> bool:
        return self.up and self.asleep is None and self.moving is None

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers = [t for t in self._timers if not t.cancelled() and t.when() > self._now()]
        self._timers.append(self.world.loop.call_later(seconds, call))

    def _now(self) -> float:
        return self.world.loop.time()

    # ------------------------------------------------------------ life

    def launch(self, fate: str | None) -> None:
        imports_s = self.world.jitter(SPEEDS.imports_s)
        if fate in ("exits", "refuses flags"):
            code = 2 if fate == "refuses flags" else 1
            self.later(imports_s, lambda: self.die(code, f"exited with code {code}"))
        elif fate != "never up":
            slow = 4.0 if fate == "slow" else 1.0
            self.later(imports_s, lambda: self._load(slow))

    def _load(self, slow: float) -> None:
        self._physically(self.memory.begin_start, self.world.box)
        if not self.alive:
            return
        load_s = SPEEDS.load_s(self.model.foot) + SPEEDS.compile_s
        self.later(self.world.jitter(load_s) * slow, self._loaded)

    def _loaded(self) -> None:
        self._physically(self.memory.end_start, self.world.box)
        if not self.alive:
            return
        self.up = True
        mood = self.world.mood
        if mood.death_s is not None:
            self.later(self.world.rng.expovariate(1 / mood.death_s), self._dies_by_itself)
        if mood.hang_s is not None:
            self.later(self.world.rng.expovariate(1 / mood.hang_s), self._hangs_by_itself)

    def calm_down(self) -> None:
        """No more bad luck from here on."""
        self.lucky = True

    def _dies_by_itself(self) -> None:
        if not self.lucky:
            self.die(0, "exited with code 0")

    def _hangs_by_itself(self) -> None:
        if self.lucky:
            return
        self.hang()
        if self.world.rng.random() < 0.4:
            self.later(self.world.rng.uniform(1.0, 90.0), self._unhang)

    def hang(self) -> None:
        self.hung = True
        self.lost_at = self._now()
        for answer in self.answers:
            answer.pause()

    def _unhang(self) -> None:
        self.hung = False
        self.lost_at = None
        if self.serves:
            self._go_on()

    def die(self, code: int, detail: str) -> None:
        if not self.alive:
            return
        self.lose_answers("died")
        for timer in self._timers:
            timer.cancel()
        self._moved("died")
        self.lost_at = self._now()
        self.world.box.drop(self.owner)
        self.up = False
        self.ended.set_result(Exit(code, detail))

    def lose_answers(self, how: str) -> None:
        for answer in list(self.answers):
            answer.end(how)
        self.answers.clear()

    def _physically(self, move: Callable[..., None], *args: object) -> None:
        try:
            move(*args)
        except PhysicsError as error:
            if self.up or self.world.is_measured(self.model):
                self.world.violated(f"{self.owner} runs out of memory: {error}")
            else:  # nobody could know how large it is
                self.die(1, f"exited with code 1: {error}")

    # ------------------------------------------------------------ requests

    def submit(self, work_s: float, lease: Lease) -> Answer:
        answer = Answer(work_s, lease)
        if not self.up:
            answer.end("died")  # nobody listens
            return answer
        if lease.model != self.model.id:
            self.world.violated(f"a request for {lease.model} reaches {self.owner}")
        if not self.serves:
            self.world.violated(f"a request reaches {self.owner}, which is not awake")
        self.answers.append(answer)
        if not self.hung:
            answer.go_on()
        return answer

    def leave(self, answer: Answer) -> None:
        """The client's connection is closed: vLLM drops the request, asleep or not."""
        answer.end("left")
        if answer in self.answers:
            self.answers.remove(answer)

    def _go_on(self) -> None:
        for answer in self.answers:
            answer.go_on()

    # ------------------------------------------------------------ sleep and wake

    def fall_asleep(self, level: SleepLevel, mode: SleepMode, slow: float) -> None:
        self._begin("sleep")
        for answer in list(self.answers):
            if mode is SleepMode.KEEP:
                answer.pause()
                answer.was_frozen = True
            elif mode is SleepMode.ABORT:
                self.answers.remove(answer)
                answer.end("aborted")
        first = not self.memory.pinned
        self._physically(self.memory.begin_sleep, self.world.box, int(level))
        took = SPEEDS.sleep_s(self.model.foot, int(level), first=first)
        self.later(self.world.jitter(took) * slow, lambda: self._asleep(level))

    def _asleep(self, level: SleepLevel) -> None:
        leak = self.model.leak_mib
        self._physically(partial(self.memory.end_sleep, leak_mib=leak), self.world.box, int(level))
        self.asleep = level
        self.roused = False
        self._moved("done")

    def rouse(self, slow: float) -> None:
        """Its weights alone: it still counts as asleep."""
        self._begin("rouse")
        self._physically(self.memory.begin_wake, self.world.box, ("weights",))
        took = self._weights_s()
        self.later(self.world.jitter(took) * slow, self._has_weights)

    def _weights_s(self) -> float:
        level = self.memory.level
        reload_s = SPEEDS.reload_s(self.model.foot) if level != 1 else 0.0
        return SPEEDS.wake_s(self.model.foot, level, ("weights",)) + reload_s

    def _has_weights(self) -> None:
        self._physically(self.memory.end_wake, self.world.box, ("weights",))
        if self.memory.level != 1:
            self.memory.reload()
        self.roused = True
        self._moved("done")

    def wake_up(self, slow: float) -> None:
        self._begin("wake")
        self._physically(self.memory.begin_wake, self.world.box)
        took = SPEEDS.wake_s(self.model.foot, self.memory.level, ("kv_cache",))
        took += 0.0 if self.roused else self._weights_s()
        self.later(self.world.jitter(took) * slow, self._awake)

    def _awake(self) -> None:
        self._physically(self.memory.end_wake, self.world.box)
        if self.memory.level != 1 and not self.roused:
            self.memory.reload()
        if not self.memory.weights_valid:
            self.world.violated(f"{self.owner} is awake with garbage for weights")
        self.asleep = None
        self.roused = False
        self._moved("done")
        if not self.hung:
            self._go_on()

    def _begin(self, what: str) -> None:
        if self.moving is not None:
            self.world.violated(f"{what} of {self.owner} while another transition is under way")
        mine = set(self.model.foot.gpus)
        for other in self.world.living():
            busy = other.moving is not None or not other.up
            shares = not mine.isdisjoint(other.model.foot.gpus)
            if other is not self and busy and shares and not other.hung and not other.stopping:
                self.world.violated(f"{what} of {self.owner} while {other.owner} moves")
        self.moving = self.world.loop.create_future()

    def _moved(self, how: str) -> None:
        if self.moving is not None and not self.moving.done():
            self.moving.set_result(how)
        self.moving = None


@dataclass
class Machines:
    """The box, its processes and its luck."""

    box: Box
    rng: Random
    violated: Callable[[str], None]
    config: dict[ModelId, Model]
    """What an engine that starts now is started with."""
    mood: Mood = field(default_factory=Mood)
    processes: dict[ModelId, Process] = field(default_factory=dict)
    launches: int = 0
    about_to: Callable[[str, Process], None] = lambda what, process: None
    """Told of each stop and each sleep before it begins."""
    is_measured: Callable[[Model], bool] = lambda model: True
    """Whether the daemon has seen an engine of this configuration before."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def jitter(self, seconds: float) -> float:
        return seconds * self.rng.uniform(0.85, 1.3)

    def living(self) -> list[Process]:
        return [process for process in self.processes.values() if process.alive]

    def live(self, model: ModelId) -> Process | None:
        process = self.processes.get(model)
        return process if process is not None and process.alive else None

    def fault(self, *kinds: str) -> str | None:
        """Mostly None: all goes well."""
        if self.rng.random() < self.mood.order_fault:
            return self.rng.choice(kinds)
        return None


class Units:
    """Fits UnitsPort."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines

    async def observe(self) -> Mapping[ModelId, Running]:
        """What has left the configuration is ended, as the process backend does."""
        for process in self._machines.living():
            if process.model.id not in self._machines.config:
                process.die(0, "is not configured any more")
        return {p.model.id: Running(p.pid, p.born_at) for p in self._machines.living()}

    async def start(self, model: ModelId) -> None:
        machines = self._machines
        if machines.live(model) is not None:
            return
        await asyncio.sleep(machines.rng.uniform(0.01, 0.5))
        fate = machines.fault("fails", "lasting", "exits", "refuses flags", "never up", "slow")
        if fate in ("fails", "lasting"):
            text = f'cannot start "{model}": no such image'
            raise Fault(text, lasting=fate == "lasting" and machines.rng.random() < 0.3)
        machines.launches += 1
        process = Process(machines, machines.config[model], machines.launches)
        machines.processes[model] = process
        process.launch(fate)

    async def stop(self, model: ModelId) -> None:
        machines, process = self._machines, self._machines.live(model)
        if process is None:
            return
        machines.about_to("stop", process)
        process.stopping = True
        process.lose_answers("died")
        fate = machines.fault("survives", "slow")
        if fate == "survives":
            process.hang()
            await asyncio.sleep(20.0)
            raise Fault(f'cannot stop "{model}": pid {process.pid} survives SIGKILL')
        took = machines.rng.uniform(0.5, 3.0) + (10.0 if process.hung or fate == "slow" else 0.0)
        process.later(took, lambda: process.die(0, "was stopped"))
        await asyncio.wait([process.ended])

    async def gone(self, model: ModelId) -> Exit:
        process = self._machines.processes.get(model)
        if process is None:
            return Exit(None, "was not running")
        await asyncio.wait([process.ended])
        return process.ended.result()

    def image(self, model: ModelId) -> str:
        return ""

    async def log_tail(self, model: ModelId, lines: int) -> Sequence[str]:
        return ("some last words",)


class Meter:
    """Fits MeterPort: what the box really holds."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines

    async def seen(self) -> Seen | None:
        box = self._machines.box
        cards = {Gpu(g): Card("", total, box.used_mib(g)) for g, total in box.gpu_total_mib.items()}
        return Seen(cards, {}, box.ram_free_mib())

    async def held(self, model: ModelId) -> Held | None:
        box, process = self._machines.box, self._machines.live(model)
        seen = await self.seen()
        free = seen.free_mib if seen else {}
        if process is None or process.owner not in box.holdings:
            return Held(self._machines.loop.time(), free_mib=free)
        own = box.holdings[process.owner]
        held = {Gpu(gpu): mib for gpu, mib in own.gpu_mib.items()}
        return Held(self._machines.loop.time(), held, own.pinned_mib + own.host_mib, free)


class Engines:
    """Fits EnginesPort."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines

    def __getitem__(self, model: ModelId, /) -> "Client":
        return Client(self._machines, model)


class Client:
    """Fits EnginePort: the daemon's end of the connection to one engine."""

    def __init__(self, machines: Machines, model: ModelId) -> None:
        self._machines = machines
        self._model = model
        self.canary_reference: str | None = None

    async def ready(self) -> bool:
        """/health answers 200 even while the engine behind it hangs."""
        process = self._machines.live(self._model)
        return process is not None and process.up and not process.stopping

    async def identify(self) -> Traits:
        process = await self._settled()
        model = process.model
        if process.roused and process.asleep is not None:
            await self._move(process, None, "sleep", partial(process.fall_asleep, process.asleep,
                                                             SleepMode.KEEP))  # fmt: skip
        return Traits(
            version=VERSION,
            levels=model.levels,
            why_no_sleep=None if model.levels else "it was started without sleep mode",
            can_keep=model.can_keep and bool(model.levels),
            can_rouse=model.can_keep and bool(model.levels),
            asleep=process.asleep is not None,
            asleep_level=process.asleep if model.tells_level else None,
        )

    async def is_sleeping(self) -> bool:
        return (await self._settled()).asleep is not None

    async def check(self) -> None:
        await self._settled()

    async def speak(self) -> None:
        await self._settled()

    async def sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        process = await self._settled()
        self._machines.about_to(f"sleep {mode.value}", process)
        if level not in process.model.levels:
            self._machines.violated(f"{process.owner} is put to sleep at level {level}: it dies")
        fate = self._machines.fault("500", "dies", "hangs", "lies", "slow")
        await self._move(process, fate, "sleep", partial(process.fall_asleep, level, mode))

    async def rouse(self, level: SleepLevel) -> None:
        process = await self._settled()
        if process.asleep is None or process.roused:
            self._machines.violated(f"{process.owner} is roused but not asleep")
        if any(not answer.lease.cut.done() for answer in process.answers):
            self._machines.violated(f"{process.owner} is roused over answers nobody knows of")
        fate = self._machines.fault("500", "dies", "hangs", "lies", "slow")
        await self._move(process, fate, "rouse", process.rouse)

    async def wake(self, level: SleepLevel, *, frozen: bool, roused: bool) -> None:
        process = await self._settled()
        if process.roused is not roused:
            self._machines.violated(f"{process.owner} is woken as if roused were {roused}")
        if process.asleep is None:
            self._machines.violated(f"{process.owner} is woken but not asleep")
        if any(not answer.lease.cut.done() for answer in process.answers) and not frozen:
            self._machines.violated(f"{process.owner} is woken over answers nobody knows of")
        if process.memory.level == 2 and level is not SleepLevel.TWO:
            self._machines.violated(f"{process.owner} is woken from level 2 without a reload")
        fate = self._machines.fault("500", "dies", "hangs", "lies", "slow")
        await self._move(process, fate, "wake", process.wake_up)

    async def prove(self, proof: Proof) -> str:
        process = await self._settled()
        self._machines.about_to("prove", process)
        level = SleepLevel.ONE if proof is Proof.FREEZE else SleepLevel.TWO
        mode = SleepMode.KEEP if proof is Proof.FREEZE else SleepMode.WAIT
        fate = self._machines.fault("500", "dies", "hangs", "slow")
        await self._move(process, fate, "prove", partial(process.fall_asleep, level, mode))
        await self._move(process, None, "prove", process.wake_up)
        if proof is Proof.FREEZE and not process.model.freezes_well:
            raise Fault("the frozen answer went on with other words")
        return "64 of 64 tokens are equal"

    # ------------------------------------------------------------ how it goes

    async def _settled(self) -> Process:
        """Calls that cross into the engine wait for a transition under way, within limits."""
        process = self._machines.live(self._model)
        if process is None or not process.up:
            raise Fault(f'"{self._model}" refuses connections')
        if process.hung:
            await self._silence(process)
        if process.moving is not None:
            await asyncio.wait([process.moving], timeout=DEADLINE_S)
        if process.moving is not None or not process.alive:
            raise Fault(f'"{self._model}" did not answer within {DEADLINE_S:.0f} s')
        return process

    async def _silence(self, process: Process) -> None:
        await asyncio.wait([process.ended], timeout=DEADLINE_S)
        if process.hung or not process.alive:
            raise Fault(f'"{self._model}" did not answer within {DEADLINE_S:.0f} s')

    async def _move(
        self, process: Process, fate: str | None, what: str, begin: Callable[[float], None]
    ) -> None:
        rng = self._machines.rng
        match fate:
            case "500" if rng.random() < 0.5:
                await asyncio.sleep(rng.uniform(0.1, 5.0))
                raise Fault(f'cannot {what} "{self._model}": vLLM answered 500')
            case "lies":
                await asyncio.sleep(rng.uniform(0.1, 15.0))
                raise Fault(f'cannot {what} "{self._model}": it says 200 and does nothing')
            case "hangs":
                process.hang()
                await self._silence(process)
        begin(4.0 if fate == "slow" else 1.0)
        moving = process.moving
        if moving is None:
            raise AssertionError("a transition takes time")
        if fate == "dies":
            process.later(rng.uniform(0.0, 1.0), lambda: process.die(-11, "was killed by SIGSEGV"))
        await asyncio.wait([moving], timeout=DEADLINE_S * 4)
        if not moving.done() or moving.result() == "died" or fate == "500":
            raise Fault(f'cannot {what} "{self._model}": the connection broke')


@dataclass
class Store:
    """Fits StorePort."""

    known: dict[tuple[ModelId, str], dict[Proof, bool]] = field(default_factory=dict)
    took: dict[tuple[ModelId, str], list[float]] = field(default_factory=dict)
    canaries: dict[tuple[ModelId, str], str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    learnt: dict[tuple[ModelId, str], Figures] = field(default_factory=dict)

    def canary(self, model: ModelId, key: str) -> str | None:
        return self.canaries.get((model, key))

    def remember_canary(self, model: ModelId, key: str, said: str) -> None:
        self.canaries[model, key] = said

    def proofs(self, model: ModelId, key: str) -> Mapping[Proof, bool]:
        return dict(self.known.get((model, key), {}))

    def remember_proof(
        self, model: ModelId, key: str, proof: Proof, *, holds: bool, detail: str
    ) -> None:
        self.known.setdefault((model, key), {})[proof] = holds

    def note(self, name: str) -> str | None:
        return self.notes.get(name)

    def remember_note(self, name: str, text: str) -> None:
        self.notes[name] = text

    def figures(self, model: ModelId, key: str) -> Figures:
        return self.learnt.get((model, key), {})

    def remember_figures(self, model: ModelId, key: str, figures: Figures) -> None:
        self.learnt[model, key] = figures

    def durations(self) -> Mapping[tuple[ModelId, str], Sequence[float]]:
        return self.took

    def remember_duration(self, model: ModelId, act: str, seconds: float) -> None:
        self.took.setdefault((model, act), []).append(seconds)
        del self.took[model, act][:-20]
