"""What to do. Imperative; the runtime carries them out and answers with events."""

from dataclasses import dataclass

from .model import Ended, ModelId, OrderId, Proof, SleepLevel, SleepMode, TicketId
from .refusals import Refusal


@dataclass(frozen=True, slots=True)
class Start:
    model: ModelId
    order: OrderId
    incarnation: int


@dataclass(frozen=True, slots=True)
class Wake:
    model: ModelId
    order: OrderId
    level: SleepLevel
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class Sleep:
    model: ModelId
    order: OrderId
    level: SleepLevel
    mode: SleepMode
    first: bool = False
    """Pins its host RAM, and so takes longer than later ones."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Replaces whatever order the engine still has."""

    model: ModelId
    order: OrderId


@dataclass(frozen=True, slots=True)
class Prove:
    model: ModelId
    order: OrderId
    proof: Proof


@dataclass(frozen=True, slots=True)
class Watch:
    """Tell when this incarnation ends or hangs."""

    model: ModelId
    incarnation: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Have this incarnation say a word now; if it cannot, it is lost."""

    model: ModelId
    incarnation: int


@dataclass(frozen=True, slots=True)
class Grant:
    ticket: TicketId


@dataclass(frozen=True, slots=True)
class Refuse:
    ticket: TicketId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Cut:
    """End this answer now, honestly. Its lease still ends by `TicketClosed`; until then it may be
    cut again, which means nothing more."""

    ticket: TicketId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Finish:
    ended: Ended


Order = Start | Wake | Sleep | Stop | Prove
Command = Order | Watch | Probe | Grant | Refuse | Cut | Finish
