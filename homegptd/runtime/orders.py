"""A command becomes one owned task that reports exactly once, as an event, whatever happens."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import assert_never

from msgspec.structs import replace

from homegptd.core import durations
from homegptd.core.commands import Order, Probe, Prove, Rouse, Sleep, Start, Stop, Wake, Watch
from homegptd.core.events import (
    EngineDied,
    Event,
    ProveEnded,
    RouseEnded,
    SleepEnded,
    StartEnded,
    StopEnded,
    WakeEnded,
)
from homegptd.core.model import (
    Asleep,
    Awake,
    Draining,
    Exit,
    Failure,
    ModelId,
    Proof,
    Roused,
    Starting,
    State,
    Traits,
)
from homegptd.core.refusals import Fault

from .measuring import Blind, Measuring
from .ports import EnginePort, EnginesPort, MeterPort, StorePort, UnitsPort
from .race import first

log = logging.getLogger(__name__)

POLL_FIRST_S, POLL_MOST_S = 0.05, 0.5
"""Pauses between two questions "healthy yet?" while an engine starts: vLLM has no other sign."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of the runtime, in seconds."""

    probe_s: float = 10.0
    """Between two liveness probes of an engine that is awake or asleep."""
    glance_s: float = 2.0
    """Between two looks at an engine that carries out an order: only at whether it listens."""
    glances: int = 4
    """Looks in a row that must fail: a busy API process may miss one or two."""
    least_s: float = 30.0
    """No sleep or wake is given up sooner, however quick it usually is."""
    strikes: int = 2
    """Probes in a row that must fail before an engine counts as hung."""


class Orders:
    """Carries out orders through the ports. At most one per engine; a stop replaces what runs."""

    def __init__(
        self,
        units: UnitsPort,
        engines: EnginesPort,
        store: StorePort,
        *,
        start_limit_s: Callable[[ModelId], float],
        limits: Limits = Limits(),
        meter: MeterPort | None = None,
    ) -> None:
        self._units = units
        self._engines = engines
        self._store = store
        self._start_limit_s = start_limit_s
        self._limits = limits
        self._running: dict[ModelId, asyncio.Task[None]] = {}
        self._watching: dict[ModelId, asyncio.Task[None]] = {}
        self._asking: dict[ModelId, asyncio.Task[None]] = {}
        self._post: Callable[[Event], None] = _nobody
        self._state: Callable[[], State] = State
        self._memory = Measuring(meter or Blind(), self._newest)

    def connect(self, post: Callable[[Event], None], state: Callable[[], State]) -> None:
        """Where events go and where the newest state is: the scheduler is made after us."""
        self._post, self._state = post, state

    def _newest(self) -> State:
        return self._state()

    def carry_out(self, command: Order | Watch | Probe, group: asyncio.TaskGroup) -> None:
        name = f"{type(command).__name__.lower()} {command.model}"
        if isinstance(command, Probe):
            asking = self._asking.get(command.model)
            if asking is None or asking.done():  # one question is enough for many who wait
                task = group.create_task(self._ask(command), name=name)
                self._asking[command.model] = task
            return
        if isinstance(command, Watch):
            _cancel(self._watching.get(command.model))
            self._watching[command.model] = group.create_task(self._watch(command), name=name)
            return
        before = self._running.pop(command.model, None)
        if isinstance(command, Stop):
            _cancel(self._watching.pop(command.model, None))
            _cancel(self._asking.pop(command.model, None))
        _cancel(before)
        self._running[command.model] = group.create_task(self._report(command, before), name=name)

    # ------------------------------------------------------------ one order

    async def _report(self, command: Order, before: asyncio.Task[None] | None) -> None:
        try:
            event = await self._body(command, before)
        except Fault as fault:
            event = _failed(command, _failure(fault))
        except Exception as error:
            log.exception("%s failed in an unexpected way", type(command).__name__)
            event = _failed(command, Failure(f"{type(error).__name__}: {error}"))
        self._post(event)
        self._remember_figures(command.model)

    def _body(
        self, command: Order, before: asyncio.Task[None] | None
    ) -> Coroutine[None, None, Event]:
        match command:
            case Start():
                return self._timed("start", command.model, self._start(command))
            case Rouse():
                return self._timed(f"rouse-{command.level}", command.model, self._rouse(command))
            case Wake():
                act = "wake-roused" if command.roused else f"wake-{command.level}"
                return self._timed(act, command.model, self._wake(command))
            case Sleep():
                act = "first-sleep" if command.first else f"sleep-{command.level}"
                return self._timed(act, command.model, self._sleep(command))
            case Stop():
                return self._timed("stop", command.model, self._stop(command, before))
            case Prove():
                return self._prove(command)
            case _:
                assert_never(command)

    async def _timed(self, act: str, model: ModelId, body: Awaitable[Event]) -> Event:
        loop = asyncio.get_running_loop()
        began, adopts = loop.time(), self._adopts(model)
        limit = self._limit_s(act, model)
        try:
            async with asyncio.timeout(limit):
                event = await body
        except TimeoutError:
            raise Fault(
                f'"{model}" did not end its {act} in {limit:.0f} s, ten times what it takes here',
                hint=f"homegptctl logs {model}",
            ) from None
        if not adopts and not getattr(event, "crowded", None):
            self._store.remember_duration(model, act, loop.time() - began)
        return event

    def _adopts(self, model: ModelId) -> bool:
        """Whether this start only waits for an engine found running: its time says nothing."""
        engine = self._state().engines.get(model)
        return engine is not None and isinstance(engine.phase, Starting) and engine.phase.adopts

    def _limit_s(self, act: str, model: ModelId) -> float | None:
        """Sleeps and wakes that this box has timed get ten times as long; others what the adapter
        allows, which has to suit the slowest box."""
        engine = self._state().engines.get(model)
        usual = durations.known(engine, act) if engine else None
        if usual is None or act in ("start", "stop"):
            return None
        return max(self._limits.least_s, 10 * usual)

    async def _start(self, order: Start) -> Event:
        model = order.model
        adopts = self._adopts(model)
        if crowded := await self._memory.crowded(model):
            return StartEnded(model, order.order, crowded=crowded)
        before = None if adopts else await self._memory.held(model)
        await self._units.start(model)
        limit = self._start_limit_s(model)
        engine = self._engines[model]
        try:
            async with asyncio.timeout(limit):
                exited = await first(self._units.gone(model), _until_ready(engine))
        except TimeoutError:
            raise Fault(
                f'cannot start "{model}": not healthy after {limit:.0f} s',
                hint=f"homegptctl logs {model}",
            ) from None
        if isinstance(exited, Exit):
            raise _died_starting(model, exited)
        traits = await self.identify(model)
        after = await self._memory.held(model)
        return StartEnded(model, order.order, traits, before=before, after=after)

    async def identify(self, model: ModelId) -> Traits:
        """What the running engine says of itself, and what this box has proved of it before."""
        engine = self._engines[model]
        traits = replace(await engine.identify(), image=self._units.image(model))
        key = self._key(model, traits)
        if engine.canary_reference is not None:
            self._store.remember_canary(model, key, engine.canary_reference)
        elif traits.asleep:  # adopted: it cannot be asked, but an earlier daemon has asked it
            engine.canary_reference = self._store.canary(model, key)
        known = self._store.proofs(model, key)
        figures = self._store.figures(model, key)
        return replace(traits, proofs={**traits.proofs, **known}, figures=figures)

    def _key(self, model: ModelId, traits: Traits) -> str:
        """Proofs hold for this configuration and this image's vLLM, and for no other."""
        if (engine := self._state().engines.get(model)) is None:
            raise Fault(f'"{model}" has left the configuration meanwhile')
        return f"{engine.spec.fingerprint}/{traits.build}"

    async def _rouse(self, order: Rouse) -> Event:
        model = order.model
        if crowded := await self._memory.crowded(model, patient=False):
            return RouseEnded(model, order.order, crowded=crowded)
        before = await self._memory.held(model)
        await self._engines[model].rouse(order.level)
        after = await self._memory.held(model)
        return RouseEnded(model, order.order, before=before, after=after)

    async def _wake(self, order: Wake) -> Event:
        model = order.model
        if crowded := await self._memory.crowded(model):
            return WakeEnded(model, order.order, crowded=crowded)
        before = await self._memory.held(model)
        await self._engines[model].wake(order.level, frozen=order.frozen, roused=order.roused)
        after = await self._memory.held(model)
        return WakeEnded(model, order.order, before=before, after=after)

    async def _sleep(self, order: Sleep) -> Event:
        before = await self._memory.held(order.model)
        await self._engines[order.model].sleep(order.level, order.mode)
        after = await self._memory.settled(order.model, before)
        return SleepEnded(order.model, order.order, before=before, after=after)

    async def _stop(self, order: Stop, before: asyncio.Task[None] | None) -> Event:
        if before is not None:
            await asyncio.wait([before])
        await self._units.stop(order.model)
        return StopEnded(order.model, order.order)

    async def _prove(self, order: Prove) -> Event:
        """That a proof does not hold is a verdict; an engine that broke over it is a failure."""
        engine, model = self._engines[order.model], order.model
        failure = None
        try:
            detail, holds = await engine.prove(order.proof), True
        except Fault as fault:
            detail, holds = fault.message, False
            failure = _failure(fault) if fault.unsettled else await self._still_sane(engine)
        self._remember_proof(model, order.proof, detail, holds=holds)
        after = await self._memory.held(model)
        return ProveEnded(model, order.order, order.proof, holds, detail, failure, after)

    async def _still_sane(self, engine: EnginePort) -> Failure | None:
        try:
            await engine.check()
            asleep = await engine.is_sleeping()
        except Fault as fault:
            return _failure(fault)
        return Failure("a proof left it asleep") if asleep else None

    def _remember_proof(self, model: ModelId, proof: Proof, detail: str, *, holds: bool) -> None:
        engine = self._state().engines.get(model)
        if engine is not None and engine.traits is not None:
            key = self._key(model, engine.traits)
            self._store.remember_proof(model, key, proof, holds=holds, detail=detail)

    def _remember_figures(self, model: ModelId) -> None:
        """What the machine has learnt from the event that was just posted."""
        engine = self._state().engines.get(model)
        if engine is not None and engine.learnt.build:
            key = f"{engine.spec.fingerprint}/{engine.learnt.build}"
            self._store.remember_figures(model, key, engine.learnt.figures)

    # ------------------------------------------------------------ watching

    async def _watch(self, watch: Watch) -> None:
        """Until this incarnation ends or hangs; then say so, once."""
        model = watch.model
        ended: Exit | Failure
        try:
            ended = await first(self._units.gone(model), self._until_hung(model))
        except Fault as fault:
            ended = _failure(fault)
        except Exception as error:
            log.exception("watching %s failed in an unexpected way", model)
            ended = Failure(f"nobody can watch it: {type(error).__name__}: {error}")
        if isinstance(ended, Exit):
            failure = Failure(f"its engine is gone: {ended.detail}", f"homegptctl logs {model}")
            self._post(EngineDied(model, watch.incarnation, failure, ended))
        else:
            self._post(EngineDied(model, watch.incarnation, ended))

    async def _ask(self, probe: Probe) -> None:
        """A probe that generates: a deadlock among its workers leaves all others answering."""
        model = probe.model
        try:
            await self._engines[model].speak()
        except Fault as fault:
            failure = _failure(fault)
        except Exception as error:
            log.exception("asking %s failed in an unexpected way", model)
            failure = Failure(f"nobody can ask it: {type(error).__name__}: {error}")
        else:
            return
        engine = self._state().engines.get(model)
        if engine is not None and isinstance(engine.phase, Awake | Draining):
            self._post(EngineDied(model, probe.incarnation, failure))

    async def _until_hung(self, model: ModelId) -> Failure:
        """A settled engine is asked across its core. One that carries out an order is only looked
        at: a vLLM whose core died during a control call closes its listener and answers that call
        never (0.32)."""
        limits, strikes = self._limits, 0
        while True:
            settled = self._settled(model)
            await asyncio.sleep(limits.probe_s if settled else limits.glance_s)
            failure = await (self._probe(model) if self._settled(model) else self._glance(model))
            if failure is None:
                strikes = 0
                continue
            strikes += 1
            log.debug("probe of %s: %s", model, failure.message)
            if strikes >= (limits.strikes if settled else limits.glances):
                return failure

    async def _probe(self, model: ModelId) -> Failure | None:
        try:
            await self._engines[model].check()
        except Fault as fault:
            return _failure(fault) if self._settled(model) else None
        return None

    async def _glance(self, model: ModelId) -> Failure | None:
        if await self._engines[model].ready() or self._settled(model):
            return None
        return Failure("it does not listen any more", f"homegptctl logs {model}")

    def _settled(self, model: ModelId) -> bool:
        engine = self._state().engines.get(model)
        return engine is not None and isinstance(engine.phase, Awake | Asleep | Roused | Draining)


def _died_starting(model: ModelId, exited: Exit) -> Fault:
    text = f'cannot start "{model}": it ended before it was healthy: {exited.detail}'
    # argparse says 2: the same flags will be refused again (vLLM 0.32: unknown flag)
    return Fault(text, hint=f"homegptctl logs {model}", lasting=exited.code == 2)


async def _until_ready(engine: EnginePort) -> None:
    pause = POLL_FIRST_S
    while not await engine.ready():
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, POLL_MOST_S)


def _failed(command: Order, failure: Failure) -> Event:
    match command:
        case Start():
            return StartEnded(command.model, command.order, failure=failure)
        case Rouse():
            return RouseEnded(command.model, command.order, failure)
        case Wake():
            return WakeEnded(command.model, command.order, failure)
        case Sleep():
            return SleepEnded(command.model, command.order, failure=failure)
        case Stop():
            return StopEnded(command.model, command.order, failure)
        case Prove():
            return ProveEnded(
                command.model, command.order, command.proof, holds=False, failure=failure
            )
        case _:
            assert_never(command)


def _failure(fault: Fault) -> Failure:
    return Failure(fault.message, fault.hint, fault.lasting)


def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()


def _nobody(event: Event) -> None:
    raise RuntimeError(f"nobody takes {event!r}: call connect first")
