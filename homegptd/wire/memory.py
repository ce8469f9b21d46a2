"""The shapes of the control protocol that tell of memory, in MiB."""

from __future__ import annotations

from typing import Annotated, TypedDict

from .words import FigureWord, PhaseWord, SourceWord


class MemoryView(TypedDict):
    """What a model holds now, in MiB: summed over its GPUs, and of the host's RAM."""

    gpu: int
    host: int


class FigureView(TypedDict):
    """What is reckoned with: awake, residue and roused (its weights alone are awake) on one GPU,
    pinned and host in the host's RAM."""

    kind: FigureWord
    gpu: Annotated[int | None, "null: the host's RAM"]
    mib: int
    margin_mib: Annotated[int, "charged on top"]
    source: SourceWord
    at: Annotated[float | None, "when it was measured last"]


class HeldView(TypedDict):
    """What one engine holds at one place now, margins included. `pinned` and `host` (its processes)
    are host RAM; on a GPU it is all it has there, named after what it is charged as."""

    model: str
    what: FigureWord
    mib: int


class PlaceView(TypedDict):
    """One GPU, or the host's RAM, in MiB: what the books say, and what is really free."""

    gpu: Annotated[int | None, "null: the host's RAM"]
    name: str
    total_mib: Annotated[int, "what engines may have together"]
    booked_mib: Annotated[int, "what engines hold now, margins included"]
    foreign_mib: int
    foreign: Annotated[str, "who, as far as it is known"]
    left_mib: int
    free_mib: Annotated[int | None, "measured now; null: nothing measures"]


class MemoryModelView(TypedDict):
    """One model's figures, and what its engine was seen to hold now."""

    id: str
    phase: PhaseWord
    figures: list[FigureView]
    measured_with: Annotated[
        str | None, "the vLLM that was measured: its version, and its image's digest where known"
    ]
    grown_mib: Annotated[int, "growth of its residue since its first sleep, on the worst GPU"]
    holds_gpu_mib: Annotated[dict[str, int] | None, "by GPU, of its processes"]
    holds_host_mib: int | None


class MemoryReport(TypedDict):
    """All memory: figures with their source, the sums, and the pressure."""

    now: float
    measures: Annotated[bool, "whether anything measures: a driver, or a simulated box"]
    pressure: Annotated[float, "percent of the last 10 s in which a task waited for host memory"]
    places: list[PlaceView]
    models: list[MemoryModelView]
