"""Looks at the memory around orders and now and then in between; what it means is for the core.

A transition has its GPUs for itself, so what changes on them meanwhile is its doing.
"""

import asyncio
from collections.abc import Callable

from homegptd.core import figures, foreign, ledger
from homegptd.core.events import Event, MemorySeen
from homegptd.core.memory import Gpu, Held, Seen
from homegptd.core.model import ModelId, State

from .ports import MeterPort

SETTLE_S = 5.0
"""How long freed memory may take to show (ROCm, a driver that clears pages), in seconds."""
POLL_S = 0.1
"""Between two looks at something that no driver tells of by itself."""
LOOK_S = 5.0
"""Between two looks at the memory of a box on which nothing is known to go on."""


class Blind:
    """Fits MeterPort where nothing measures."""

    async def seen(self) -> Seen | None:
        return None

    async def held(self, model: ModelId) -> Held | None:
        return None


class Measuring:
    """What orders ask of the meter."""

    def __init__(self, meter: MeterPort, state: Callable[[], State]) -> None:
        self._meter = meter
        self._state = state

    async def held(self, model: ModelId) -> Held | None:
        return await self._meter.held(model)

    async def crowded(self, model: ModelId, *, patient: bool = True) -> Seen | None:
        """None if there is room for the engine's start or wake, at once or soon; else what there
        is instead. For its weights alone it must be there at once: others wait for that order."""
        end = asyncio.get_running_loop().time() + (SETTLE_S if patient else 0.0)
        while True:
            seen, engine = await self._meter.seen(), self._state().engines.get(model)
            if seen is None or engine is None or foreign.suffices(engine, seen):
                return None
            if asyncio.get_running_loop().time() >= end:
                return seen
            await asyncio.sleep(POLL_S)

    async def settled(self, model: ModelId, before: Held | None) -> Held | None:
        """What the engine holds after a sleep, once enough came back or the time for it is up."""
        end = asyncio.get_running_loop().time() + SETTLE_S
        while True:
            after, engine = await self._meter.held(model), self._state().engines.get(model)
            enough = engine is None or figures.hoarded(engine, before, after) is None
            if enough or asyncio.get_running_loop().time() >= end:
                return after
            await asyncio.sleep(POLL_S)


async def watch(
    meter: MeterPort, state: Callable[[], State], post: Callable[[Event], None]
) -> None:
    """For ever: tell what the memory looks like when it is not what the books say.

    What is missing counts when it was missing in two looks in a row: memory that an engine gave
    back can show late. What an order found missing has been looked at already.
    """
    last: dict[Gpu, int] = {}
    while True:
        seen = await meter.seen()
        if seen is not None:
            now = foreign.missing(state(), seen)
            charged = {place: ledger.foreign(state(), place) for place in now}
            sure = {p: min(mib, max(last.get(p, 0), charged[p])) for p, mib in now.items()}
            if foreign.is_news(state(), sure, seen.pressure):
                post(MemorySeen(sure, seen.strangers, seen.pressure))
            last = now
        await asyncio.sleep(LOOK_S)
