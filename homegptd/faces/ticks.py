"""Ticks for many at once. A timer costs more to set and to cancel than most answers live to use,
so everybody who counts the same steps shares one."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from typing import Protocol


class Counts(Protocol):
    def tick(self) -> None: ...


class Ticks:
    """One for the life of the daemon."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = loop
        self._counting: dict[float, set[Counts]] = {}
        """By the length of their steps in seconds; each length here has a timer that runs."""

    def join(self, who: Counts, every_s: float) -> None:
        """Call `who.tick()` that often, the first time after anything up to `every_s`."""
        counting = self._counting.get(every_s)
        if counting is None:
            counting = self._counting[every_s] = set()
            self._loop.call_later(every_s, self._ring, every_s)
        counting.add(who)

    def leave(self, who: Counts, every_s: float) -> None:
        self._counting[every_s].discard(who)

    def _ring(self, every_s: float) -> None:
        counting = self._counting[every_s]
        if not counting:
            del self._counting[every_s]
            return
        self._loop.call_later(every_s, self._ring, every_s)
        for each in tuple(counting):
            if each in counting:  # no tick of another has made it leave
                each.tick()
