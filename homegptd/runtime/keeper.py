"""Writes down what the machine learns by itself and must know again after a restart.

Orders remember their own durations; this remembers the rest: how long drains took, whom the last
wakes were for, which GPUs are freed, and which engines have pinned no host RAM yet.
"""

import json
from collections.abc import Iterable

from msgspec.structs import replace

from homegptd.core.likely import KEPT
from homegptd.core.model import Down, Gpu, Lent, ModelId, State
from homegptd.core.story import Line

from .ports import StorePort

FREED = "freed"
WANTED = "wanted"
UNPINNED = "unpinned"


class Keeper:
    """`tell` it of each step that has a story; every change it cares for has one."""

    def __init__(self, store: StorePort, state: State) -> None:
        self._store = store
        self._seen = state

    def tell(self, state: State, lines: Iterable[Line]) -> None:
        """Write what differs from the last time."""
        before, self._seen = self._seen, state
        if state.freed != before.freed:
            lent = {str(g): {"by": e.by, "awake": list(e.awake)} for g, e in state.freed.items()}
            self._store.remember_note(FREED, json.dumps(lent))
        if state.wanted is not before.wanted and state.wanted != before.wanted:
            self._store.remember_note(WANTED, json.dumps(list(state.wanted)))
        if (unpinned := _unpinned(state)) != _unpinned(before):
            self._store.remember_note(UNPINNED, json.dumps(unpinned))
        for name, engine in state.engines.items():
            old = before.engines.get(name)
            took = engine.took.get("drain", ())
            if (
                old is not None
                and old.took is not engine.took
                and took != old.took.get("drain", ())
            ):
                self._store.remember_duration(name, "drain", took[-1])


def recall(store: StorePort, state: State) -> State:
    """The first state of a life, with what earlier ones have left."""
    freed: dict[Gpu, Lent] = {}
    for gpu, lent in _object(store.note(FREED)).items():
        if gpu.isdigit() and int(gpu) in state.gpus and isinstance(lent, dict):
            awake = tuple(ModelId(str(name)) for name in lent.get("awake", ()))
            freed[Gpu(int(gpu))] = Lent(str(lent.get("by", "somebody")), awake)
    names = _list(store.note(WANTED))
    wanted = tuple(ModelId(name) for name in names if isinstance(name, str))[-KEPT:]
    return replace(state, freed=freed, wanted=wanted)


def unpinned(store: StorePort) -> frozenset[ModelId] | None:
    """Engines that had never slept at level 1 when the last life ended; None: nothing is known."""
    names = _read(store.note(UNPINNED))
    if not isinstance(names, list):
        return None
    return frozenset(ModelId(name) for name in names if isinstance(name, str))


def _unpinned(state: State) -> list[ModelId]:
    return [
        name
        for name, engine in state.engines.items()
        if not engine.holds_pinned and not isinstance(engine.phase, Down)
    ]


def _object(text: str | None) -> dict[str, object]:
    """A note that cannot be read says nothing: no daemon fails to start over it."""
    found = _read(text)
    return found if isinstance(found, dict) else {}


def _list(text: str | None) -> list[object]:
    found = _read(text)
    return found if isinstance(found, list) else []


def _read(text: str | None) -> object:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None
