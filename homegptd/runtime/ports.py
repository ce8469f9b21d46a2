"""What the runtime needs of the world. Adapters fit these by shape; the simulation does too."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from homegptd.core.memory import Figures, Held, Seen
from homegptd.core.model import Exit, ModelId, Proof, Running, SleepLevel, SleepMode, Traits

Canary = str | tuple[float, ...]
"""What a healthy model said to its canary's question: text, or a vector or scores."""


class UnitsPort(Protocol):
    """Starts and stops engines: child processes, or systemd units."""

    async def observe(self) -> Mapping[ModelId, Running]:
        """Engines that run now, whoever started them."""

    async def start(self, model: ModelId) -> None:
        """Launch; returns when the process or unit runs, long before vLLM is healthy.

        Raises `Fault`; a `lasting` one where trying again cannot help.
        """

    async def stop(self, model: ModelId) -> None:
        """Stop and wait until nothing of it is left, escalating as far as it takes.

        A no-op where nothing runs. Raises `Fault` if something survives even SIGKILL.
        """

    async def gone(self, model: ModelId) -> Exit:
        """Return when the running engine has ended, for whatever reason; at once if none runs."""

    def image(self, model: ModelId) -> str:
        """The digest of the image that its engine was started from; empty where none is known."""

    async def log_tail(self, model: ModelId, lines: int) -> Sequence[str]:
        """The engine's newest log lines, oldest first; empty where none can be had."""


class EnginePort(Protocol):
    """One vLLM server. Every method has a deadline of its own and raises `Fault`."""

    canary_reference: Canary | None
    """What this model said while it was known to be healthy; each wake is compared with it."""

    async def ready(self) -> bool:
        """Whether the server answers as healthy. Never raises: not yet is False."""

    async def identify(self) -> Traits:
        """After `ready`: version, what it can do, whether it sleeps now; records the canary."""

    async def sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        """A verified transaction: `/sleep`, `/is_sleeping`. Whether memory came back is for the
        meter to say."""

    async def rouse(self, level: SleepLevel) -> None:
        """Wake its weights alone, for level 2 with a reload: it still counts as asleep, and may be
        put to sleep again. Only where `Traits.can_rouse`."""

    async def wake(self, level: SleepLevel, *, frozen: bool, roused: bool = False) -> None:
        """A verified transaction: wake, for level 2 reload in between, canary.

        `frozen`: answers are held in the engine and go on; the canary then runs beside them.
        `roused`: its weights are awake already.
        """

    async def is_sleeping(self) -> bool:
        """Crosses into the engine process: a hang shows as a `Fault` within the deadline."""

    async def check(self) -> None:
        """A liveness probe that crosses into the engine; raises `Fault` if hung or a zombie."""

    async def speak(self) -> None:
        """Awake, and perhaps busy: one word of the model itself. Raises `Fault` if none comes."""

    async def prove(self, proof: Proof) -> str:
        """Try what `proof` claims on this box; returns what was compared. Raises `Fault`."""


class EnginesPort(Protocol):
    """Finds the server of a model."""

    def __getitem__(self, model: ModelId, /) -> EnginePort: ...


class MeterPort(Protocol):
    """Measures memory: NVML and /proc, or a simulated box. Never raises; None where nobody knows,
    as on a box without a driver."""

    async def seen(self) -> Seen | None:
        """The cards, who else is on them, and the host's RAM."""

    async def held(self, model: ModelId) -> Held | None:
        """What the engine's processes hold, workers and all."""


class NotifyPort(Protocol):
    """systemd's sd_notify(3); every call is a no-op where nobody listens."""

    def ready(self, status: str) -> None: ...
    def status(self, text: str) -> None: ...
    def extend(self, seconds: float) -> None: ...
    def watchdog(self) -> None: ...
    def reloading(self) -> None: ...
    def stopping(self, status: str) -> None: ...


class StorePort(Protocol):
    """What must survive a restart. Writing never raises: a full disk is reported, not fatal."""

    def canary(self, model: ModelId, key: str) -> Canary | None: ...
    def remember_canary(self, model: ModelId, key: str, said: Canary) -> None: ...
    def proofs(self, model: ModelId, key: str) -> Mapping[Proof, bool]: ...
    def remember_proof(
        self, model: ModelId, key: str, proof: Proof, *, holds: bool, detail: str
    ) -> None: ...
    def note(self, name: str) -> str | None: ...
    def remember_note(self, name: str, text: str) -> None: ...
    def figures(self, model: ModelId, key: str) -> Figures: ...
    def remember_figures(self, model: ModelId, key: str, figures: Figures) -> None: ...
    def durations(self) -> Mapping[tuple[ModelId, str], Sequence[float]]: ...
    def remember_duration(self, model: ModelId, act: str, seconds: float) -> None: ...
