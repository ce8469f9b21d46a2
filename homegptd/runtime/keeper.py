"""Writes down what the machine learns by itself and must know again after a restart.

Orders remember their own durations; this remembers the rest: how long drains took, whom the last
wakes were for, which GPUs are freed, and which engines have pinned host RAM.
"""

import json
import time
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from homegptd.core.likely import KEPT
from homegptd.core.model import Down, Gpu, Lent, ModelId, Running, State
from homegptd.core.story import Line

from .ports import StorePort

FREED = "freed"
WANTED = "wanted"
PINS = "pins"


class Keeper:
    """`tell` it of each step that has a story; every change it cares for has one."""

    def __init__(
        self, store: StorePort, state: State, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock`: Unix seconds."""
        self._store = store
        self._seen = state
        self._clock = clock

    def tell(self, state: State, lines: Iterable[Line]) -> None:
        """Write what differs from the last time."""
        before, self._seen = self._seen, state
        if state.freed != before.freed:
            lent = {str(g): {"by": e.by, "awake": list(e.awake)} for g, e in state.freed.items()}
            self._store.remember_note(FREED, json.dumps(lent))
        if state.wanted is not before.wanted and state.wanted != before.wanted:
            self._store.remember_note(WANTED, json.dumps(list(state.wanted)))
        if (pins := _pins(state)) != _pins(before):
            self._store.remember_note(PINS, json.dumps({"at": self._clock(), "pinned": pins}))
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


class Pins:
    """What an earlier life wrote down of pinned host RAM."""

    def __init__(self, store: StorePort) -> None:
        noted = _object(store.note(PINS))
        at, pinned = noted.get("at"), noted.get("pinned")
        self._at = at if isinstance(at, int | float) else 0.0
        self._pinned = pinned if isinstance(pinned, dict) else {}

    def has_pinned(self, model: ModelId, running: Running) -> bool | None:
        """Whether this process has slept at level 1; None: nobody knows.

        Nobody but the daemon puts engines to sleep, so one that had pinned nothing still has not,
        whoever started it again meanwhile. One that had may be another since.
        """
        known = self._pinned.get(model)
        if known is True and running.started_at > self._at:
            return None
        return known if isinstance(known, bool) else None


def _pins(state: State) -> dict[ModelId, bool]:
    return {
        name: engine.holds_pinned
        for name, engine in state.engines.items()
        if not isinstance(engine.phase, Down) and not engine.pins_unsure
    }


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
