"""Faults that a test, or a person at the side door, can order.

Written `NAME[=VALUE][@OPERATION][*TIMES]` on the command line, as an object at the side door.
Without an operation a fault strikes where it usually does; without a number of times it strikes
until it is lifted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENGINE = frozenset({"sleep", "wake", "chat", "is_sleeping", "reload"})
_CONTROL = frozenset({"sleep", "wake"})

# name: (operations it strikes when none is named, what it does)
CATALOGUE: dict[str, tuple[frozenset[str], str]] = {
    "hang": (_ENGINE, "calls that cross into the engine never answer; /health stays 200"),
    "slow": (_ENGINE, "VALUE more simulated seconds before the work begins"),
    "500": (
        _CONTROL | {"chat"},
        "answers 500; a sleep is done all the same: the engine is poisoned",
    ),
    "reset": (_ENGINE, "the connection is reset, nothing is done"),
    "oom": (
        frozenset({"wake"}),
        "wake: half is mapped, then 500; start: exit 1; chat: death",
    ),
    "die": (frozenset({"chat"}), "the engine process dies; the server follows with exit code 0"),
    "zombie": (
        _CONTROL,
        "the engine dies during the call: no answer, then deaf to SIGTERM",
    ),
    "lie": (_CONTROL, "answers 200 and does nothing"),
    "half": (_CONTROL, "wake: only the weights; sleep: only the KV cache is freed"),
    "late": (_CONTROL, "done in time, but the answer comes VALUE simulated seconds later"),
    "leak": (frozenset({"sleep"}), "each sleep leaves VALUE MiB more on each GPU"),
    "garbage": (frozenset({"chat"}), "answers are wrong though the weights are valid"),
    "garbage-after-freeze": (frozenset({"chat"}), "an answer frozen by mode=keep goes on wrong"),
    "swallowed-sigterm": (
        frozenset({"start"}),
        "a start ignores its first SIGTERM; =1: and then hangs",
    ),
}
OPERATIONS = _ENGINE | {"start", "health", "models", "metrics"}


@dataclass(slots=True)
class Fault:
    """One ordered fault; `times` None means for ever."""

    name: str
    on: str | None = None
    value: float = 0.0
    times: int | None = None

    def __post_init__(self) -> None:
        if self.name not in CATALOGUE:
            raise ValueError(f"unknown fault {self.name!r}, known: {', '.join(CATALOGUE)}")
        if self.on is not None and self.on not in OPERATIONS:
            raise ValueError(
                f"unknown operation {self.on!r}, known: {', '.join(sorted(OPERATIONS))}"
            )

    def strikes(self, operation: str) -> bool:
        if self.on is None:
            return operation in CATALOGUE[self.name][0]
        return operation == self.on


def parse(text: str) -> Fault:
    """`late=5@sleep*1`. Raises ValueError with a text for the person who typed it."""
    match = re.fullmatch(r"([^=@*]+)(?:=([0-9.]+))?(?:@(\w+))?(?:\*(\d+))?", text)
    if match is None:
        raise ValueError(f"fault {text!r} is not of the form NAME[=VALUE][@OPERATION][*TIMES]")
    name, value, on, times = match.groups()
    return Fault(name, on, float(value or 0), int(times) if times else None)


class Faults:
    """The faults in force."""

    def __init__(self, faults: list[Fault]) -> None:
        self.ordered = list(faults)

    def take(self, name: str, operation: str) -> Fault | None:
        """The fault of that name that strikes this operation now; counts it as struck."""
        fault = self.peek(name, operation)
        if fault is not None and fault.times is not None:
            fault.times -= 1
            if fault.times <= 0:
                self.ordered.remove(fault)
        return fault

    def peek(self, name: str, operation: str) -> Fault | None:
        """As `take`, but nothing is counted."""
        return next((f for f in self.ordered if f.name == name and f.strikes(operation)), None)
