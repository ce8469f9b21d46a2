"""Who wants what: tickets of clients, operations of operators, chores of the box.

Part of `model`, from where others import these.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from .model import Gpu, ModelId, OperationId, SleepLevel, TicketId
    from .refusals import Refusal


class Ticket(Struct, frozen=True):
    """One client request, from arrival to end."""

    id: TicketId
    model: ModelId
    since: float
    until: float
    """When it is refused if still waiting."""
    freezable: bool = False
    """Its answer is a stream, so a silent gap does no harm."""
    may_switch: bool = True
    priority: int = 0
    replay: bool = False
    """Second and last try after its engine died before the first byte."""


class Act(Enum):
    """What an operator can ask of a model."""

    SWITCH = "switch"
    WAKE = "wake"
    SLEEP = "sleep"
    START = "start"
    STOP = "stop"
    PROVE = "prove"
    FREE = "free"
    """Of GPUs, not of a model: nothing runs on them any more."""
    RECLAIM = "reclaim"
    """They serve models again."""

    @property
    def of_gpus(self) -> bool:
        """Whether it is about GPUs, so that it names no model."""
        return self in (Act.FREE, Act.RECLAIM)


class Operation(Struct, frozen=True):
    """A long act with an id and a caller."""

    id: OperationId
    act: Act
    model: ModelId
    """Empty for FREE and RECLAIM."""
    by: str
    since: float
    cut: bool = False
    """`--now`: answers that are in the way are cut, not drained."""
    force: bool = False
    """Displaces pinned models too."""
    level: SleepLevel | None = None
    restarted: bool = False
    """PROVE: the order was given."""
    displaced: tuple[ModelId, ...] = ()
    """START: what was awake and had to go; it is woken again at the end."""
    gpus: tuple[Gpu, ...] = ()
    """FREE and RECLAIM; empty: all."""


class Chore(Struct, frozen=True):
    """Work the box gives itself: the rest of the bootstrap, and what a failure left undone."""

    act: Act
    """START (load, then put to sleep) or WAKE."""
    model: ModelId
    since: float
    gentle: bool = False
    """Displaces idle engines only, and is dropped rather than waited for."""


class Ended(Struct, frozen=True):
    """How an operation ended; `refusal` is None if it did what was asked."""

    operation: Operation
    refusal: Refusal | None
    text: str
