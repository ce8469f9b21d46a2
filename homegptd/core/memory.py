"""The nouns of memory: figures and where they come from, and what was seen of cards and engines.

All amounts are MiB. A place is a GPU, or `HOST`: the host's RAM.
"""

from collections.abc import Mapping
from enum import Enum
from typing import NewType

from msgspec import Struct, field

Gpu = NewType("Gpu", int)

HOST = Gpu(-1)
"""Host RAM, as one more place on the books."""


class Source(Enum):
    """How much a figure is worth."""

    ESTIMATED = "estimated"
    """From the model's files and flags, or a guess."""
    CONFIGURED = "configured"
    MEASURED = "measured"
    """On this box, with this image and these flags."""


class Kind(Enum):
    """What a figure is about."""

    AWAKE = "awake"
    """On each GPU while awake: weights, KV cache, everything."""
    RESIDUE = "residue"
    """On each GPU while asleep: context, graphs, communication buffers."""
    ROUSED = "roused"
    """On each GPU while its weights alone are awake: them and the residue."""
    PINNED = "pinned"
    """Host RAM pinned by the first sleep at level 1, until the process ends."""
    HOST = "host"
    """Host RAM of the processes beside that."""


class Figure(Struct, frozen=True):
    """An amount, where it comes from, and what is charged on top to be safe."""

    mib: int
    source: Source
    margin_mib: int = 0
    at: float | None = None
    """Unix seconds of the newest measurement."""

    @property
    def charged_mib(self) -> int:
        return self.mib + self.margin_mib


Figures = Mapping[tuple[Kind, Gpu], Figure]
"""By kind and place; PINNED and HOST are at `HOST`, the others on each GPU of an engine."""


class Held(Struct, frozen=True):
    """What one engine was seen to hold at one instant."""

    at: float
    """Unix seconds."""
    gpu_mib: Mapping[Gpu, int] = field(default_factory=dict)
    """By its processes; empty where the driver does not tell them apart (WSL, MIG)."""
    host_mib: int | None = None
    free_mib: Mapping[Gpu, int] = field(default_factory=dict)
    """Free at that instant on each GPU of the box, and of the host's RAM at `HOST`."""


class Learnt(Struct, frozen=True):
    """What measurements taught about one engine."""

    figures: Figures = field(default_factory=dict)
    build: str = ""
    """The vLLM that they hold for, as `Traits.build` tells it."""
    first_residue: Mapping[Gpu, int] = field(default_factory=dict)
    """After the first sleep of this incarnation: what leaks shows against it."""
    last_residue: Mapping[Gpu, int] = field(default_factory=dict)
    hoards: int = 0
    """Sleeps in a row that gave too little back."""
    rouses_badly: bool = False
    """Its weights did not wake alone, or not go back to sleep: that is not tried again."""


class Card(Struct, frozen=True):
    """One GPU as its driver tells it; `total_mib` is what programs can have of it."""

    name: str
    total_mib: int
    used_mib: int

    @property
    def free_mib(self) -> int:
        return self.total_mib - self.used_mib


class Seen(Struct, frozen=True):
    """The memory of the box at one instant."""

    cards: Mapping[Gpu, Card]
    strangers: Mapping[Gpu, str] = field(default_factory=dict)
    """Who else holds memory there, the largest first: `Xorg (pid 812) 0.4 GB`."""
    available_mib: int | None = None
    """MemAvailable of /proc/meminfo."""
    pressure: float = 0.0
    """Share of the last 10 s in which some task waited for host memory, 0 to 100 (PSI)."""

    @property
    def free_mib(self) -> dict[Gpu, int]:
        free = {gpu: card.free_mib for gpu, card in self.cards.items()}
        return free if self.available_mib is None else {**free, HOST: self.available_mib}


class Foreign(Struct, frozen=True):
    """What nobody on the books holds, and yet it is not free."""

    mib: int
    who: str = ""
