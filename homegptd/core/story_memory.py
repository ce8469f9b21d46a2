"""What is told of memory: strangers that come and go, orders that lack room, pressure on RAM."""

from collections.abc import Iterator

from .events import Event, StartEnded, WakeEnded
from .foreign import PRESSED
from .memory import HOST, Foreign, Gpu
from .model import ModelId, State
from .words import gb


def barred(event: Event) -> ModelId | None:
    """Who was not started or woken for want of memory."""
    if isinstance(event, StartEnded | WakeEnded) and event.crowded is not None:
        return event.model
    return None


def lines(
    before: State, event: Event, after: State
) -> Iterator[tuple[bool, str, ModelId | None, str]]:
    """Whether it is a warning, its kind, its model, its text."""
    name = barred(event)
    if name is not None and after is not before:
        act = "started" if isinstance(event, StartEnded) else "woken"
        yield True, "no-room", name, f"{name} is not {act}: there is less memory than the books say"
    for place in {**before.foreign, **after.foreign}:
        was, now = before.foreign.get(place), after.foreign.get(place)
        if now is None and was is not None:
            yield False, "foreign", None, f"{_where(place)}: what others held is free again"
        elif now is not None and now != was:
            yield True, "foreign", None, f"{_where(place)}: {_held(now)}"
    if (before.pressure >= PRESSED) is not (after.pressure >= PRESSED):
        pressed = after.pressure >= PRESSED
        text = f"some task waited for host memory {after.pressure:.0f} % of the last 10 s"
        yield pressed, "pressure", None, text if pressed else "no task waits for host memory"


def _where(place: Gpu) -> str:
    return "host RAM" if place == HOST else f"gpu{place}"


def _held(foreign: Foreign) -> str:
    who = foreign.who or "others, or engines beyond their figures"
    return f"{gb(foreign.mib)} GB are held by {who}"
