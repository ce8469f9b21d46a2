"""What the core has not been told of yet, because nobody has looked: short leases of awake models.

An awake model that nobody else wants serves request after request, and each is two steps that leave
everything as it was but for a few times. So they are noted here, and become events, as they were
and in their order, before the next event is taken and before anybody sees the state.
"""

from __future__ import annotations

from collections.abc import Callable

from homegptd.core.events import Event, RequestArrived, TicketClosed
from homegptd.core.model import ModelId, Ticket, TicketId

from .lease import Lease


class Brief:
    """Of the leases of a model that have ended only the last one counts: it tells the times."""

    def __init__(self) -> None:
        self.serving: set[ModelId] = set()
        """Whose leases may be given so: what the core was told last is what holds."""
        self._running: dict[TicketId, tuple[Lease, Callable[[], None]]] = {}
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

    def take(self) -> tuple[list[tuple[float, Event]], list[tuple[Lease, Callable[[], None]]]]:
        """The events and their times, and the leases that are running; here are none any more."""
        running, last = list(self._running.values()), self._last.values()
        tickets = [lease.ticket for lease, _ in running] + [ticket for ticket, _, _ in last]
        events: list[tuple[float, Event]] = [(each.since, RequestArrived(each)) for each in tickets]
        events += [(at, TicketClosed(ticket.id, served)) for ticket, at, served in last]
        events.sort(key=lambda timed: timed[0])
        self.serving.clear()
        self._running.clear()
        self._last = {}
        return events, running
