"""Memory sums as a person would write them: why something does not fit, and how closely it does.

For example
`needs 60.0 GB on gpu0; 96.0 total - 2.1 residue of a - 1.9 of b - 38.0 pinned c = 54.0`.
"""

from collections.abc import Callable, Iterator, Mapping

from msgspec import Struct

from . import ledger
from .ledger import HOST, Books
from .levels import Displacements, levels
from .model import Awake, Down, Draining, Engine, Gpu, ModelId, Sleeper, State
from .refusals import Reason, Refusal


class _Term(Struct, frozen=True):
    """What one engine holds at one place, and the word for it."""

    mib: int
    what: str
    name: str
    stays: bool
    """Nothing may take that away."""


def fitting(state: State, model: ModelId, room: Displacements) -> tuple[str, ...]:
    """One line for each place that `model` needs, once `room` is made for it."""
    lines = []
    for place, need in sorted(ledger.awake(state.engines[model]).items()):
        terms = [*_terms(state, model, place, room, lambda engine: True)]
        left = _given(state, place) - sum(term.mib for term in terms)
        lines.append(f"{_line(state, place, need, terms)}, {_gb(left - need)} to spare")
    return tuple(lines)


def lacking(
    state: State, model: ModelId, *, may_displace: Callable[[Engine], bool]
) -> tuple[str, ...]:
    """One line for each place where `model` lacks room though all that may has made room.

    Who may be displaced sleeps in the sum; where stopping would gain more, that is said too.
    """

    def stays(engine: Engine) -> bool:
        return not may_displace(engine)

    lines, tight = [], []
    now = ledger.charge(state.engines[model])
    for place, need in sorted(ledger.awake(state.engines[model]).items()):
        if place in state.foreign and need <= now[place]:
            continue  # what others take cannot stand in its way: it has what it needs
        room = _asleep_together(state, model, stays)
        terms = [*_terms(state, model, place, room, stays)]
        total = _given(state, place)
        most = total - sum(term.mib for term in terms if term.stays)
        line = _line(state, place, need, terms)
        sleepers = [term.name for term in terms if not term.stays]
        if need > most:
            also = f"; {_gb(most)} even with {_and(sleepers)} stopped" if sleepers else ""
            lines.append(line + also)
        elif need > total - sum(term.mib for term in terms):
            tight.append(line)
    return tuple(lines or tight)


def no_room(state: State, model: ModelId, *, may_displace: Callable[[Engine], bool]) -> Refusal:
    """Why `model` cannot be brought up."""
    sums = "; ".join(lacking(state, model, may_displace=may_displace))
    need = ledger.awake(state.engines[model])
    alone = all(mib <= _given(state, place) for place, mib in need.items())
    pinned = alone and any(e.spec.pinned and name != model for name, e in state.engines.items())
    reason = Reason.PINNED if pinned else Reason.DOES_NOT_FIT
    text = f'cannot bring up "{model}": {sums or "no room"}'
    return Refusal(reason, text, f"homegptctl plan {model}")


def _asleep_together(
    state: State, model: ModelId, stays: Callable[[Engine], bool]
) -> Displacements:
    """Everybody who may be displaced sleeps as he best can; who cannot sleep is stopped."""
    room = {}
    for name, engine in state.engines.items():
        if name == model or stays(engine) or isinstance(engine.phase, Sleeper):
            continue
        room[name] = next(levels(engine, state.policy), None)
    return room


def _terms(
    state: State,
    model: ModelId,
    place: Gpu,
    room: Displacements,
    stays: Callable[[Engine], bool],
) -> Iterator[_Term]:
    for name, engine in state.engines.items():
        if name == model or isinstance(engine.phase, Down):
            continue
        level = room.get(name)
        displaced = name in room
        books = (
            ledger.eventual(engine) if not displaced
            else Books() if level is None
            else ledger.asleep(engine, level)
        )  # fmt: skip
        if books[place]:
            sleeps = displaced or isinstance(engine.phase, Sleeper)
            yield _Term(books[place], _what(engine, place, books, sleeps), name, stays(engine))
    others = ledger.foreign(state, place)
    if others:
        yield _Term(others, "held by", state.foreign[place].who or "others", stays=True)


def _given(state: State, place: Gpu) -> int:
    return state.host_mib if place == HOST else state.gpus.get(place, 0)


def _what(engine: Engine, place: Gpu, books: Mapping[Gpu, int], sleeps: bool) -> str:
    if place == HOST:
        return "weights of" if books[HOST] > ledger.processes(engine) else "process of"
    if sleeps:
        return "residue of"
    if engine.spec.pinned:
        return "pinned"
    return "awake" if isinstance(engine.phase, Awake | Draining) else "coming up"


def _line(state: State, place: Gpu, need: int, terms: list[_Term]) -> str:
    total = _given(state, place)
    left = total - sum(term.mib for term in terms)
    digits = 2 if left < need and _gb(left) == _gb(need) else 1  # what is missing must show
    shown, said = "", ""
    for term in terms:
        what = term.what
        if what == said and what.endswith(" of"):
            what = "of"  # the noun was said a moment ago
        said = term.what
        shown += f" - {_gb(term.mib, digits)} {what} {term.name}"
    where = "of host RAM" if place == HOST else f"on gpu{place}"
    has = f"{_gb(total, digits)} total{shown} = {_gb(left, digits)}"
    return f"needs {_gb(need, digits)} GB {where}; {has}"


def _gb(mib: int, digits: int = 1) -> str:
    return f"{mib / 1024:.{digits}f}"


def _and(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
