"""One way for each engine, so that together they fit and cost least. Exact, and quick enough.

Engines are looked at one after another. Of two partial answers the one is dropped that costs no
less and leaves no more room where room may still be scarce; so a dozen engines on four cards take
some milliseconds, where trying everything would take seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Struct

from .ledger import Books
from .model import SleepLevel


class Way(Struct, frozen=True):
    """How an engine is treated: what that costs, and what the engine then holds."""

    cost: float
    books: Books
    displaces: bool
    level: SleepLevel | None = None


@dataclass(slots=True)
class _Partial:
    """Ways for the first engines; `over` is what later ones have to spare, place by place."""

    cost: float
    over: tuple[int, ...]
    ways: tuple[Way, ...]


def cheapest(options: Sequence[Sequence[Way]], need: Books, limit: Books) -> list[Way] | None:
    """The cheapest ways, one of each, beside which `need` stays within `limit`; None: none do."""
    places = sorted({*need, *limit, *(p for ways in options for way in ways for p in way.books)})
    most = [[max(way.books[p] for way in ways) for p in places] for ways in options]
    spare = [[most[n][at] - min(way.books[p] for way in ways) for at, p in enumerate(places)]
             for n, ways in enumerate(options)]  # fmt: skip
    can_spare = [sum(each[at] for each in spare) for at in range(len(places))]
    worst = (need[p] + sum(each[at] for each in most) for at, p in enumerate(places))
    over = tuple(w - limit[p] for w, p in zip(worst, places, strict=True))
    partials = [_Partial(0.0, over, ())]
    if any(o > s for o, s in zip(over, can_spare, strict=True)):
        return None
    for ways, largest, gives in zip(options, most, spare, strict=True):
        can_spare = [left - given for left, given in zip(can_spare, gives, strict=True)]
        saves = [(way, [largest[at] - way.books[p] for at, p in enumerate(places)]) for way in ways]
        grown = []
        for partial in partials:
            for way, saved in saves:
                left = tuple(o - s for o, s in zip(partial.over, saved, strict=True))
                if all(o <= s for o, s in zip(left, can_spare, strict=True)):
                    clipped = tuple(max(o, 0) for o in left)
                    grown.append(_Partial(partial.cost + way.cost, clipped, (*partial.ways, way)))
        partials = _undominated(grown)
    return list(partials[0].ways) if partials else None


def _undominated(partials: list[_Partial]) -> list[_Partial]:
    """In the order of their cost, without those that another one makes pointless."""
    kept: list[_Partial] = []
    for one in sorted(partials, key=lambda partial: partial.cost):
        if not any(all(map(int.__le__, other.over, one.over)) for other in kept):
            kept.append(one)
    return kept
