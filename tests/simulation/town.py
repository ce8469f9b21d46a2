"""One box with all who live on it, from its first boot to its last quiet hour."""

import asyncio
import hashlib
import logging
import sys
import traceback
import warnings
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

from msgspec.structs import replace

from homegptd.core.draft import in_flight
from homegptd.core.events import ConfigChanged, ShutdownAsked
from homegptd.core.machine import initial
from homegptd.core.memory import Kind, Learnt
from homegptd.core.model import (
    Act,
    EngineSpec,
    ModelId,
    OperationId,
    SleepLevel,
    State,
    TicketId,
)
from homegptd.core.story import Line, summary
from homegptd.runtime.bootstrap import observe
from homegptd.runtime.heartbeat import Heartbeat
from homegptd.runtime.keeper import Keeper, Pins, recall
from homegptd.runtime.measuring import watch
from homegptd.runtime.orders import Limits, Orders
from homegptd.sim.physics import Box
from tests.runtime.jumping import run

from . import fleet as fleets
from .clients import HOUR, Clients, Habits
from .engines import VERSION, Engines, Machines, Meter, Store, Units
from .fleet import START_LIMIT_S, Fleet, Model, Mood
from .promises import PROBE_S, Count, Judge, Watched, wait_bound_s

STOP_S = 20.0
"""How long running answers may take at a planned restart."""


class BrokenPromise(Exception):
    """With the last lines of the story."""

    def __init__(self, text: str, tail: list[str]) -> None:
        super().__init__(text)
        self.tail = tail


@dataclass
class Story:
    """What the daemon and its clients tell; the same seed must tell the same."""

    tail: deque[str] = field(default_factory=lambda: deque(maxlen=60))
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def tell(self, now: float, text: str) -> None:
        line = f"{now:12.3f}  {text}"
        self.digest.update(line.encode())
        self.tail.append(line)


class Notes:
    """Fits NotifyPort: what systemd is told."""

    def __init__(self) -> None:
        self.readies = 0

    def ready(self, status: str) -> None:
        self.readies += 1

    def status(self, text: str) -> None: ...
    def extend(self, seconds: float) -> None: ...
    def watchdog(self) -> None: ...
    def reloading(self) -> None: ...
    def stopping(self, status: str) -> None: ...


class Town:
    """`live` runs it for some virtual hours. Raises: BrokenPromise."""

    def __init__(self, fleet: Fleet, seed: str, hours: float, story: Story) -> None:
        self.loop = asyncio.get_running_loop()
        self.fleet = fleet
        self.seed = seed
        self.hours = hours
        self.story = story
        self.count = Count()
        self.broken: asyncio.Future[str] = self.loop.create_future()
        self.models = {model.id: model for model in fleet.models}
        box = Box({int(gpu): mib for gpu, mib in fleet.gpus.items()}, fleet.ram_mib)
        self.machines = Machines(box, self._rng("luck"), self.violated, self.models)
        self.machines.mood = fleet.mood
        self.store = Store()
        self.machines.is_measured = self._is_measured
        self.judge = Judge(self.machines, self.count, self.violated)
        self.judge.calm = fleet.mood.calm
        self.judge.now_state = lambda: self.scheduler.state
        self.judge.on_grant = self._granted
        self.scheduler: Watched
        self.clients: Clients
        self._up = asyncio.Event()
        self._end_of_life: asyncio.Future[str]
        self._bound_s = 0.0

    def _granted(self, ticket: TicketId) -> None:
        self.clients.granted(ticket)

    def _rng(self, what: str) -> Random:
        return Random(f"{self.seed}/{what}")

    def violated(self, text: str) -> None:
        if not self.broken.done():
            for line in self._books():
                self.tell(line)
            self.tell(f"BROKEN: {text}")
            self.broken.set_result(text)

    def _books(self) -> Iterator[str]:
        state = self.scheduler.state
        for engine in state.engines.values():
            spec = engine.spec
            yield f"{spec.model} on {spec.gpus}, {spec.awake_mib} MiB: {engine.phase}"
        yield f"{len(state.waiting)} waiting, {state.operations}, {state.chores}"

    def tell(self, text: str) -> None:
        self.story.tell(self.loop.time(), text)

    # ------------------------------------------------------------ the course of things

    async def live(self) -> None:
        self.loop.set_exception_handler(self._unexpected)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._guard(), name="guard")
                await self._days(group)
                raise _OverError
        except* _OverError:
            pass
        except* _BrokenError:
            pass
        except* Exception as group:  # noqa: BLE001  # told as a broken promise
            self.violated(f"something broke: {_innermost(group)!r}")
            self.story.tail.extend(traceback.format_exception(_innermost(group))[-3:])
        if self.broken.done():
            raise BrokenPromise(self.broken.result(), list(self.story.tail))

    async def _guard(self) -> None:
        await asyncio.wait([self.broken])
        raise _BrokenError

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        self.violated(f"{context['message']}: {context.get('exception')!r}")

    async def _days(self, group: asyncio.TaskGroup) -> None:
        self.clients = Clients(
            self.machines,
            self.count,
            door=self._door,
            told=self.tell,
            violated=self.violated,
            group=group,
        )
        daemon = group.create_task(self._daemon(), name="daemon")
        async with asyncio.TaskGroup() as troubles:
            tasks = [troubles.create_task(t, name=t.__name__) for t in self._everybody()]
            await asyncio.sleep(self.hours * HOUR)
            for task in tasks:
                task.cancel()
        if self.fleet.contended:
            self._nimble_enough()
        await self._quiet_end()
        self._end_of_life.set_result("over")
        await daemon

    def _nimble_enough(self) -> None:
        """Under full contention switching takes at most its share of the time.

        A tenth on top for the jitter of a single switch, which the forecast cannot know.
        """
        judge, allowed = self.judge, self.fleet.policy.switch_share
        share = judge.moving_s / max(judge.booted_s, 1.0)
        self.tell(f"switching took {share:.1%} of the time, {allowed:.0%} are allowed")
        if judge.booted_s > HOUR and share > allowed * 1.1:
            self.violated(f"switching took {share:.1%} of the time, {allowed:.0%} are allowed")

    def _everybody(self) -> Iterator[Coroutine[None, None, None]]:
        habits = Habits(self.clients, self._rng("clients"), self._known)
        if self.fleet.contended:
            for name in self.models:
                yield habits.insist(name)
                yield habits.insist(name)
            return
        for _ in range(self._rng("crowd").choice((1, 2, 4, 10))):
            yield habits.live()
        mood = self.fleet.mood
        if mood.operator_s is not None:
            yield self._operators(mood.operator_s)
        if mood.reload_s is not None:
            yield self._reloads(mood.reload_s)
        if mood.restart_s is not None:
            yield self._restarts(mood.restart_s)

    def _known(self) -> list[ModelId]:
        """Clients know the configured models, and now and then one that left."""
        return [*self.models] * 8 + [model.id for model in self.fleet.spare]

    async def _quiet_end(self) -> None:
        """Nothing new and no more bad luck: everything comes to its end in bounded time."""
        self.machines.mood = Mood()
        for process in self.machines.living():
            process.calm_down()
        door = await self._door()
        door.operate(Act.RECLAIM, ModelId(""), by="ops")
        state = door.state
        await asyncio.sleep(4 * wait_bound_s(state) + 4 * START_LIMIT_S)
        state = self.scheduler.state
        if self.clients.open:
            self.violated(f"requests never ended: {list(self.clients.open.values())}")
        for what in ("waiting", "granted", "operations", "chores"):
            if getattr(state, what):
                self.violated(f"{what} that never end: {getattr(state, what)}")
        for name, engine in state.engines.items():
            if in_flight(engine.phase):
                self.violated(f"{name} is in {engine.phase} for ever")
        if not state.booted:
            self.violated("the bootstrap never ends")
        self._conserved()

    def _conserved(self) -> None:
        ended = sum(n for how, n in self.count.outcomes.items() if not how.startswith("("))
        if ended != self.count.requests or self.count.outcomes["nobody answered"]:
            self.violated(f"{self.count.requests} requests, {ended} outcomes")
        left = [p.owner for p in self.machines.living() if p.answers]
        if left:
            self.violated(f"{left} still hold answers")

    # ------------------------------------------------------------ lives of the daemon

    async def _daemon(self) -> None:
        while await self._life() != "over":
            self.count.restarts += 1
            await asyncio.sleep(self._rng(f"pause {self.count.restarts}").uniform(0.1, 5.0))

    async def _life(self) -> str:
        orders = Orders(
            Units(self.machines),
            Engines(self.machines),
            self.store,
            start_limit_s=lambda model: START_LIMIT_S,
            limits=Limits(probe_s=PROBE_S),
            meter=Meter(self.machines),
        )
        state = self._first_state()
        self.judge.new_life()
        scheduler = Watched(self.judge, state, orders, max_wait_s=state.policy.max_wait_s)
        orders.connect(scheduler.post, lambda: scheduler.state)
        self._end_of_life = self.loop.create_future()
        self.scheduler = scheduler
        notes = Notes()
        async with scheduler.running(), self._memory_watched(scheduler):
            heart = Heartbeat(notes, lambda: scheduler.state, summary)
            keeper = Keeper(self.store, state, clock=self.loop.time)
            with (
                scheduler.watched(lambda lines: keeper.tell(scheduler.state, lines)),
                scheduler.watched(self._lines),
                scheduler.watched(heart.tell),
            ):
                self._up.set()
                scheduler.post(
                    await observe(
                        Units(self.machines),
                        Engines(self.machines),
                        orders.identify,
                        Meter(self.machines),
                        Pins(self.store).has_pinned,
                    )
                )
                limit_s = self._boot_bound_s(scheduler.state)
                late = self.loop.call_later(limit_s, self._late, scheduler, notes)
                await asyncio.wait([self._end_of_life])
                late.cancel()
                how = self._end_of_life.result()
                if how == "planned":
                    await self._last_answers(scheduler)
            self._up.clear()
            self._check_readies(scheduler, notes)
        scheduler.die()
        self.clients.daemon_was_killed()
        return how

    @asynccontextmanager
    async def _memory_watched(self, scheduler: Watched) -> AsyncIterator[None]:
        looks = watch(Meter(self.machines), lambda: scheduler.state, scheduler.post)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(looks, name="memory")
            yield
            task.cancel()

    def _is_measured(self, model: Model) -> bool:
        """An engine like it was seen awake. One that never came up has taught nothing."""
        figures = self.store.learnt.get((model.id, f"{model.spec.fingerprint}/{VERSION}"), {})
        return any(kind is Kind.AWAKE for kind, _ in figures)

    def _check_readies(self, scheduler: Watched, notes: Notes) -> None:
        if notes.readies != scheduler.state.booted and not scheduler.state.stopping:
            self.violated(f"READY was said {notes.readies} times")

    async def _last_answers(self, scheduler: Watched) -> None:
        scheduler.post(ShutdownAsked())
        try:
            async with asyncio.timeout(STOP_S):
                await scheduler.idle()
        except TimeoutError:
            self.tell(f"{len(scheduler.state.granted)} answers did not end in time")

    def _first_state(self) -> State:
        state = initial(
            self._specs(), self.fleet.policy, dict(self.fleet.gpus), self.fleet.host_mib
        )
        took: dict[ModelId, dict[str, tuple[float, ...]]] = {}
        for (model, act), seconds in self.store.durations().items():
            took.setdefault(model, {})[act] = tuple(seconds)
        engines = {
            name: replace(
                engine,
                took=took.get(name, {}),
                learnt=Learnt(
                    self.store.figures(name, f"{engine.spec.fingerprint}/{VERSION}"), VERSION
                ),
            )
            for name, engine in state.engines.items()
        }
        return recall(self.store, replace(state, engines=engines))

    def _specs(self) -> tuple[EngineSpec, ...]:
        return tuple(model.spec for model in self.models.values())

    def _boot_bound_s(self, state: State) -> float:
        return wait_bound_s(state) + 2 * START_LIMIT_S * len(state.engines)

    def _late(self, scheduler: Watched, notes: Notes) -> None:
        if not scheduler.state.booted or not notes.readies:
            self.violated(f"not ready after {self._boot_bound_s(scheduler.state):.0f} s")

    def _lines(self, lines: tuple[Line, ...]) -> None:
        for line in lines:
            self.tell(line.text)

    async def _door(self) -> Watched:
        """systemd keeps the sockets over a restart: who comes meanwhile waits."""
        await self._up.wait()
        return self.scheduler

    # ------------------------------------------------------------ who disturbs

    async def _operators(self, every_s: float) -> None:
        rng = self._rng("operators")
        while True:
            await asyncio.sleep(rng.expovariate(1 / every_s))
            scheduler = await self._door()
            act = rng.choice((*Act, Act.SWITCH, Act.SWITCH, Act.START))
            model = rng.choice(self._known())
            operation = scheduler.operate(
                act,
                ModelId("") if act.of_gpus else model,
                by="ops",
                cut=rng.random() < 0.2,
                force=rng.random() < 0.2,
                level=rng.choice((None, None, None, *SleepLevel)),
                gpus=rng.choice(((), (rng.choice(sorted(self.fleet.gpus)),))),
            )
            if rng.random() < 0.2:
                await asyncio.sleep(rng.expovariate(1 / 5.0))
                scheduler.cancel(OperationId(operation.id))
            if operation.act is Act.FREE:
                await asyncio.sleep(rng.expovariate(1 / 300.0))
                (await self._door()).operate(Act.RECLAIM, ModelId(""), by="ops")

    async def _restarts(self, every_s: float) -> None:
        rng = self._rng("restarts")
        while True:
            await asyncio.sleep(rng.expovariate(1 / every_s))
            await self._door()
            how = rng.choice(("killed", "planned"))
            self.tell(f"the daemon is {'killed' if how == 'killed' else 'restarted'}")
            if not self._end_of_life.done():
                self._end_of_life.set_result(how)

    async def _reloads(self, every_s: float) -> None:
        rng = self._rng("reloads")
        while True:
            await asyncio.sleep(rng.expovariate(1 / every_s))
            scheduler = await self._door()
            self._change(rng)
            self.count.reloads += 1
            scheduler.post(
                ConfigChanged(
                    self._specs(), self.fleet.policy, dict(self.fleet.gpus), self.fleet.host_mib
                )
            )

    def _change(self, rng: Random) -> None:
        """Add one, change one or remove one."""
        kinds = {"change"}
        missing = [model for model in self.fleet.spare if model.id not in self.models]
        kinds |= {"add"} if missing else set()
        kinds |= {"remove"} if len(self.models) > 2 else set()
        match rng.choice(sorted(kinds)):
            case "add":
                self._set(rng.choice(missing))
            case "remove":
                del self.models[rng.choice(list(self.models))]
            case _:
                model = self.models[rng.choice(list(self.models))]
                self._set(fleets.changed(rng, model, self.fleet.gpus))

    def _set(self, model: Model) -> None:
        self.models[model.id] = model


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _OverError(Exception):
    """The run is over."""


class _BrokenError(Exception):
    """A promise is broken."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one run."""

    count: Count
    digest: str
    fleets: int


def simulate(seed: int, hours: float, only: int | None = None) -> Result:
    """Several boxes, one after another, `hours` together. Raises: BrokenPromise."""
    story, total = Story(), Count()
    number = max(3, round(hours / 10))
    for index in range(number) if only is None else (only,):
        run(_one(f"{seed}/{index}", hours / number, story, total))
    return Result(total, story.digest.hexdigest()[:16], number)


async def _one(seed: str, hours: float, story: Story, total: Count) -> None:
    rng = Random(seed)
    index = int(seed.rpartition("/")[2])
    fleet = fleets.draw_contended(rng) if index % 6 == 2 else fleets.draw(rng)
    town = Town(fleet, seed, hours, story)
    story.tell(0.0, f"box {seed}: {len(fleet.gpus)} cards, {len(fleet.models)} models")
    unraisable = sys.unraisablehook
    logging.disable(logging.ERROR)
    sys.unraisablehook = lambda args: town.violated(f"{args.err_msg}: {args.exc_value!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            await town.live()
    except BrokenPromise as error:
        error.add_note(f"in box {index}")
        raise
    finally:
        logging.disable(logging.NOTSET)
        sys.unraisablehook = unraisable
        total.add(town.count)
