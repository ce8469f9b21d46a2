"""All memory in one report: what it is reckoned with, and what is measured at this moment."""

import time
from collections.abc import Callable, Sequence

from homegptd.core import figures, ledger
from homegptd.core.memory import HOST, Gpu, Held, Seen
from homegptd.core.model import Engine, ModelId, State
from homegptd.runtime.ports import MeterPort
from homegptd.wire import control as wire

from . import views


async def report(
    state: Callable[[], State], meter: MeterPort | None, models: Sequence[ModelId] | None = None
) -> wire.MemoryReport:
    """Of these models, or of all."""
    seen = await meter.seen() if meter is not None else None
    chosen = list(state().engines) if models is None else models
    held = {name: await meter.held(name) if meter and seen else None for name in chosen}
    now = state()
    return {
        "now": time.time(),
        "measures": seen is not None,
        "pressure": now.pressure if seen is None else seen.pressure,
        "places": _places(now, seen),
        "models": [_model(now.engines[name], held[name]) for name in chosen if name in now.engines],
    }


def _places(state: State, seen: Seen | None) -> list[wire.PlaceView]:
    booked, free = ledger.used(state), seen.free_mib if seen else {}
    given = {**state.gpus, HOST: state.host_mib}
    return [
        {
            "gpu": None if place == HOST else place,
            "name": _name(place, seen),
            "total_mib": total,
            "booked_mib": booked[place],
            "foreign_mib": ledger.foreign(state, place),
            "foreign": state.foreign[place].who if place in state.foreign else "",
            "left_mib": total - booked[place] - ledger.foreign(state, place),
            "free_mib": free.get(place),
        }
        for place, total in given.items()
    ]


def _name(place: Gpu, seen: Seen | None) -> str:
    if place == HOST:
        return "host RAM"
    return seen.cards[place].name if seen and place in seen.cards else f"gpu{place}"


def _model(engine: Engine, held: Held | None) -> wire.MemoryModelView:
    on_gpus = held.gpu_mib if held else {}
    return {
        "id": engine.spec.model,
        "phase": views.phase_word(engine.phase),
        "figures": views.figure_views(engine),
        "measured_with": engine.learnt.build or None,
        "grown_mib": max([0, *figures.grown(engine).values()]),
        "holds_gpu_mib": {str(gpu): mib for gpu, mib in on_gpus.items()} if on_gpus else None,
        "holds_host_mib": held.host_mib if held else None,
    }
