"""The nouns: engines and their phases, tickets, operations, the state.

Instants (`since`, `until`, `*_at`) are seconds on the clock that `step` is called with; lengths end
in `_s`; memory is MiB and ends in `_mib`.
"""

from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import NewType, TypeGuard

from msgspec import Struct, field

from .asks import Act as Act
from .asks import Chore as Chore
from .asks import Ended as Ended
from .asks import Operation as Operation
from .asks import Ticket as Ticket
from .memory import Figures, Foreign, Kind, Learnt
from .memory import Gpu as Gpu

ModelId = NewType("ModelId", str)
TicketId = NewType("TicketId", int)
OperationId = NewType("OperationId", int)
OrderId = NewType("OrderId", int)


class SleepLevel(IntEnum):
    """vLLM's: 1 keeps the weights in host RAM, 2 discards them; both drop the KV cache."""

    ONE = 1
    TWO = 2


class SleepMode(Enum):
    """What vLLM does with running answers when it is put to sleep (`mode=` of /sleep, 0.17+)."""

    WAIT = "wait"
    KEEP = "keep"
    ABORT = "abort"


class Proof(Enum):
    """What a box must have seen for itself before the machine relies on it."""

    FREEZE = "freeze"
    """An answer frozen at level 1 goes on as if nothing had happened."""
    RELOAD = "reload"
    """After level 2 and `reload_weights` the model says what it said before."""


class Startup(Enum):
    DISABLED = "disabled"
    SLEEP = "sleep"
    ACTIVE = "active"


class OnDeadline(Enum):
    """What happens to answers that outlive a drain."""

    AUTO = "auto"
    FREEZE = "freeze"
    WAIT = "wait"
    CUT = "cut"


class Exit(Struct, frozen=True):
    """How an engine ended. `code` is negative for a signal, None where nobody knows."""

    code: int | None
    detail: str


class Running(Struct, frozen=True):
    """An engine found running: enough to tell this incarnation from a later one."""

    pid: int
    started_at: float
    """Unix seconds."""


class Traits(Struct, frozen=True):
    """What a running engine said and proved about itself."""

    version: str
    levels: frozenset[SleepLevel] = frozenset()
    """Sleep levels its version can be trusted to survive; empty: it is stopped instead."""
    why_no_sleep: str | None = None
    can_keep: bool = False
    """Has `mode=keep` (0.17+)."""
    can_rouse: bool = False
    """Its weights can wake alone, and go back to sleep (0.31+)."""
    asleep: bool = False
    asleep_level: SleepLevel | None = None
    """Where the server can tell (its sleep gauge, 0.12+); None: unknown, or awake."""
    proofs: Mapping[Proof, bool] = field(default_factory=dict)
    """Proofs of this model with this image and these flags; absent: not tried yet."""
    figures: Figures = field(default_factory=dict)
    """What was measured of it in earlier lives with this image and these flags."""
    image: str = ""
    """The digest of the image that it runs from; empty where that is not known."""

    @property
    def build(self) -> str:
        """What measurements and proofs hold for, beside the settings: `0.32.0 (sha256:4f1e…)`."""
        return f"{self.version} ({self.image})" if self.image else self.version


# ---------------------------------------------------------------- what is given


class EngineSpec(Struct, frozen=True):
    """What the configuration says about one model and its engine."""

    model: ModelId
    gpus: tuple[Gpu, ...]
    awake_mib: int
    """On each of its GPUs while awake: weights, KV cache, everything."""
    residue_mib: int
    """On each of its GPUs while asleep: context, graphs, communication buffers."""
    pinned_mib: int
    """Host RAM pinned by the first sleep at level 1 and kept until the process ends."""
    host_mib: int
    """Host RAM of the processes beside that."""
    pinned_margin_mib: int = 0  # until it is measured: vLLM rounds up
    estimated: frozenset[Kind] = frozenset()  # what nobody gave
    trust_given: bool = False  # whatever is measured
    startup: Startup = Startup.SLEEP
    level: SleepLevel | None = None
    """As configured; None: the policy's default, which the ledger may lower."""
    pinned: bool = False
    priority: int = 0
    auto_switch: bool = True
    on_deadline: OnDeadline | None = None
    drain_s: float | None = None
    sleep_after_s: float | None = None
    stop_after_s: float | None = None
    fingerprint: str = ""
    """Of everything that needs a restart of the engine when it changes."""


class Policy(Struct, frozen=True):
    """How the box is shared. None means: derived from what a switch takes here."""

    default: ModelId | None = None
    level: SleepLevel = SleepLevel.ONE
    patience_s: float | None = None
    residency_s: float | None = None
    switch_share: float = 0.2
    drain_s: float = 10.0
    on_deadline: OnDeadline = OnDeadline.AUTO
    max_answer_s: float = 600.0
    freeze_max_s: float = 300.0
    return_to_default_s: float | None = None
    """After so long in which nobody wanted anything the default model is awake again."""
    max_waiting: int = 256
    max_wait_s: float = 600.0
    rouse: bool = True
    """Whether weights may come back while the engines in the way still answer."""
    prove_after_s: float = 300.0
    """A quiet engine proves after this long what it could not prove when it was loaded."""
    restore_after_s: float = 30.0
    """What failed is loaded again in the place of an engine that was quiet for this long."""
    backoff_s: float = 5.0
    backoff_max_s: float = 300.0
    leak_mib: int = 512
    """Growth of a residue since the first sleep of an engine's life after which it is renewed."""
    max_failures: int = 5
    """Failures in a row after which only an operator starts the engine again."""


# ---------------------------------------------------------------- phases of an engine


class Failure(Struct, frozen=True):
    """Why an engine is not up, in words for the person who must act."""

    message: str
    hint: str | None = None
    lasting: bool = False


class Down(Struct, frozen=True):
    """Nothing runs. After a failure not started before `retry_at`; if None, only by hand."""

    since: float
    failure: Failure | None = None
    retry_at: float | None = None


class Starting(Struct, frozen=True):
    order: OrderId
    since: float
    adopts: bool = False
    """It was found running and does not answer yet."""


class Asleep(Struct, frozen=True):
    """`frozen` answers are held inside the engine until `frozen_until`, then cut."""

    level: SleepLevel
    since: float
    frozen: frozenset[TicketId] = frozenset()
    frozen_until: float | None = None
    crowded: bool = False
    """Its weights found less room than the books say: they come back with the rest of it."""


class Rousing(Struct, frozen=True):
    """Its weights come back while another engine still answers in its place."""

    order: OrderId
    since: float
    level: SleepLevel


class Roused(Struct, frozen=True):
    """Its weights are on the GPU, and nothing else of it is awake. `level` is how it slept, and
    will again as soon as nobody wants it awake any more."""

    level: SleepLevel
    since: float


class Waking(Struct, frozen=True):
    order: OrderId
    since: float
    level: SleepLevel
    frozen: frozenset[TicketId] = frozenset()
    roused: bool = False
    """Its weights are there already."""


class Awake(Struct, frozen=True):
    """Grants every ticket that names it. Not displaced before `held_until`, idle or not."""

    since: float
    leases: frozenset[TicketId] = frozenset()
    idle_since: float | None = None
    held_until: float | None = None


class Draining(Struct, frozen=True):
    """No new grants. Rests when the leases end; `until` is when patience with them ends.

    `awake` is what it goes back to if nobody wants it gone any more. `cut_at` is set once the
    leases were told to end.
    """

    awake: Awake
    leases: frozenset[TicketId]
    since: float
    until: float
    cut_at: float | None = None
    wanted_by: ModelId | None = None
    """For whom it makes room; itself, where nobody else needs it."""
    level: SleepLevel | None = SleepLevel.ONE
    """How it is to sleep then; None: it is stopped."""
    late: bool = False
    """Its answers outlived `until`, and may neither be frozen nor cut yet."""


class FallingAsleep(Struct, frozen=True):
    order: OrderId
    since: float
    level: SleepLevel
    frozen: frozenset[TicketId] = frozenset()
    wanted_by: ModelId | None = None
    first: bool = False
    """Pins its host RAM, and so takes longer than later ones."""
    roused: bool = False
    """Nothing but its weights was awake."""


class Proving(Struct, frozen=True):
    order: OrderId
    since: float
    proof: Proof


class Stopping(Struct, frozen=True):
    """Until nothing of it is left. `order` is None between two tries: the last one failed."""

    order: OrderId | None
    since: float
    failure: Failure | None = None
    retry_at: float | None = None
    """When Down may start again after a failure."""
    again_at: float | None = None
    """When the stop itself is tried again."""
    wanted_by: ModelId | None = None
    slept: SleepLevel | None = None
    """The level at which it slept, so that it holds no more than then; None: perhaps all."""
    roused: bool = False
    """It may hold its weights beside that."""


Phase = (
    Down
    | Starting
    | Asleep
    | Rousing
    | Roused
    | Waking
    | Awake
    | Draining
    | FallingAsleep
    | Proving
    | Stopping
)


Sleeper = Asleep | Rousing | Roused | FallingAsleep
"""Who is not awake, and does not come up unless somebody still wants that."""


def half_awake(phase: Phase) -> TypeGuard[Rousing | Roused | FallingAsleep]:
    """Whether it can hold nothing but its weights on its GPUs, beside what a sleeper keeps."""
    roused = isinstance(phase, FallingAsleep) and phase.roused
    return roused or isinstance(phase, Rousing | Roused)


class Engine(Struct, frozen=True):
    """One vLLM server under our care."""

    spec: EngineSpec
    phase: Phase
    traits: Traits | None = None
    """None until it was identified in this incarnation."""
    incarnation: int = 0
    """Raised by each start and adoption; news of an older one is dropped."""
    holds_pinned: bool = False
    """Has slept at level 1 in this incarnation: its pinned host RAM stays until it ends."""
    pins_unsure: bool = False
    """It was found running and only may have: it is charged for pinned RAM, and yet has to find
    room for it before it sleeps at level 1."""
    failures: int = 0
    """In a row, since it last served somebody."""
    enabled: bool = True
    """Whether requests may bring it up."""
    keep_loaded: bool = True
    """Whether it is started again by itself after a failure."""
    retiring: bool = False
    """No longer in the configuration: leaves as soon as it is down."""
    renew: bool = False
    """Runs with settings that have changed since, or should not run: it is stopped."""
    next_spec: EngineSpec | None = None
    """The changed settings. Until it is down, `spec` stays what it runs with and is charged for."""
    last_used: float = 0.0
    up_since: float = 0.0
    """When this incarnation was up, or was found."""
    took: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Seconds that each act of `durations` took on this box, the newest last."""
    unproved: Mapping[Proof, str] = field(default_factory=dict)
    """Proofs that failed, and how."""
    learnt: Learnt = field(default_factory=Learnt)
    no_room: Failure | None = None
    """Why it can never come up beside what is pinned, since it was last tried."""


class Lent(Struct, frozen=True):
    """A GPU that an operator freed for something else than models."""

    by: str
    awake: tuple[ModelId, ...] = ()
    """What was awake there; it is woken when the GPU is reclaimed."""


class State(Struct, frozen=True):
    """Everything the machine knows. Never changed: `step` makes the next one."""

    engines: Mapping[ModelId, Engine] = field(default_factory=dict)
    policy: Policy = Policy()
    gpus: Mapping[Gpu, int] = field(default_factory=dict)
    """Budget of each GPU in MiB."""
    host_mib: int = 0
    """Budget of host RAM for engines."""
    foreign: Mapping[Gpu, Foreign] = field(default_factory=dict)
    """What the books miss: held by others, or by engines beyond their figures."""
    pressure: float = 0.0  # percent of the last 10 s, as in `Seen`
    waiting: tuple[Ticket, ...] = ()
    """In order of arrival."""
    granted: Mapping[TicketId, Ticket] = field(default_factory=dict)
    operations: tuple[Operation, ...] = ()
    chores: tuple[Chore, ...] = ()
    freed: Mapping[Gpu, Lent] = field(default_factory=dict)
    """GPUs on which nothing is to run."""
    wanted_at: float = 0.0
    """When somebody last wanted anything."""
    wanted: tuple[ModelId, ...] = ()
    """Whom the last wakes were for, the newest last: what is likely next."""
    booted: bool = False
    """The bootstrap is over: what could be brought up is up."""
    stopping: bool = False
    stop_by: float = 0.0
    """Until when running answers may take to end, once it is stopping."""
    since: float | None = None
    """When this life began: what runs was observed. Nothing is ordered or granted before."""
    orders: int = 0
    """The number of the last order given."""
