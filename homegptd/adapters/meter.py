"""Memory as it is: cards, the engines' processes on them, and the host's RAM."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from homegptd.core.memory import HOST, Card, Gpu, Held, Seen
from homegptd.core.model import ModelId
from homegptd.core.refusals import Fault
from homegptd.core.words import gb

from . import host_memory

NAMED = 3
"""Strangers that are told by name; the rest is in the sum."""
LEAST_MIB = 16
"""What a stranger must hold to be worth a name."""


@dataclass(frozen=True, slots=True)
class User:
    """A process on a card. `mib` is None where the driver does not say how much it holds."""

    pid: int
    gpu: Gpu
    mib: int | None
    name: str = ""
    """Empty: what /proc calls it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The cards at one instant; a simulated box tells its host memory too."""

    cards: Mapping[Gpu, Card]
    users: tuple[User, ...] = ()
    host_mib: Mapping[int, int] | None = None
    """Of each process; None: the kernel knows."""
    available_mib: int | None = None


class CardSource(Protocol):
    async def read(self) -> Reading | None: ...


class Belongings(Protocol):
    """What the backend knows of an engine's processes."""

    async def pids(self, model: ModelId) -> frozenset[int]: ...
    async def host_mib(self, model: ModelId) -> int | None: ...


class Meter:
    """Fits `MeterPort`. Where no card can be read nothing is measured, host memory neither: an
    engine without its GPU holds nothing that would tell."""

    def __init__(
        self, cards: CardSource, units: Belongings, models: Callable[[], Iterable[ModelId]]
    ) -> None:
        self._cards = cards
        self._units = units
        self._models = models

    async def seen(self) -> Seen | None:
        reading = await self._cards.read()
        if reading is None:
            return None
        ours: set[int] = set()
        for model in list(self._models()):
            ours |= await self._pids(model)
        available = await self._available(reading)
        return Seen(
            reading.cards,
            _strangers(reading, ours),
            available,
            host_memory.pressure(),
        )

    async def held(self, model: ModelId) -> Held | None:
        reading = await self._cards.read()
        if reading is None:
            return None
        pids = await self._pids(model)
        free = {gpu: card.free_mib for gpu, card in reading.cards.items()}
        available = await self._available(reading)
        if available is not None:
            free[HOST] = available
        return Held(
            time.time(), _on_gpus(reading, pids), await self._host(reading, model, pids), free
        )

    async def _pids(self, model: ModelId) -> frozenset[int]:
        try:
            return await self._units.pids(model)
        except Fault:
            return frozenset()

    async def _host(self, reading: Reading, model: ModelId, pids: Collection[int]) -> int | None:
        if reading.host_mib is None:
            try:
                return await self._units.host_mib(model)
            except Fault:
                return None
        known = [reading.host_mib[pid] for pid in pids if pid in reading.host_mib]
        return sum(known) if known else None

    async def _available(self, reading: Reading) -> int | None:
        if reading.host_mib is not None:
            return reading.available_mib
        return await asyncio.to_thread(host_memory.available_mib)


def _on_gpus(reading: Reading, pids: Collection[int]) -> dict[Gpu, int]:
    """Empty where the driver does not tell processes apart."""
    held: dict[Gpu, int] = {}
    for user in reading.users:
        if user.pid in pids:
            if user.mib is None:
                return {}
            held[user.gpu] = held.get(user.gpu, 0) + user.mib
    return held


def _strangers(reading: Reading, ours: Collection[int]) -> dict[Gpu, str]:
    others = [
        u for u in reading.users if u.pid not in ours and (u.mib is None or u.mib > LEAST_MIB)
    ]
    others.sort(key=lambda user: -(user.mib or 0))
    return {
        gpu: ", ".join([_named(user) for user in others if user.gpu == gpu][:NAMED])
        for gpu in {user.gpu for user in others}
    }


def _named(user: User) -> str:
    try:
        name = user.name or Path(f"/proc/{user.pid}/comm").read_text().strip()
    except OSError:
        name = "a process"
    pid = f" (pid {user.pid})" if user.pid else ""
    return name + pid + (f" {gb(user.mib)} GB" if user.mib is not None else "")
