"""The control protocol: what may be called over the socket, with what, and what comes back.

Only names and shapes; `homegptd.faces.methods` adds handlers and makes the OpenRPC document from
these types. Callers import this module for type checking only. Times named `_at`, `since`,
`until`, `now` and `time` are seconds since 1970 (UTC); durations end in `_s`; memory is in MiB
(2**20 bytes).

Three notifications come from the daemon: `progress` (to whom waits), `event` (to whom subscribed)
and `closing` (to everybody, before the daemon goes).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NotRequired, TypeAlias, TypedDict

from .memory import FigureView as FigureView
from .memory import HeldView as HeldView
from .memory import MemoryModelView as MemoryModelView
from .memory import MemoryReport as MemoryReport
from .memory import MemoryView as MemoryView
from .memory import PlaceView as PlaceView
from .schema import Default
from .words import DaemonPhase as DaemonPhase
from .words import FigureWord as FigureWord
from .words import Level as Level
from .words import LineLevel as LineLevel
from .words import ModelStatus as ModelStatus
from .words import OperationState as OperationState
from .words import PhaseWord as PhaseWord
from .words import SourceWord as SourceWord
from .words import StepState as StepState


class Method(StrEnum):
    """Every method of the socket."""

    STATUS = "status"
    SWITCH = "switch"
    SLEEP = "sleep"
    WAKE = "wake"
    START = "start"
    STOP = "stop"
    PROVE = "prove"
    FREE = "free"
    RECLAIM = "reclaim"
    RELOAD = "reload"
    OPERATION = "operation"
    CANCEL = "cancel"
    PLAN = "plan"
    MEMORY = "memory"
    EVENTS = "events"
    LOGS = "logs"
    VERSION = "version"
    DISCOVER = "rpc.discover"


class Notice(StrEnum):
    """Every notification of the daemon."""

    PROGRESS = "progress"
    EVENT = "event"
    CLOSING = "closing"


# What is sent

Model: TypeAlias = Annotated[str, "id of a model, or one of its aliases"]
Wait: TypeAlias = Annotated[bool, "answer when the operation has ended", Default(True)]
Now: TypeAlias = Annotated[bool, "cut running answers instead of draining", Default(False)]


class NoParams(TypedDict):
    """Nothing."""


class ModelParams(TypedDict):
    """A model, and whether to wait."""

    model: Model
    wait: NotRequired[Wait]


class ModelNowParams(TypedDict):
    """A model, whether to wait, and whether its running answers may be cut."""

    model: Model
    wait: NotRequired[Wait]
    now: NotRequired[Now]


class SwitchParams(TypedDict):
    """A model, whether to wait, and what may be done to those in its way."""

    model: Model
    wait: NotRequired[Wait]
    now: NotRequired[Now]
    force: NotRequired[Annotated[bool, "displace pinned models too", Default(False)]]


class SleepParams(TypedDict):
    """A model, whether to wait, and how deep; without a level the daemon chooses."""

    model: Model
    wait: NotRequired[Wait]
    level: NotRequired[
        Annotated[Level | None, "1 keeps weights in RAM, 2 drops them", Default(None)]
    ]


Gpu: TypeAlias = Annotated[int | None, "index of a GPU; without it all of them", Default(None)]


class FreeParams(TypedDict):
    """A GPU, whether to wait, and whether running answers there may be cut."""

    gpu: NotRequired[Gpu]
    wait: NotRequired[Wait]
    now: NotRequired[Now]


class ReclaimParams(TypedDict):
    """A GPU, and whether to wait."""

    gpu: NotRequired[Gpu]
    wait: NotRequired[Wait]


class WaitParams(TypedDict):
    """Whether to wait."""

    wait: NotRequired[Wait]


class OperationParams(TypedDict):
    """An operation, and whether to wait for its end."""

    id: int
    wait: NotRequired[Annotated[bool, "answer when the operation has ended", Default(False)]]


class IdParams(TypedDict):
    """An operation."""

    id: int


class PlanParams(TypedDict):
    """A model."""

    model: Model


class MemoryParams(TypedDict):
    """A model, or none for all of them."""

    model: NotRequired[Annotated[str | None, "id of a model, or one of its aliases", Default(None)]]


class LogsParams(TypedDict):
    """A model and how many of its engine's last lines, at most 10000."""

    model: Model
    lines: NotRequired[Annotated[int, "how many", Default(50)]]


# What comes back


class ErrorView(TypedDict):
    """Why a model is out of order."""

    message: str
    hint: str | None


class FailureView(TypedDict):
    """Why an operation failed; `reason` is a word of `wire.codes.TABLE`."""

    message: str
    hint: str | None
    reason: str


class RequestsView(TypedDict):
    """How many requests of a model are running, waiting for it, and frozen in its engine."""

    running: int
    waiting: int
    frozen: int


class ModelView(TypedDict):
    """One model. `status` is the word of the HTTP API, `phase` the daemon's own."""

    id: str
    name: Annotated[str, "for people"]
    aliases: list[str]
    status: ModelStatus
    phase: PhaseWord
    since: Annotated[float | None, "when this phase began"]
    level: Annotated[Level | None, "the sleep level of a sleeper"]
    gpus: list[int]
    memory_mib: MemoryView
    figures: Annotated[list[FigureView], "what its memory is reckoned with"]
    requests: RequestsView
    until: Annotated[float | None, "when this phase ends by itself, if it does"]
    why: Annotated[str, "why it is in this state, or what comes next"]
    default: Annotated[bool, "gets the requests that name no model"]
    pinned: bool
    error: ErrorView | None


class QueueView(TypedDict):
    """Requests that wait for a model; `since` is the arrival of the oldest."""

    model: str
    waiting: int
    since: float


class GpuView(TypedDict):
    """One GPU, in MiB; `reserved` is promised to an order in flight."""

    index: int
    name: str
    total_mib: int
    used_mib: int
    reserved_mib: int
    foreign_mib: Annotated[int, "held by others, or by engines beyond their figures"]
    foreign: Annotated[str, "who, as far as it is known"]
    free_mib: int
    held: Annotated[list[HeldView], "who holds what of what is used and reserved"]
    freed_by: Annotated[str | None, "who lent it to something else than models"]


class HostView(TypedDict):
    """The host's RAM, as far as models may have it, in MiB."""

    total_mib: int
    used_mib: int
    foreign_mib: int
    foreign: Annotated[str, "who, as far as it is known"]
    free_mib: int
    held: list[HeldView]


class StepView(TypedDict):
    """One step of an operation: `do` is a verb such as "drain", "sleep", "wake"."""

    do: str
    model: str
    state: StepState
    seconds: Annotated[float | None, "how long it has taken so far, or took"]
    expected_s: Annotated[float | None, "how long it should take, from this box's own history"]


class OperationView(TypedDict):
    """A long act. `outcome` and `error` are null while it runs."""

    id: int
    kind: Annotated[str, "the method that began it, or what the daemon does by itself"]
    model: str | None
    by: Annotated[str, "who asked"]
    since: float
    state: OperationState
    outcome: Annotated[str | None, "one line for people"]
    error: FailureView | None
    steps: list[StepView]
    elapsed_s: float
    expected_s: Annotated[float | None, "for all steps together"]


class AccountView(TypedDict):
    """Requests of one model and one key since the daemon's start, and what became of them."""

    model: Annotated[str, "empty for requests that named none that is there"]
    key: Annotated[str, "name of the API key; empty where nobody is asked for one"]
    requests: int
    answered: int
    refused: Annotated[int, "by the router"]
    failed: Annotated[int, "the engine was lost or cut its answer"]
    aborted: Annotated[int, "the client went away"]
    retried: int
    frozen: int
    tokens_read: int
    tokens_written: int
    uncounted: Annotated[int, "answers that do not say how many tokens they took"]
    wait_s: Annotated[float | None, "for the model, on average"]
    first_token_s: Annotated[float | None, "of streams, from arrival, on average"]


class StatusView(TypedDict):
    """The whole box at one glance."""

    version: str
    pid: int
    started_at: float
    now: float
    ready: bool
    phase_of_daemon: DaemonPhase
    summary: Annotated[str, "the line that systemctl status shows"]
    default: Annotated[str | None, "id of the default model"]
    models: list[ModelView]
    queue: list[QueueView]
    gpus: list[GpuView]
    host: HostView
    operations: Annotated[list[OperationView], "those that run, oldest first"]
    accounts: NotRequired[list[AccountView]]


class ClientView(TypedDict):
    """Who asks over HTTP, and what it may do."""

    key: Annotated[str | None, "name of its API key; null: nobody is asked for one"]
    manage: Annotated[bool, "whether it may switch"]


class BoxView(StatusView):
    """The whole box over HTTP, as far as the client who asks may see it; without accounts."""

    you: ClientView


class PlanStepView(TypedDict):
    """One step that a switch would take, and why."""

    do: str
    model: str
    expected_s: float | None
    why: str


class SpanView(TypedDict):
    """A forecast: one in ten is shorter than `low_s`, one in ten longer than `high_s`."""

    low_s: float
    mid_s: float
    high_s: float


class PlanView(TypedDict):
    """What a switch to `model` would do now; `sum` is the memory sum, line by line."""

    model: str
    fits: bool
    steps: list[PlanStepView]
    expected_s: Annotated[float | None, "of all steps; null where answers have to end first"]
    eta: Annotated[SpanView | None, "until it is awake, answers and orders in flight counted"]
    sum: list[str]


class LogsView(TypedDict):
    """The last lines of an engine's log, oldest first, and the command that follows it."""

    lines: list[str]
    follow: Annotated[list[str], "argv; prints what comes from now on, and nothing before"]


class VersionView(TypedDict):
    """The daemon's version."""

    version: str
    pid: int
    python: str


class EventsView(TypedDict):
    """Nothing; events follow as notifications until the connection ends."""


class ProgressNotice(TypedDict):
    """How far the operation of a waiting call is; the first comes at once."""

    call: Annotated[str | float | None, "id of the call that waits"]
    operation: OperationView


class EventNotice(TypedDict):
    """Something happened; `fields` hold the figures. A warning wants that somebody looks."""

    time: float
    level: LineLevel
    kind: str
    model: str | None
    message: str
    fields: dict[str, object]


class ClosingNotice(TypedDict):
    """The daemon is about to close this connection."""

    reason: Annotated[str, "a word of the table of reasons"]
    message: str
