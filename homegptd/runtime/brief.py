"""What the core has not been told of yet, because nobody has looked: short leases of awake models.

An awake model that nobody else wants serves request after request, and each is two steps that leave
everything as it was but for a few times. So they are noted here. Those that still run and the last
one of each model become events, as they were and in their order, before the next event is taken and
before anybody sees the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from homegptd.core.events import Event, RequestArrived, TicketClosed
from homegptd.core.model import ModelId, Ticket, TicketId

from .lease import Lease

Timed: TypeAlias = tuple[float, Event]
Running: TypeAlias = tuple[Lease, Callable[[], None]]


class Brief:
    """Of the leases of a model that have ended only the last one counts: it tells the times."""

    def __init__(self) -> None:
        self.serving: set[ModelId] = set()
        """Whose leases may be given so: what the core was told last is what holds."""
        self._running: dict[TicketId, Running] = {}
        self._last: dict[ModelId, tuple[Ticket, float, bool]] = {}
        """The last one that has ended, and when, and whether any has been served."""

    def begin(self, lease: Lease, noticed: Callable[[], None]) -> None:
        """`noticed` is called when the core has been told of it before its end."""
        self._running[lease.ticket.id] = lease, noticed

    def end(self, ticket: TicketId, now: float, *, served: bool) -> bool:
        """Whether this is one that the core knows nothing of, and never has to."""
        running = self._running.pop(ticket, None)
        if running is None:
            return False
        ended = running[0].ticket
        before = self._last.get(ended.model)
        self._last[ended.model] = ended, now, served or (before is not None and before[2])
        return True

    def take(self) -> tuple[list[Timed], list[Running]]:
        """The events, and the leases that are running; here are none any more."""
        running, events = list(self._running.values()), list[Timed]()
        for lease, _ in running:
            events.append((lease.ticket.since, RequestArrived(lease.ticket)))
        for ticket, at, served in self._last.values():
            events.append((ticket.since, RequestArrived(ticket)))
            events.append((at, TicketClosed(ticket.id, served)))
        events.sort(key=lambda timed: timed[0])
        self.serving.clear()
        self._running.clear()
        self._last.clear()
        return events, running
