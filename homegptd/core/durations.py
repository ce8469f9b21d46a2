"""How long acts take on this box: from its own history, else from sizes and bandwidths.

An act is a word: `start`, `stop`, `first-sleep`, `sleep-1`, `sleep-2`, `wake-1`, `wake-2`, `drain`;
`rouse-1`, `rouse-2`, and `wake-roused` for what is left of a wake then.
The first sleep at level 1 is an act of its own, since it pins the memory that later ones use again.
"""

from collections.abc import Iterable, Sequence
from math import sqrt

from msgspec import Struct
from msgspec.structs import replace

from .model import (
    Draining,
    Engine,
    EngineSpec,
    FallingAsleep,
    Phase,
    Rousing,
    SleepLevel,
    Starting,
    Stopping,
    Waking,
)

KEPT = 20
"""Durations that count, per engine and act: the newest ones, since boxes change."""

_GIB = 1024
_PCIE = 8.0 * _GIB
"""MiB/s between host RAM and one GPU: PCIe 3 x16, or 4 x8, pinned."""
_PIN = 2.5 * _GIB
"""MiB/s at which a first sleep pins host RAM (8B on an A100: 10.6 s, vllm#48337)."""
_DISK = 2.0 * _GIB
"""MiB/s of a checkpoint read from an SSD or from the page cache."""


class Span(Struct, frozen=True):
    """A forecast in seconds: one in ten is shorter than `low_s`, one longer than `high_s`."""

    low_s: float = 0.0
    mid_s: float = 0.0
    high_s: float = 0.0

    def after(self, elapsed_s: float) -> "Span":
        """What is left of an act that has gone on for so long. What is overdue lasts on a while."""
        high = max(self.high_s - elapsed_s, 0.25 * elapsed_s)
        mid = self.mid_s - elapsed_s if elapsed_s < self.mid_s else high / 2
        return Span(max(self.low_s - elapsed_s, 0.0), min(mid, high), high)


ZERO = Span()


def total(spans: Iterable[Span]) -> Span:
    """One after another. The spreads add as those of independent things do."""
    low = mid = high = 0.0
    for span in spans:
        mid += span.mid_s
        low += (span.mid_s - span.low_s) ** 2
        high += (span.high_s - span.mid_s) ** 2
    return Span(max(mid - sqrt(low), 0.0), mid, mid + sqrt(high))


def longest(spans: Iterable[Span]) -> Span:
    """All at once: it is over with the last."""
    low = mid = high = 0.0
    for span in spans:
        low, mid, high = max(low, span.low_s), max(mid, span.mid_s), max(high, span.high_s)
    return Span(low, mid, high)


def span(engine: Engine, act: str) -> Span:
    """The forecast for `act`: median and tenths of what it took, wider where that is little."""
    took = sorted(engine.took.get(act, ()))
    if not took:
        mid = _guess(engine.spec, act)
        return Span(0.3 * mid, mid, 2.0 * mid)
    mid, margin = median(took), 1.0 / (len(took) + 1)
    low = min(_quantile(took, 0.1), mid * (1 - margin))
    return Span(low, mid, max(_quantile(took, 0.9), mid * (1 + margin)))


def takes(engine: Engine, act: str) -> float:
    """Typical seconds of `act` for this engine."""
    took = engine.took.get(act)
    return median(sorted(took)) if took else _guess(engine.spec, act)


def known(engine: Engine, act: str) -> float | None:
    """The same, None where this box has not seen it yet. No later sleep is slower than a first."""
    if act == "sleep-1" and not engine.took.get(act):
        act = "first-sleep"
    return takes(engine, act) if engine.took.get(act) else None


def to_sleep(engine: Engine, level: SleepLevel) -> str:
    """The act of putting it to sleep at `level` now."""
    first = level is SleepLevel.ONE and not engine.holds_pinned
    return "first-sleep" if first else f"sleep-{level}"


def act_of(phase: Phase) -> str | None:
    """The act that this phase carries out; None where it carries out none that is timed."""
    match phase:
        case Starting():
            return "start"
        case Rousing(level=level):
            return f"rouse-{level}"
        case Waking(roused=True):
            return "wake-roused"
        case Waking(level=level):
            return f"wake-{level}"
        case FallingAsleep(level=level, first=first):
            return "first-sleep" if first else f"sleep-{level}"
        case Draining():
            return "drain"
        case Stopping():
            return "stop"
        case _:
            return None


def switch_cost_s(engine: Engine) -> float:
    """What one switch to `engine` and away from it takes."""
    level = engine.spec.level or SleepLevel.ONE
    return takes(engine, f"wake-{level}") + takes(engine, f"sleep-{level}")


def timed(engine: Engine, act: str, seconds: float) -> Engine:
    """The engine with one more duration in its history."""
    took = (*engine.took.get(act, ()), seconds)[-KEPT:]
    return replace(engine, took={**engine.took, act: took})


def median(ranked: Sequence[float]) -> float:
    """Of values in order."""
    half = len(ranked) // 2
    return ranked[half] if len(ranked) % 2 else (ranked[half - 1] + ranked[half]) / 2


def _quantile(ranked: Sequence[float], share: float) -> float:
    """Nearest rank: nothing made up in between."""
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def _guess(spec: EngineSpec, act: str) -> float:
    """Seconds for a box that has not tried it yet, rounded up to what reports say (vLLM's blog,
    2025-10-26): who believes that switches are cheap makes too many of them."""
    weights = float(spec.pinned_mib)
    copy = weights / max(len(spec.gpus), 1) / _PCIE
    match act:
        case "start":
            return max(90.0, 45.0 + weights / _DISK)
        case "first-sleep":
            return max(3.0, copy + weights / _PIN)
        case "sleep-1" | "wake-1" | "rouse-1":
            return max(3.0, 0.5 + copy)
        case "sleep-2" | "wake-roused":
            return 1.0
        case "wake-2" | "rouse-2":
            return max(15.0, 1.0 + weights / _DISK)
        case "stop":
            return 3.0
        case "drain":
            return 5.0
        case _:
            raise ValueError(act)
