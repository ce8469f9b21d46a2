"""The scheduler under observation: what must hold at every step, told by an independent judge."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

from homegptd.core import ledger
from homegptd.core.commands import Command, Cut, Finish, Grant, Refuse, Sleep, Start, Wake
from homegptd.core.draft import in_flight
from homegptd.core.drains import CUT_GRACE_S
from homegptd.core.events import (
    ConfigChanged,
    EngineDied,
    Event,
    Observed,
    OperationAsked,
    ProveEnded,
    RequestArrived,
    SleepEnded,
    StartEnded,
    WakeEnded,
)
from homegptd.core.invariants import held, violations
from homegptd.core.model import (
    Asleep,
    Awake,
    Draining,
    Engine,
    FallingAsleep,
    Gpu,
    ModelId,
    OnDeadline,
    OperationId,
    Proof,
    SleepLevel,
    SleepMode,
    Starting,
    State,
    Stopping,
    Ticket,
    TicketId,
)
from homegptd.core.refusals import Reason, Refusal
from homegptd.runtime.orders import Orders
from homegptd.runtime.scheduler import Scheduler

from .engines import DEADLINE_S, Machines, Process

EPSILON_S = 1e-6
_TOO_MANY = 5000
PROBE_S = 60.0
_HANG_S = 3 * (PROBE_S + DEADLINE_S)
"""In which a hang is noticed: two probes with their deadlines, and what an order puts between."""


@dataclass
class Count:
    """What happened, for the table at the end."""

    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    switches: int = 0
    freezes: int = 0
    cuts: int = 0
    deaths: int = 0
    restarts: int = 0
    reloads: int = 0
    operations: int = 0
    steps: int = 0
    worst_wait_s: float = 0.0

    def add(self, other: "Count") -> None:
        for name in self.__dataclass_fields__:
            mine, more = getattr(self, name), getattr(other, name)
            match mine:
                case Counter():
                    mine.update(more)
                case _ if name == "worst_wait_s":
                    self.worst_wait_s = max(mine, more)
                case _:
                    setattr(self, name, mine + more)


class Judge:
    """Looks at every step of every life of the daemon. `violated` ends the run."""

    def __init__(self, machines: Machines, count: Count, violated: Callable[[str], None]) -> None:
        self.machines = machines
        self.count = count
        self.violated = violated
        self.calm = False
        self.on_grant: Callable[[TicketId], None] = lambda ticket: None
        self._state = State()
        self._event: Event | None = None
        self._asked: dict[OperationId, int] = {}
        self._at, self._same_instant = -1.0, 0
        self.booted_s = self.moving_s = 0.0
        """How long the box was up, and how long of that an order was under way."""
        machines.about_to = self._about_to

    def new_life(self) -> None:
        self._asked = {}

    # ------------------------------------------------------------ a step

    def before(self, state: State, event: Event, now: float) -> None:
        self._state, self._event = state, event
        self.count.steps += 1
        if state.booted:
            moving = any(in_flight(engine.phase) for engine in state.engines.values())
            self.booted_s += now - self._at
            self.moving_s += (now - self._at) * moving
        self._same_instant = self._same_instant + 1 if now == self._at else 0
        self._at = now
        if self._same_instant > _TOO_MANY:
            self.violated(f"{_TOO_MANY} steps at {now} s: time stands still")
            raise AssertionError("time stands still")
        match event:
            case OperationAsked(operation):
                self._asked[operation.id] = 0
                self.count.operations += 1
            case EngineDied():
                self.count.deaths += 1
            case _:
                pass

    def after(self, state: State, now: float) -> None:
        # What was adopted, or is to fit a smaller box, may overdraw the books, not the box.
        given = isinstance(self._event, Observed | ConfigChanged)
        for text in violations(state, state if given else self._state):
            self.violated(f"after {self._event!r}: {text}")
        if state.since is not None:
            for text in (*self._true_memory(state), *self._drains(state), *self._lost(state, now)):
                self.violated(f"after {self._event!r}: {text}")
        if isinstance(self._event, Observed):
            self._adopted(state, self._event)

    def _true_memory(self, state: State) -> Iterator[str]:
        """What an engine really holds is never more than what the books say, once one like it has
        been measured."""
        for process in self.machines.living():
            engine = state.engines.get(process.model.id)
            books = ledger.charge(engine) if engine is not None else ledger.Books()
            holding = self.machines.box.holdings.get(process.owner)
            if holding is None or not self.machines.is_measured(process.model):
                continue
            for gpu, mib in holding.gpu_mib.items():
                if mib > books[Gpu(gpu)]:
                    yield f"{process.owner} holds {mib} MiB of gpu{gpu}, booked {books[Gpu(gpu)]}"
            host = holding.host_mib + holding.pinned_mib
            if host > books[ledger.HOST]:
                yield f"{process.owner} holds {host} MiB of RAM, booked {books[ledger.HOST]}"

    def _lost(self, state: State, now: float) -> Iterator[str]:
        """Who is dead is not called awake or asleep, and who hangs not for long."""
        for name, engine in state.engines.items():
            process = self.machines.processes.get(name)
            if process is None or process.lost_at is None:
                continue
            noticed_s = 0.0 if not process.alive else _HANG_S
            if isinstance(engine.phase, Awake | Asleep) and now > process.lost_at + noticed_s:
                yield f"{process.owner} is lost since {process.lost_at:.3f} s: {engine.phase}"

    def _drains(self, state: State) -> Iterator[str]:
        """A drain that nobody wants any more is undone."""
        wishes = state.waiting or state.operations or state.chores or state.freed
        if wishes or any(e.renew or e.retiring for e in state.engines.values()):
            return
        frozen = {n for n, e in state.engines.items() if not isinstance(e.phase, Awake | Draining)}
        for name, engine in state.engines.items():
            match engine.phase:
                case Draining(leases=leases) if leases and not any(
                    held(state.engines[other]) for other in frozen
                ):
                    yield f"{name} drains for nobody"
                case _:
                    pass

    def _adopted(self, state: State, event: Observed) -> None:
        """A restart of the daemon reloads nothing."""
        for name, found in event.found.items():
            engine = state.engines.get(name)
            if engine is None or found.traits is None:
                continue
            if isinstance(engine.phase, Starting):
                self.violated(f"{name} ran, and is started again")
            if isinstance(engine.phase, Stopping) and not self._has_to_go(state, engine):
                self.violated(f"{name} ran, and is stopped by the bootstrap: {engine.phase}")

    def _has_to_go(self, state: State, engine: Engine) -> bool:
        lent = not state.freed.keys().isdisjoint(engine.spec.gpus)
        stays = engine.traits is None or bool(engine.traits.levels)
        wishes = bool(state.waiting or state.operations)
        return engine.renew or engine.retiring or wishes or (lent and not stays)

    # ------------------------------------------------------------ its commands

    def command(self, command: Command, state: State, now: float) -> None:
        match command:
            case Grant(ticket):
                granted = state.granted.get(ticket)
                if granted is not None:
                    self._waited(granted, state, now)
                self.on_grant(ticket)
            case Refuse(ticket, refusal):
                self._refused(ticket, refusal, state, now)
            case Cut(ticket, refusal):
                self.count.cuts += 1
                if not self._may_cut(ticket, now):
                    self.violated(f"ticket {ticket} is cut without need: {refusal.message}")
            case Finish(ended):
                self._asked[ended.operation.id] = self._asked.get(ended.operation.id, 0) + 1
                if self._asked[ended.operation.id] != 1:
                    self.violated(f"operation {ended.operation.id} ends twice, or never began")
            case Sleep(model, _, _, mode):
                if mode is SleepMode.KEEP:
                    self.count.freezes += 1
                    self._may_freeze(model, held(state.engines[model]), now)
            case Wake():
                self.count.switches += state.booted
            case Start(model):
                if state.stopping:
                    self.violated(f"{model} is started while shutting down")
            case _:
                pass

    def _waited(self, ticket: Ticket, state: State, now: float) -> None:
        wait_s = now - ticket.since
        self.count.worst_wait_s = max(self.count.worst_wait_s, wait_s)
        if self.calm and wait_s > wait_bound_s(state):
            self.violated(f"ticket {ticket.id} for {ticket.model} waited {wait_s:.0f} s")

    def _refused(self, ticket_id: TicketId, refusal: Refusal, state: State, now: float) -> None:
        if not refusal.message:
            self.violated(f"ticket {ticket_id} is refused without a word")
        ticket = self._ticket(ticket_id)
        if ticket is None:
            return
        wait_s = now - ticket.since
        self.count.worst_wait_s = max(self.count.worst_wait_s, wait_s)
        if now > ticket.until + EPSILON_S:
            self.violated(f"ticket {ticket_id} is refused {now - ticket.until:.3f} s too late")
        early = refusal.reason is Reason.WAITED_TOO_LONG and now < ticket.until - EPSILON_S
        if early:
            self.violated(f"ticket {ticket_id} is refused as late, but is not")
        if self.calm and refusal.reason in (Reason.WAITED_TOO_LONG, Reason.MODEL_FAILED):
            self.violated(f"on a calm box ticket {ticket_id} is refused: {refusal.message}")
        if refusal.reason in (Reason.DOES_NOT_FIT, Reason.PINNED) and fits(state, ticket.model):
            self.violated(f"{ticket.model} would fit, but is refused: {refusal.message}")

    def _ticket(self, ticket: TicketId) -> Ticket | None:
        if isinstance(self._event, RequestArrived) and self._event.ticket.id == ticket:
            return self._event.ticket
        return next((t for t in self._state.waiting if t.id == ticket), None)

    def _may_cut(self, ticket: TicketId, now: float) -> bool:
        before, event, policy = self._state, self._event, self._state.policy
        if any(o.cut for o in before.operations):
            return True
        match event:
            case OperationAsked(operation) if operation.cut:
                return True
            case EngineDied() | StartEnded() | WakeEnded() | SleepEnded() | ProveEnded():
                failed = event.failure is not None
            case _:
                failed = False
        granted = before.granted.get(ticket)
        if granted is None:
            return False
        engine = before.engines[granted.model]
        match engine.phase:
            case Draining(since=since, until=until):
                wish = engine.spec.on_deadline or policy.on_deadline
                late = now >= until - EPSILON_S and wish is OnDeadline.CUT
                return late or now >= since + policy.max_answer_s - EPSILON_S
            case Asleep(frozen_until=end) if end is not None and now >= end - EPSILON_S:
                return True
            case _:
                return failed

    def _may_freeze(self, model: ModelId, leases: frozenset[TicketId], now: float) -> None:
        engine = self._state.engines[model]
        wish = engine.spec.on_deadline or self._state.policy.on_deadline
        proved = engine.traits is not None and engine.traits.proofs.get(Proof.FREEZE, False)
        if wish is OnDeadline.WAIT or not (proved or wish is OnDeadline.FREEZE):
            self.violated(f"{model} is frozen, which nobody proved or allowed")
        if not all(self._state.granted[ticket].freezable for ticket in leases):
            self.violated(f"{model} is frozen with answers that are no streams")
        match engine.phase:
            case Draining(until=until) if now < until - EPSILON_S:
                self.violated(f"{model} is frozen {until - now:.3f} s before its deadline")
            case _:
                pass

    # ------------------------------------------------------------ its orders, at the engine

    def _about_to(self, what: str, process: Process) -> None:
        """No answer is disturbed that was not frozen, cut, or lost with its engine."""
        engine = self._state.engines.get(process.model.id)
        phase = engine.phase if engine is not None else None
        undisturbed = [a for a in process.answers if not a.lease.cut.done()]
        if not undisturbed or what == "sleep keep":
            return
        now = self.machines.loop.time()
        match phase:
            case _ if what == "stop" and self._failed(process.model.id):
                return
            case _:
                self.violated(
                    f"{what} of {process.owner} at {now:.3f} s under {len(undisturbed)} answers"
                )

    def _failed(self, model: ModelId) -> bool:
        engine = self.now_state().engines.get(model)
        return engine is None or (
            isinstance(engine.phase, Stopping) and engine.phase.failure is not None
        )

    now_state: Callable[[], State]


def fits(state: State, model: ModelId) -> bool:
    """Whether `model` could be awake beside nothing but what is pinned or cannot be moved now."""
    limit = ledger.budget(state)
    wanted = state.engines[model]
    need = ledger.awake(wanted) | ledger.asleep(wanted, SleepLevel.ONE)
    for name, engine in state.engines.items():
        frozen = isinstance(engine.phase, Asleep | FallingAsleep) and engine.phase.frozen
        if name != model and (engine.spec.pinned or frozen):
            need.update(ledger.charge(engine))
    return ledger.within(need, limit)


class Watched(Scheduler):
    """The real scheduler; the judge sees what goes in and what comes out."""

    def __init__(self, judge: Judge, state: State, orders: Orders, *, max_wait_s: float) -> None:
        super().__init__(state, orders, max_wait_s=max_wait_s)
        self._judge = judge
        self._now_dead = False

    def die(self) -> None:
        """The process is gone: nothing it still does in here is real."""
        self._now_dead = True

    def _take(self, event: Event) -> None:
        if self._now_dead:
            return
        now = self.loop.time()
        self._judge.before(self.state, event, now)
        super()._take(event)
        self._judge.after(self.state, now)

    def _carry_out(self, command: Command) -> None:
        self._judge.command(command, self.state, self.loop.time())
        super()._carry_out(command)


def wait_bound_s(state: State) -> float:
    """The longest that anybody may wait on a box where nothing fails.

    Every other model may come first, once with its patience, its residency, its drain and its
    freeze, and all the moves of a switch; each unit of priority (3 at most) counts one patience.
    """
    policy, total = state.policy, 0.0
    for engine in state.engines.values():
        took = {act: median(all_of) for act, all_of in engine.took.items() if act != "drain"}
        timings = {**_SLOW, **took}
        cost = timings["wake-1"] + timings["sleep-1"]
        derived = cost * (1 - policy.switch_share) / policy.switch_share
        patience = derived if policy.patience_s is None else policy.patience_s
        residency = derived if policy.residency_s is None else policy.residency_s
        answers = policy.max_answer_s + CUT_GRACE_S + policy.freeze_max_s
        total += 4 * patience + residency + answers + sum(timings.values())
    return total


_SLOW = {
    "start": 90.0,
    "sleep-1": 30.0,
    "sleep-2": 1.0,
    "wake-1": 5.0,
    "wake-2": 40.0,
    "stop": 4.0,
}
