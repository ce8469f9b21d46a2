"""What happened. Past tense; each is legal in every state."""

from collections.abc import Mapping

from msgspec import Struct, field

from .memory import Held, Seen
from .model import (
    EngineSpec,
    Exit,
    Failure,
    Gpu,
    ModelId,
    Operation,
    OperationId,
    OrderId,
    Policy,
    Proof,
    Ticket,
    TicketId,
    Traits,
)


class RequestArrived(Struct, frozen=True):
    ticket: Ticket


class TicketClosed(Struct, frozen=True):
    """The one end of a ticket, wherever it was: waiting, granted or unknown."""

    ticket: TicketId
    served: bool = False
    """Its engine gave a whole answer."""


class OperationAsked(Struct, frozen=True):
    operation: Operation


class CancelAsked(Struct, frozen=True):
    operation: OperationId


class StartEnded(Struct, frozen=True):
    model: ModelId
    order: OrderId
    traits: Traits | None = None
    failure: Failure | None = None
    before: Held | None = None
    after: Held | None = None
    """What it held when it was up, as far as anything measures."""
    crowded: Seen | None = None
    """Nothing was begun: this is what was seen of the memory, and it did not suffice."""


class WakeEnded(Struct, frozen=True):
    """`before`, `after` and `crowded` as for a start."""

    model: ModelId
    order: OrderId
    failure: Failure | None = None
    before: Held | None = None
    after: Held | None = None
    crowded: Seen | None = None


class RouseEnded(Struct, frozen=True):
    """`before` and `after` as for a start. `crowded`: the same in one look, so that it says nothing
    of what there will be."""

    model: ModelId
    order: OrderId
    failure: Failure | None = None
    before: Held | None = None
    after: Held | None = None
    crowded: Seen | None = None


class SleepEnded(Struct, frozen=True):
    model: ModelId
    order: OrderId
    failure: Failure | None = None
    before: Held | None = None
    after: Held | None = None


class StopEnded(Struct, frozen=True):
    model: ModelId
    order: OrderId
    failure: Failure | None = None


class ProveEnded(Struct, frozen=True):
    """`holds` is the verdict; `failure` means there is none and the engine is suspect."""

    model: ModelId
    order: OrderId
    proof: Proof
    holds: bool
    detail: str = ""
    failure: Failure | None = None
    after: Held | None = None
    """What it holds when it is awake again."""


class EngineDied(Struct, frozen=True):
    """Nobody ordered it: the process is gone, or it hangs and does not answer any more."""

    model: ModelId
    incarnation: int
    failure: Failure
    exit: Exit | None = None


class EngineSilent(Struct, frozen=True):
    """An answer was waited for in vain, and nobody else heard anything of the engine meanwhile."""

    model: ModelId
    incarnation: int
    silent_s: float


class Found(Struct, frozen=True):
    """An engine that ran before we did. `traits` is None if it does not answer yet."""

    traits: Traits | None = None
    held: Held | None = None
    pinned: bool | None = None
    """Whether it has slept at level 1, as an earlier life wrote down; None: no note was left."""


class Observed(Struct, frozen=True):
    """The first event of a life: what runs already. What is missing becomes the bootstrap."""

    found: Mapping[ModelId, Found] = field(default_factory=dict)


class ConfigChanged(Struct, frozen=True):
    specs: tuple[EngineSpec, ...]
    policy: Policy
    gpus: Mapping[Gpu, int]
    host_mib: int


class MemorySeen(Struct, frozen=True):
    """Somebody looked at the cards and at the host's RAM, and it was not what it had been."""

    missing: Mapping[Gpu, int]
    """MiB that are neither on the books nor free, seen twice in a row."""
    strangers: Mapping[Gpu, str] = field(default_factory=dict)
    """Who else holds memory there."""
    pressure: float = 0.0


class ShutdownAsked(Struct, frozen=True):
    patience_s: float = 0.0
    """How long running answers may take to end."""


class TimePassed(Struct, frozen=True):
    """The instant that the last outcome asked for has come."""


Event = (
    RequestArrived
    | TicketClosed
    | OperationAsked
    | CancelAsked
    | StartEnded
    | RouseEnded
    | WakeEnded
    | SleepEnded
    | StopEnded
    | ProveEnded
    | EngineDied
    | EngineSilent
    | Observed
    | ConfigChanged
    | MemorySeen
    | ShutdownAsked
    | TimePassed
)
