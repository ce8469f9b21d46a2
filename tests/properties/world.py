"""A box that knows nothing of the ledger: what engines really hold, and who may do what.

It carries out commands like the runtime would, in an order that the test chooses, and asserts after
each step what must hold whatever happens.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field

from msgspec.structs import replace

from homegptd.core import invariants
from homegptd.core.commands import (
    Command,
    Cut,
    Finish,
    Grant,
    Probe,
    Prove,
    Refuse,
    Rouse,
    Sleep,
    Start,
    Stop,
    Wake,
    Watch,
)
from homegptd.core.draft import Outcome
from homegptd.core.events import (
    ConfigChanged,
    Event,
    Found,
    Observed,
    OperationAsked,
    ProveEnded,
    RequestArrived,
    RouseEnded,
    SleepEnded,
    StartEnded,
    StopEnded,
    TicketClosed,
    TimePassed,
    WakeEnded,
)
from homegptd.core.machine import step
from homegptd.core.memory import HOST, Card, Gpu, Held, Seen
from homegptd.core.model import (
    Asleep,
    Awake,
    Down,
    Draining,
    EngineSpec,
    Failure,
    ModelId,
    Operation,
    OperationId,
    OrderId,
    Proof,
    Roused,
    SleepLevel,
    SleepMode,
    State,
    Stopping,
    Ticket,
    TicketId,
    Traits,
)
from homegptd.core.story import summary, tell

Given = Start | Rouse | Wake | Sleep | Stop | Prove


@dataclass
class Process:
    """What one running engine really holds, in MiB, on each of its GPUs and in host RAM."""

    spec: EngineSpec
    """With its true sizes."""
    gpu: int
    pinned: int = 0
    leaked: int = 0


@dataclass
class Physics:
    """Memory is taken when an act begins and given back when it has ended."""

    gpus: dict[int, int]
    host: int
    running: dict[ModelId, Process] = field(default_factory=dict)
    mute: set[ModelId] = field(default_factory=set)
    """Found running, but they do not answer yet: starting one of these adopts it."""
    true: Callable[[EngineSpec], EngineSpec] = lambda spec: spec
    """How large an engine of this configuration really is."""
    leak: Callable[[ModelId], int] = lambda model: 0
    """What each of its sleeps leaves more on each GPU."""
    strangers: dict[int, int] = field(default_factory=dict)

    def begin(self, order: Given, spec: EngineSpec) -> None:
        match order:
            case Start(model):
                if model in self.mute:
                    self.mute.discard(model)
                else:
                    assert model not in self.running, f"{model} is started twice"
                    true = self.true(spec)
                    self.running[model] = Process(true, true.awake_mib)
            case Rouse(model):
                process = self.running[model]
                share = -(-process.spec.pinned_mib // len(process.spec.gpus))
                most = process.spec.awake_mib
                process.gpu = min(process.spec.residue_mib + share, most) + process.leaked
            case Wake(model):
                process = self.running[model]
                process.gpu = process.spec.awake_mib + process.leaked
            case Sleep(model, level=SleepLevel.ONE) | Prove(model, proof=Proof.FREEZE):
                process = self.running[model]
                process.pinned = process.spec.pinned_mib
            case Sleep() | Prove() | Stop():
                pass
        self.check()

    def end(self, order: Given, *, well: bool) -> None:
        match order:
            case Sleep(model) if well:
                process = self.running[model]
                process.leaked += self.leak(model)
                process.gpu = process.spec.residue_mib + process.leaked
            case Stop(model) if well:
                self.running.pop(model, None)
                self.mute.discard(model)
            case _:
                pass

    def check(self) -> None:
        for gpu, total in self.gpus.items():
            used = total - self.free(gpu)
            assert used <= total, f"out of memory on gpu{gpu}: {used} of {total}"
        used = self.host - self.free(HOST)
        assert used <= self.host, f"out of host RAM: {used} of {self.host}"

    def free(self, place: int) -> int:
        if place == HOST:
            return self.host - sum(p.spec.host_mib + p.pinned for p in self.running.values())
        engines = sum(p.gpu for p in self.running.values() if place in p.spec.gpus)
        return self.gpus[place] - engines - self.strangers.get(place, 0)

    def fits(self, order: Given, spec: EngineSpec) -> bool:
        """Whether it would go well; nothing is changed."""
        trial = deepcopy(self)
        try:
            trial.begin(order, spec)
        except AssertionError:
            return False
        return True

    def held(self, model: ModelId, at: float) -> Held | None:
        free = {Gpu(gpu): self.free(gpu) for gpu in (*self.gpus, HOST)}
        process = self.running.get(model)
        if process is None:
            return Held(at, free_mib=free)
        host = process.spec.host_mib + process.pinned
        return Held(at, dict.fromkeys(process.spec.gpus, process.gpu), host, free)

    def seen(self) -> Seen:
        cards = {Gpu(g): Card("", total, total - self.free(g)) for g, total in self.gpus.items()}
        return Seen(cards, {}, self.free(HOST))


class Box:
    """Feeds events to the machine, keeps its own books of orders and tickets, and judges."""

    def __init__(self, state: State, *, traits: dict[ModelId, Traits], now: float = 0.0) -> None:
        self.state = state
        self.now = now
        self.traits = traits
        self.wake_at: float | None = None
        self.physics = Physics({int(g): mib for g, mib in state.gpus.items()}, state.host_mib)
        self.orders: dict[OrderId, Given] = {}
        self.begun: dict[OrderId, float] = {}
        self.stale: list[Given] = []
        self.waiting: dict[TicketId, Ticket] = {}
        self.granted: dict[TicketId, Ticket] = {}
        self.cut: set[TicketId] = set()
        self.answered: set[TicketId] = set()
        self.operations: dict[OperationId, Operation] = {}
        self.waits: list[tuple[ModelId, float]] = []
        self.numbers = 0
        self.sound = True
        """False once a judgement failed: then there is nothing more to learn from this box."""

    # ------------------------------------------------------------ events

    def feed(self, event: Event) -> Outcome:
        before, self.sound = self.state, False
        self._note(event)
        outcome = step(before, event, self.now)
        self.state, self.wake_at = outcome.state, outcome.wake_at
        for command in outcome.commands:
            self._carry_out(command, before)
        self._judge(before, event, outcome)
        self.sound = True
        return outcome

    def _note(self, event: Event) -> None:
        match event:
            case RequestArrived(ticket):
                self.waiting[ticket.id] = ticket
            case TicketClosed(ticket_id):
                self.waiting.pop(ticket_id, None)
                self.granted.pop(ticket_id, None)
            case OperationAsked(operation):
                self.operations[operation.id] = operation
            case _:
                pass

    def found(self, model: ModelId, traits: Traits) -> Found:
        return Found(traits)

    def arrive(self, model: ModelId, **wishes: object) -> TicketId:
        self.numbers += 1
        ticket = Ticket(TicketId(self.numbers), model, self.now, self.now + 10_000.0)
        self.feed(RequestArrived(replace(ticket, **wishes)))
        return ticket.id

    def close(self, ticket: TicketId, *, served: bool = True) -> None:
        self.feed(TicketClosed(ticket, served))

    def end(self, order: OrderId, failure: Failure | None = None) -> None:
        given = self.orders.pop(order)
        self.physics.end(given, well=failure is None)
        self.feed(self.result(given, failure))

    def result(self, given: Given, failure: Failure | None = None) -> Event:
        match given:
            case Start(model, order):
                traits = None if failure else self.traits[model]
                return StartEnded(model, order, traits, failure)
            case Rouse(model, order):
                return RouseEnded(model, order, failure)
            case Wake(model, order):
                return WakeEnded(model, order, failure)
            case Sleep(model, order):
                return SleepEnded(model, order, failure=failure)
            case Stop(model, order):
                return StopEnded(model, order, failure)
            case Prove(model, order, proof):
                return ProveEnded(model, order, proof, holds=failure is None, failure=failure)

    # ------------------------------------------------------------ commands

    def _carry_out(self, command: Command, before: State) -> None:
        match command:
            case Start() | Rouse() | Wake() | Sleep() | Stop() | Prove():
                self._begin(command, before)
            case Grant(ticket_id):
                ticket = self.waiting.pop(ticket_id)  # KeyError: granted twice, or closed before
                phase = self.state.engines[ticket.model].phase
                assert isinstance(phase, Awake | Draining), f"granted while {phase}"
                self.granted[ticket_id] = ticket
                self._answer(ticket_id)
                self.waits.append((ticket.model, self.now - ticket.since))
            case Refuse(ticket_id):
                self.waiting.pop(ticket_id)
                self._answer(ticket_id)
            case Cut(ticket_id):
                self.cut.add(ticket_id)
            case Finish(ended):
                del self.operations[ended.operation.id]  # KeyError: ended twice
            case Watch() | Probe():
                pass

    def _answer(self, ticket: TicketId) -> None:
        assert ticket not in self.answered, f"ticket {ticket} is answered twice"
        self.answered.add(ticket)

    def _begin(self, command: Given, before: State) -> None:
        others = [o for o in self.orders.values() if o.model == command.model]
        if isinstance(command, Stop):
            for other in others:
                self.stale.append(self.orders.pop(other.order))
        else:
            assert not others, f"{command} while {others}"
            self._gpus_are_free(command)
        assert command.order not in self.orders
        if isinstance(command, Start | Rouse | Wake | Prove):
            self._gpu_is_not_freed(command)
        if isinstance(command, Sleep | Stop):
            self._no_answer_is_hurt(command, before)
        self.orders[command.order] = command
        self.begun[command.order] = self.now
        self._take(command)

    def _take(self, command: Given) -> None:
        self.physics.begin(command, self.state.engines[command.model].spec)

    def _gpus_are_free(self, command: Given) -> None:
        gpus = set(self.state.engines[command.model].spec.gpus)
        for other in self.orders.values():
            engine = self.state.engines.get(other.model)
            if engine is not None and not isinstance(other, Stop):
                assert gpus.isdisjoint(engine.spec.gpus), f"{command} while {other}"

    def _gpu_is_not_freed(self, command: Start | Rouse | Wake | Prove) -> None:
        """Only what runs already is adopted there, and what is frozen wakes to end."""
        spec = self.state.engines[command.model].spec
        adopts = isinstance(command, Start) and command.model in self.physics.mute
        thaws = isinstance(command, Wake) and command.frozen
        freed = not self.state.freed.keys().isdisjoint(spec.gpus)
        assert not freed or adopts or thaws, f"{command} on a freed GPU"

    def _no_answer_is_hurt(self, command: Sleep | Stop, before: State) -> None:
        """Open answers of this engine were frozen when due, or cut honestly, or it had failed."""
        phase = self.state.engines[command.model].phase
        if isinstance(phase, Stopping) and phase.failure is not None:
            return
        open_ = [t for t in self.granted.values() if t.model == command.model]
        whole = [t for t in open_ if t.id not in self.cut and self._lives_there(t, before)]
        if not whole:
            return
        assert isinstance(command, Sleep), f"{command} ends answers that nobody cut"
        assert command.mode is SleepMode.KEEP, f"{command} hurts {whole}"
        assert command.level is SleepLevel.ONE
        assert all(t.freezable for t in whole), "froze what is no stream"
        drained = before.engines[command.model].phase
        assert isinstance(drained, Draining), "froze without a drain"
        assert drained.until <= self.now, "froze before the drain deadline"

    def _lives_there(self, ticket: Ticket, before: State) -> bool:
        """Answers that died with an earlier incarnation only wait to be closed."""
        engine = before.engines.get(ticket.model)
        return engine is not None and ticket.id in invariants.held(engine)

    # ------------------------------------------------------------ judgement

    def _judge(self, before: State, event: Event, outcome: Outcome) -> None:
        after = outcome.state
        # The books count what an adopted engine may have pinned; the physics knows what it has.
        reference = after if isinstance(event, ConfigChanged | Observed) else before
        assert not invariants.violations(after, reference)
        assert {t.id for t in after.waiting} == set(self.waiting), "the queues differ"
        assert set(after.granted) == set(self.granted), "the leases differ"
        assert {o.id for o in after.operations} == set(self.operations)
        assert outcome.wake_at is None or outcome.wake_at > self.now
        self.physics.check()
        self._nothing_is_overdue()
        self._nobody_waits_for_nothing()
        summary(after).encode("ascii")
        for line in tell(before, event, outcome, self.now):
            assert "None" not in line.text, line.text

    def _nothing_is_overdue(self) -> None:
        for engine in self.engines():
            if isinstance(engine.phase, Asleep) and engine.phase.frozen:
                until = engine.phase.frozen_until
                assert until is not None, "frozen for ever"
                assert until > self.now, "frozen for too long"
                assert self.wake_at is not None
                assert self.wake_at <= until, "nobody will look when the freeze is over"

    def _nobody_waits_for_nothing(self) -> None:
        if not self.state.waiting or self.orders:
            return
        if any(isinstance(e.phase, Draining) and e.phase.leases for e in self.engines()):
            return
        patience_ends = min(t.until for t in self.state.waiting)
        assert self.wake_at is not None, "somebody waits, and nothing will happen"
        assert self.wake_at < patience_ends, "somebody waits for his own time-out only"

    def engines(self) -> Iterable:
        return self.state.engines.values()

    # ------------------------------------------------------------ the end

    def come_to_rest(self, max_steps: int, max_s: float) -> None:
        """Nobody comes any more and nothing fails: everybody is answered, everything ends."""
        began = self.now
        for _ in range(max_steps):
            if self.granted:
                self.close(next(iter(self.granted)))
            elif self.orders:
                self.now += 1.0
                self.end(next(iter(self.orders)))
            elif self.waiting or self.operations or self._unsettled():
                assert self.wake_at is not None, f"stuck: {summary(self.state)}"
                self.now = self.wake_at
                self.feed(TimePassed())
            else:
                return
            assert self.now - began <= max_s, f"not at rest after {max_s} s: {self.state}"
        raise AssertionError(f"not at rest after {max_steps} steps: {self.state}")

    def _unsettled(self) -> bool:
        phases = [e.phase for e in self.engines()]
        transient = any(not isinstance(p, Down | Awake) and _moves(p) for p in phases)
        return transient or bool(self.state.chores)


def _moves(phase: object) -> bool:
    return isinstance(phase, Draining | Stopping | Roused)
