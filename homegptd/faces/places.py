"""GPUs and the host's RAM: who holds what there, as the books have it."""

from collections.abc import Iterator

from homegptd.core import ledger
from homegptd.core.draft import in_flight
from homegptd.core.model import Engine, Gpu, State
from homegptd.wire import control as wire

from .views import FIGURES


def gpus_view(state: State) -> list[wire.GpuView]:
    """What the books say; `reserved` is what orders in flight hold or are promised."""
    views: list[wire.GpuView] = []
    for gpu, total in state.gpus.items():
        settled = reserved = 0
        for engine in state.engines.values():
            amount = ledger.charge(engine)[gpu]
            if in_flight(engine.phase):
                reserved += amount
            else:
                settled += amount
        foreign = ledger.foreign(state, gpu)
        views.append(
            {
                "index": gpu,
                "name": f"gpu{gpu}",
                "total_mib": total,
                "used_mib": settled,
                "reserved_mib": reserved,
                "foreign_mib": foreign,
                "foreign": _who(state, gpu),
                "free_mib": max(total - settled - reserved - foreign, 0),
                "held": _held(state, gpu),
                "freed_by": state.freed[gpu].by if gpu in state.freed else None,
            }
        )
    return views


def host_view(state: State) -> wire.HostView:
    used, foreign = ledger.used(state)[ledger.HOST], ledger.foreign(state, ledger.HOST)
    return {
        "total_mib": state.host_mib,
        "used_mib": used,
        "foreign_mib": foreign,
        "foreign": _who(state, ledger.HOST),
        "free_mib": max(state.host_mib - used - foreign, 0),
        "held": _held(state, ledger.HOST),
    }


def _who(state: State, place: Gpu) -> str:
    return state.foreign[place].who if place in state.foreign else ""


def _held(state: State, place: Gpu) -> list[wire.HeldView]:
    return [
        {"model": engine.spec.model, "what": what, "mib": mib}
        for engine in state.engines.values()
        for what, mib in _parts(engine, place)
        if mib
    ]


def _parts(engine: Engine, place: Gpu) -> Iterator[tuple[wire.FigureWord, int]]:
    """What `ledger.charge` has of it there."""
    mib = ledger.charge(engine)[place]
    if place != ledger.HOST:
        yield FIGURES[ledger.charged_as(engine.phase)], mib
        return
    processes = min(ledger.processes(engine), mib)
    yield "host", processes
    yield "pinned", mib - processes
