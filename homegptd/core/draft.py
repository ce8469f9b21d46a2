"""The next state while one step writes it: private to `step`, frozen before anybody sees it."""

from collections.abc import Callable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from . import durations
from .commands import (
    Command,
    Cut,
    Finish,
    Grant,
    Prove,
    Refuse,
    Rouse,
    Sleep,
    Start,
    Stop,
    Wake,
    Watch,
)
from .model import (
    Act,
    Asleep,
    Awake,
    Chore,
    Down,
    Draining,
    Ended,
    Engine,
    Failure,
    FallingAsleep,
    Gpu,
    ModelId,
    Operation,
    OrderId,
    Phase,
    Proof,
    Proving,
    Roused,
    Rousing,
    SleepLevel,
    SleepMode,
    Starting,
    State,
    Stopping,
    Ticket,
    TicketId,
    Waking,
    half_awake,
)
from .refusals import Reason, Refusal


class Outcome(Struct, frozen=True):
    """What one step came to. Call again at `wake_at`, or with the next event before."""

    state: State
    commands: tuple[Command, ...]
    wake_at: float | None


_WANTS = (Act.SWITCH, Act.WAKE)


class Draft:
    """Mutable books of one step; `outcome` closes them."""

    def __init__(self, state: State, now: float) -> None:
        self.before = state
        self.now = now
        self.policy = state.policy
        self.engines = dict(state.engines)
        self.waiting = list(state.waiting)
        self.granted = dict(state.granted)
        self.operations = list(state.operations)
        self.chores = list(state.chores)
        self.wanted = state.wanted
        self.wanted_at = state.wanted_at
        self.freed = state.freed
        self.booted = state.booted
        self.stopping, self.stop_by = state.stopping, state.stop_by
        self.since = state.since
        self.orders = state.orders
        self.gpus: Mapping[Gpu, int] = state.gpus
        self.host_mib = state.host_mib
        self.foreign = state.foreign
        self.pressure = state.pressure
        self.commands: list[Command] = []
        self.changed = False
        self._alarms: list[float] = []

    # ------------------------------------------------------------ reading

    def state(self) -> State:
        return State(
            engines=self.engines,
            policy=self.policy,
            gpus=self.gpus,
            host_mib=self.host_mib,
            foreign=self.foreign,
            pressure=self.pressure,
            waiting=tuple(self.waiting),
            granted=self.granted,
            operations=tuple(self.operations),
            chores=tuple(self.chores),
            wanted=self.wanted,
            wanted_at=self.wanted_at,
            freed=self.freed,
            booted=self.booted,
            stopping=self.stopping,
            stop_by=self.stop_by,
            since=self.since,
            orders=self.orders,
        )

    def outcome(self) -> Outcome:
        future = [at for at in self._alarms if at > self.now]
        return Outcome(self.state(), tuple(self.commands), min(future, default=None))

    def waits_for(self, model: ModelId) -> bool:
        return any(ticket.model == model for ticket in self.waiting)

    def quiet(self, gpus: tuple[Gpu, ...]) -> bool:
        """No order is in flight on any of these GPUs."""
        return not any(
            in_flight(engine.phase) and not set(engine.spec.gpus).isdisjoint(gpus)
            for engine in self.engines.values()
        )

    def is_wanted(self, model: ModelId) -> bool:
        """By a client or an operator, and not by the box itself."""
        asked = any(o.model == model and o.act in _WANTS for o in self.operations)
        return asked or self.waits_for(model)

    # ------------------------------------------------------------ writing

    def call_at(self, instant: float | None) -> None:
        """Ask to be called at `instant`; one that has passed is handled in this step."""
        if instant is not None:
            self._alarms.append(instant)

    def put(self, engine: Engine) -> None:
        self.engines[engine.spec.model] = engine
        self.changed = True

    def phase(self, model: ModelId, phase: Phase) -> None:
        self.put(replace(self.engines[model], phase=phase))

    def say(self, command: Command) -> None:
        self.commands.append(command)
        self.changed = True

    def _next_order(self) -> OrderId:
        self.orders += 1
        return OrderId(self.orders)

    # ------------------------------------------------------------ orders

    def start(self, model: ModelId, *, adopts: bool = False) -> None:
        engine, order = self.engines[model], self._next_order()
        incarnation = engine.incarnation + 1
        self.put(
            replace(
                engine,
                phase=Starting(order, self.now, adopts),
                traits=None,
                incarnation=incarnation,
                holds_pinned=False,
                pins_unsure=False,
            )
        )
        self.say(Start(model, order, incarnation))

    def rouse(self, model: ModelId, asleep: Asleep) -> None:
        order = self._next_order()
        self.phase(model, Rousing(order, self.now, asleep.level))
        self.say(Rouse(model, order, asleep.level))

    def wake(self, model: ModelId, rests: Asleep | Roused) -> None:
        order, roused = self._next_order(), isinstance(rests, Roused)
        frozen = rests.frozen if isinstance(rests, Asleep) else frozenset[TicketId]()
        self.phase(model, Waking(order, self.now, rests.level, frozen, roused))
        self.say(Wake(model, order, rests.level, frozen=bool(frozen), roused=roused))

    def sleep(
        self,
        model: ModelId,
        level: SleepLevel,
        *,
        mode: SleepMode,
        frozen: frozenset[TicketId] = frozenset(),
        wanted_by: ModelId | None = None,
    ) -> None:
        engine, order = self._drained(model), self._next_order()
        pins = level is SleepLevel.ONE
        first = pins and not engine.holds_pinned
        roused = isinstance(engine.phase, Roused)
        phase = FallingAsleep(order, self.now, level, frozen, wanted_by, first, roused)
        self.put(replace(_pins(engine) if pins else engine, phase=phase))
        self.say(Sleep(model, order, level, mode, first))

    def stop(
        self,
        model: ModelId,
        failure: Failure | None = None,
        *,
        retry_at: float | None = None,
        wanted_by: ModelId | None = None,
    ) -> None:
        before, order = self.engines[model].phase, self._next_order()
        self.put(self._drained(model))
        roused = half_awake(before)
        slept = before.level if isinstance(before, Asleep) or half_awake(before) else None
        stopping = Stopping(order, self.now, failure, retry_at, None, wanted_by, slept, roused)
        self.phase(model, stopping)
        self.say(Stop(model, order))

    def _drained(self, model: ModelId) -> Engine:
        """With the time its answers took to end, if it had any when that began."""
        engine = self.engines[model]
        match engine.phase:
            case Draining(since=since, awake=Awake(leases=leases)) if leases:
                return durations.timed(engine, "drain", self.now - since)
            case _:
                return engine

    def stop_again(self, model: ModelId, phase: Stopping) -> None:
        order = self._next_order()
        self.phase(model, replace(phase, order=order, since=self.now, again_at=None))
        self.say(Stop(model, order))

    def prove(self, model: ModelId, proof: Proof) -> None:
        order = self._next_order()
        engine = self.engines[model]
        engine = _pins(engine) if proof is Proof.FREEZE else engine
        self.put(replace(engine, phase=Proving(order, self.now, proof)))
        self.say(Prove(model, order, proof))

    def watch(self, model: ModelId) -> None:
        self.say(Watch(model, self.engines[model].incarnation))

    # ------------------------------------------------------------ tickets and operations

    def grant(self, ticket: Ticket, awake: Awake) -> None:
        engine = self.engines[ticket.model]
        phase = Awake(awake.since, awake.leases | {ticket.id}, None, awake.held_until)
        self.put(replace(engine, phase=phase, last_used=self.now))
        self.granted[ticket.id] = ticket
        self.say(Grant(ticket.id))

    def refuse(self, ticket: TicketId, refusal: Refusal) -> None:
        self.say(Refuse(ticket, refusal))

    def refuse_waiting(self, chosen: Callable[[Ticket], bool], refusal: Refusal) -> None:
        refused = [ticket for ticket in self.waiting if chosen(ticket)]
        if refused:
            self.waiting = [ticket for ticket in self.waiting if ticket not in refused]
        for ticket in refused:
            self.refuse(ticket.id, refusal)

    def cut(
        self, tickets: frozenset[TicketId], message: str, *, retry_after_s: float | None = None
    ) -> None:
        for ticket in sorted(tickets):
            self.say(Cut(ticket, Refusal(Reason.CUT, message, retry_after_s=retry_after_s)))

    def finish(self, operation: Operation, text: str, refusal: Refusal | None = None) -> None:
        """End it, if it has not ended. What it pushed aside only to load comes back."""
        for known in [o for o in self.operations if o.id == operation.id]:
            self.operations.remove(known)
            self.wanted_at = self.now
            self.say(Finish(Ended(known, refusal, text)))
            self._give_back(known)

    def _give_back(self, operation: Operation) -> None:
        """Not if what was loaded stays awake: it was asked for, and it cannot sleep or is used."""
        engine = self.engines.get(operation.model)
        if self.stopping or (engine is not None and isinstance(engine.phase, Awake)):
            return
        for name in operation.displaced:
            if name not in self.engines or self.engines[name].retiring:
                continue  # a changed configuration has done without it meanwhile
            self.chores.append(Chore(Act.WAKE, name, self.now, gentle=True))

    def drop_chores(self, model: ModelId) -> None:
        self.chores = [chore for chore in self.chores if chore.model != model]


def _pins(engine: Engine) -> Engine:
    return replace(engine, holds_pinned=True, pins_unsure=False)


def in_flight(phase: Phase) -> bool:
    """Whether an order is being carried out, so that the engine's GPUs are not quiet."""
    match phase:
        case Starting() | Rousing() | Waking() | FallingAsleep() | Proving():
            return True
        case Stopping(order=order):
            return order is not None
        case Down() | Asleep() | Roused() | Awake() | Draining():
            return False
