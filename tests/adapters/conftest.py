"""The clock of these tests' event loops: only waiting passes time.

Engine and adapter share the loop here, so when nobody has anything to do, an answer is truly
awaited; whatever else takes time is the machine being busy. That way deadlines of a few tenths of
a second mean the same on every machine.
"""

import asyncio
import selectors
from collections.abc import Callable
from time import monotonic


class _Waits(selectors.DefaultSelector):
    waited_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if ready := super().select(0):
            return ready
        began = monotonic()
        ready = super().select(timeout)
        took = monotonic() - began
        self.waited_s += took if timeout is None else min(took, max(timeout, 0.0))
        return ready


class WaitingLoop(asyncio.SelectorEventLoop):
    """`time()` begins at 0 and counts the seconds in which the loop had nothing to do."""

    def __init__(self) -> None:
        self._waits = _Waits()
        super().__init__(self._waits)

    def time(self) -> float:
        return self._waits.waited_s


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"waiting": WaitingLoop}
