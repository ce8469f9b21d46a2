"""What is told to a client, without the names of models that are not there for it.

Views and lines of the story name other models in many places (who makes room for whom, memory
sums, steps); so the names are taken out of the whole, and no place can be forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")
OTHER = "another model"


def without(told: T, hidden: Iterable[str]) -> T:
    """`told`, of which every text says "another model" for those `hidden`."""
    names = sorted(hidden, key=len, reverse=True)  # the longest of those that begin alike
    if not names:
        return told
    any_of = "|".join(map(re.escape, names))
    pattern = re.compile(rf"(?<![\w./-])(?:{any_of})(?![\w/-]|\.\w)")
    cleared: T = _cleared(told, pattern)
    return cleared


def _cleared(told: Any, pattern: re.Pattern[str]) -> Any:
    match told:
        case str():
            return pattern.sub(OTHER, told)
        case dict():
            return {key: _cleared(value, pattern) for key, value in told.items()}
        case list():
            return [_cleared(value, pattern) for value in told]
        case _:
            return told
