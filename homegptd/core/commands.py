"""What to do. Imperative; the runtime carries them out and answers with events."""

from msgspec import Struct

from .model import Ended, ModelId, OrderId, Proof, SleepLevel, SleepMode, TicketId
from .refusals import Refusal


class Start(Struct, frozen=True):
    model: ModelId
    order: OrderId
    incarnation: int


class Wake(Struct, frozen=True):
    model: ModelId
    order: OrderId
    level: SleepLevel
    frozen: bool = False
    roused: bool = False
    """Its weights are awake already."""


class Rouse(Struct, frozen=True):
    """Wake its weights alone."""

    model: ModelId
    order: OrderId
    level: SleepLevel


class Sleep(Struct, frozen=True):
    model: ModelId
    order: OrderId
    level: SleepLevel
    mode: SleepMode
    first: bool = False
    """Pins its host RAM, and so takes longer than later ones."""


class Stop(Struct, frozen=True):
    """Replaces whatever order the engine still has."""

    model: ModelId
    order: OrderId


class Prove(Struct, frozen=True):
    model: ModelId
    order: OrderId
    proof: Proof


class Watch(Struct, frozen=True):
    """Tell when this incarnation ends or hangs."""

    model: ModelId
    incarnation: int


class Probe(Struct, frozen=True):
    """Have this incarnation say a word now; if it cannot, it is lost."""

    model: ModelId
    incarnation: int


class Grant(Struct, frozen=True):
    ticket: TicketId


class Refuse(Struct, frozen=True):
    ticket: TicketId
    refusal: Refusal


class Cut(Struct, frozen=True):
    """End this answer now, honestly. Its lease still ends by `TicketClosed`; until then it may be
    cut again, which means nothing more."""

    ticket: TicketId
    refusal: Refusal


class Finish(Struct, frozen=True):
    ended: Ended


Order = Start | Rouse | Wake | Sleep | Stop | Prove
Command = Order | Watch | Probe | Grant | Refuse | Cut | Finish
