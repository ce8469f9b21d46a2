"""Why a request or an operation is turned down, and the base of everything that can go wrong."""

from enum import Enum

from msgspec import Struct

NEXT_LIFE_S = 5.0
"""From the end of a daemon to the first answers of the next, in seconds, with some to spare."""


class Reason(Enum):
    """The word on the wire; `homegptd.wire.codes` maps each to HTTP, RPC and exit codes."""

    UNKNOWN_MODEL = "unknown-model"
    MODEL_DISABLED = "model-disabled"
    MODEL_FAILED = "model-failed"
    DOES_NOT_FIT = "does-not-fit"
    PINNED = "pinned"
    QUEUE_FULL = "queue-full"
    WAITED_TOO_LONG = "waited-too-long"
    SHUTTING_DOWN = "shutting-down"
    CANCELLED = "cancelled"
    BUSY = "busy"
    CUT = "cut"
    GPU_FREED = "gpu-freed"
    ENGINE_FAULT = "engine-fault"


class Refusal(Struct, frozen=True):
    """A policy's no: what, why, and when it is worth asking again.

    `retry_after_s` is None where no time can be named.
    """

    reason: Reason
    message: str
    hint: str | None = None
    retry_after_s: float | None = None


class Fault(Exception):
    """An engine, a unit or a device did not do what it was told.

    Adapters raise subclasses; the runtime turns them into events. `hint` is the next command or
    edit for the person who must act. A `lasting` fault is one that trying again cannot mend (a
    missing binary, a bad flag): it is not retried until somebody asks.
    """

    unsettled = False
    """Whether what was ordered may still be under way: only a restart makes an end of it."""

    def __init__(self, message: str, *, hint: str | None = None, lasting: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.lasting = lasting
