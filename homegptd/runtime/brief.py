"""What the core has not been told of yet, because nobody has looked: who holds an awake model.

An awake model that nobody else wants serves request after request, and each is two steps that leave
everything as it was but for a few times. So they are noted here. Those that still run and the last
one of each model become events, as they were and in their order, before the next event is taken and
before anybody sees the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

from homegptd.core.events import Event, RequestArrived, TicketClosed
from homegptd.core.model import ModelId, Ticket, TicketId

from .lease import Lease

Timed: TypeAlias = tuple[float, Event]


class Holder(Protocol):
    """Who holds a model awake before the core knows."""

    model: ModelId
    ticket: TicketId
    since: float

    def noticed(self, lease: Lease) -> None:
        """The core knows now: this lease, to be closed, is what holds the model from here on."""


class Brief:
    """Of those who have let a model go only the last one counts: it tells the times."""

    def __init__(
        self,
        tickets: Iterator[TicketId],
        clock: Callable[[], float],
        begin_serving: Callable[[ModelId], bool],
    ) -> None:
        """`begin_serving`: whether the model serves; then the core must ask before long."""
        self._tickets, self._clock, self._begin_serving = tickets, clock, begin_serving
        self.serving: set[ModelId] = set()
        """Which may be held so: what the core was told last is what holds."""
        self._running: dict[TicketId, Holder] = {}
        self._served: set[ModelId] = set()
        """Which of them gave a whole answer to anybody."""
        self._last: dict[ModelId, tuple[TicketId, float, float]] = {}
        """The last one that has ended: its ticket, from when to when."""

    def hold(self, who: Holder) -> bool:
        """Hold its model awake for what is no stream, until `let_go`.

        Nothing can cut it, and it counts nowhere, until it is `noticed`, within `LOOK_AGAIN_S`.
        False where the model does not serve, or where somebody wants something else of the box.
        """
        if who.model not in self.serving:
            if not self._begin_serving(who.model):
                return False
            self.serving.add(who.model)
        who.ticket = ticket = next(self._tickets)
        who.since = self._clock()
        self._running[ticket] = who
        return True

    def let_go(self, who: Holder, *, served: bool) -> None:
        """For who has not been `noticed`."""
        del self._running[who.ticket]
        if served:
            self._served.add(who.model)
        self._last[who.model] = who.ticket, who.since, self._clock()

    def take(self, max_wait_s: float) -> tuple[list[Timed], list[tuple[Holder, Ticket]]]:
        """The events, and those who are running; here are none any more."""
        running, events = list[tuple[Holder, Ticket]](), list[Timed]()
        for who in self._running.values():
            ticket = Ticket(who.ticket, who.model, who.since, who.since + max_wait_s)
            running.append((who, ticket))
            events.append((ticket.since, RequestArrived(ticket)))
        for model, (number, since, until) in self._last.items():
            ticket = Ticket(number, model, since, since + max_wait_s)
            events.append((since, RequestArrived(ticket)))
            events.append((until, TicketClosed(number, model in self._served)))
        events.sort(key=lambda timed: timed[0])
        self.serving.clear()
        self._running.clear()
        self._last.clear()
        self._served.clear()
        return events, running
