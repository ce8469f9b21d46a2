"""States in few words: `box(a=awake(1), b=asleep())`, sizes in GB on one 80 GB card."""

from typing import Any

from msgspec.structs import replace

from homegptd.core.commands import Command, Finish, Order, Prove, Rouse, Sleep, Start, Stop, Wake
from homegptd.core.draft import Outcome
from homegptd.core.events import (
    Event,
    OperationAsked,
    ProveEnded,
    RequestArrived,
    RouseEnded,
    SleepEnded,
    StartEnded,
    StopEnded,
    TimePassed,
    WakeEnded,
)
from homegptd.core.invariants import held, violations
from homegptd.core.machine import step
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    Down,
    Engine,
    EngineSpec,
    Failure,
    Gpu,
    ModelId,
    Operation,
    OperationId,
    Phase,
    Policy,
    Proof,
    SleepLevel,
    State,
    Ticket,
    TicketId,
    Traits,
)

GB = 1024
ONE, TWO = SleepLevel.ONE, SleepLevel.TWO
TRAITS = Traits("0.32.0", frozenset({ONE, TWO}), can_keep=True, proofs={Proof.FREEZE: True})


def spec(name: str, **given: Any) -> EngineSpec:
    """60 GB awake, 2 GB asleep, 20 GB of weights, on GPU 0."""
    sizes = {"awake_mib": 60 * GB, "residue_mib": 2 * GB, "pinned_mib": 20 * GB, "host_mib": 4 * GB}
    return EngineSpec(ModelId(name), **{"gpus": (Gpu(0),), **sizes, **given})


def engine(phase: Phase, traits: Traits = TRAITS, **given: Any) -> Engine:
    """An engine in this phase; unknown words go to its spec."""
    own = {k: given.pop(k) for k in list(given) if k in Engine.__struct_fields__}
    up = not isinstance(phase, Down)
    made = Engine(spec("?", **given), phase, traits if up else None, incarnation=int(up))
    return replace(made, **{"holds_pinned": up, **own})


def awake(leases: int = 0, *, since: float = 0.0, first: int = 1, **given: Any) -> Engine:
    """Awake, with leases numbered from `first`."""
    tickets = frozenset(TicketId(n) for n in range(first, first + leases))
    return engine(Awake(since, tickets, None if leases else since), **given)


def asleep(level: SleepLevel = ONE, **given: Any) -> Engine:
    return engine(Asleep(level, 0.0), **given)


def down(failure: str | None = None, *, retry_at: float | None = None, **given: Any) -> Engine:
    return engine(Down(0.0, Failure(failure) if failure else None, retry_at), **given)


def box(
    policy: Policy | None = None,
    *,
    gpus: tuple[int, ...] = (80,),
    ram: int = 256,
    **engines: Engine,
) -> State:
    """A booted state; every lease is a granted stream."""
    named = {
        ModelId(name): replace(e, spec=replace(e.spec, model=ModelId(name)))
        for name, e in engines.items()
    }
    granted = {t: ticket(t, name) for name, e in named.items() for t in held(e)}
    budget = {Gpu(n): gb * GB for n, gb in enumerate(gpus)}
    policy = policy or Policy(patience_s=10.0, residency_s=20.0)
    return State(named, policy, budget, ram * GB, granted=granted, booted=True, since=0.0)


def ticket(number: int, model: str, now: float = 0.0, **given: Any) -> Ticket:
    wishes = {"freezable": True, **given}
    return Ticket(TicketId(number), ModelId(model), now, now + 600.0, **wishes)


class Run:
    """One state after another; keeps the last outcome and the orders that are out."""

    def __init__(self, state: State, now: float = 100.0) -> None:
        self.state, self.now = state, now
        self.last: Outcome | None = None
        self.orders: dict[str, Order] = {}
        self.asked = self.ended = 0

    def __call__(self, event: Event, after: float = 0.0) -> tuple[Command, ...]:
        self.now += after
        self.last = step(self.state, event, self.now)
        assert violations(self.last.state, self.state) == []
        self.state = self.last.state
        for command in self.last.commands:
            if isinstance(command, Start | Rouse | Wake | Sleep | Stop | Prove):
                self.orders[command.model] = command
            self.ended += isinstance(command, Finish)
        return self.last.commands

    def phase(self, name: str) -> Phase:
        return self.state.engines[ModelId(name)].phase

    def engine(self, name: str) -> Engine:
        return self.state.engines[ModelId(name)]

    def request(self, number: int, model: str, after: float = 0.0, **wishes: Any) -> Any:
        self.now += after
        return self(RequestArrived(ticket(number, model, self.now, **wishes)))

    def ask(self, act: Act, model: str, **wishes: Any) -> Any:
        self.asked += 1
        number = OperationId(self.asked)
        return self(
            OperationAsked(Operation(number, act, ModelId(model), "root", self.now, **wishes))
        )

    def wait(self, seconds: float) -> Any:
        return self(TimePassed(), after=seconds)

    def done(self, model: str, after: float = 1.0, *, traits: Traits = TRAITS) -> Any:
        return self(result(self.orders.pop(model), traits=traits), after)

    def fails(self, model: str, why: str = "broken", after: float = 1.0) -> Any:
        return self(result(self.orders.pop(model), failure=Failure(why)), after)


def result(order: Order, *, failure: Failure | None = None, traits: Traits = TRAITS) -> Event:
    match order:
        case Start(model, number):
            return StartEnded(model, number, None if failure else traits, failure)
        case Rouse(model, number):
            return RouseEnded(model, number, failure)
        case Wake(model, number):
            return WakeEnded(model, number, failure)
        case Sleep(model, number):
            return SleepEnded(model, number, failure=failure)
        case Stop(model, number):
            return StopEnded(model, number, failure)
        case Prove(model, number, proof):
            return ProveEnded(model, number, proof, holds=failure is None, failure=failure)
