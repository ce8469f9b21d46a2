"""What was asked and what became of it, by model and key: counters in memory since the start.

A request has one `Record` from its arrival to its end, which the relay fills as bytes pass; then it
is added to the account of its model and key. Metrics and statistics read `snapshot()`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from enum import Enum
from time import monotonic

from homegptd.core.model import ModelId, State, TicketId

from .usage import MARK, Tokens, counts

BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
"""Upper bounds of the classes of a `Spread`, in seconds; one more class holds the rest."""
_TOGETHER = 32
_SMALL = 8192
"""Bytes of an answer that may wait to be counted."""
_OVERLAP = 1024
"""Bytes of a large answer's end that are kept, in case the counts come in two pieces."""


class End(Enum):
    """What became of a request."""

    ANSWERED = "answered"
    """The client has a whole answer of the engine, whatever it says."""
    REFUSED = "refused"
    """By the router: no such model, no room, waited too long, a bad body."""
    FAILED = "failed"
    """The engine was lost, hung, or cut its answer."""
    ABORTED = "aborted"
    """The client went away."""


@dataclass(slots=True)
class Spread:
    """How long something took: a count for each class, and the sum in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    def copy(self) -> Spread:
        return Spread(list(self.counts), self.sum_s)


@dataclass(slots=True)
class Account:
    """Totals of one model and one key."""

    model: str
    """Empty for requests that named none that is there for them."""
    key: str
    """The key's name; empty where nobody is asked for one."""
    requests: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    aborted: int = 0
    retried: int = 0
    """Sent to the engine a second time."""
    frozen: int = 0
    """Whose answer was frozen at least once."""
    tokens_read: int = 0
    tokens_written: int = 0
    uncounted: int = 0
    """Answers that do not say how many tokens they took."""
    waited: Spread = field(default_factory=Spread)
    """From the ticket to its grant."""
    first_token: Spread = field(default_factory=Spread)
    """Of streams: from the request's arrival to the first event for its client."""

    def count(self, tokens: Tokens, *, answered: bool) -> None:
        read, written = tokens
        self.tokens_read += read or 0
        self.tokens_written += written or 0
        self.uncounted += answered and read is None and written is None


class Record:
    """One request on its way."""

    __slots__ = (
        "_first", "_last", "arrived", "end", "first_s", "goes_on", "key", "model", "retried",
        "tail", "tickets", "waited_s",
    )  # fmt: skip

    def __init__(self, key: str) -> None:
        self.arrived = monotonic()
        self.key = key
        self.model = ""
        self.end = End.ABORTED
        self.retried = self.goes_on = False
        self.tickets: list[TicketId] = []
        self.waited_s: float | None = None
        self.first_s: float | None = None
        self.tail = b""
        """The end of what passed of an answer that comes in pieces and is no stream."""
        self._first = self._last = b""

    def granted(self, ticket: TicketId, waited_s: float) -> None:
        self.tickets.append(ticket)
        self.waited_s = (self.waited_s or 0.0) + waited_s

    def began(self) -> None:
        """The first event of a stream goes to the client."""
        self.first_s = monotonic() - self.arrived

    def passed(self, data: bytes, *, whole: bool) -> None:
        """Bytes with a `MARK`, or any of an answer that is no stream."""
        if not whole:
            data = self.tail + data
            self.tail = data[-_OVERLAP:]
        if MARK in data:
            self._first, self._last = self._first or data, data

    def tokens(self) -> Tokens:
        """As far as the answer said so."""
        return counts(self._first, self._last)


class Accounts:
    """One for the life of the daemon."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], Account] = {}
        self._frozen: set[TicketId] = set()
        self._later: list[tuple[ModelId, str, bytes]] = []

    def note_frozen(self, state: State) -> None:
        """Call it after each step with a story: a freeze has one."""
        for engine in state.engines.values():
            self._frozen.update(getattr(engine.phase, "frozen", ()))

    def close(self, record: Record) -> None:
        """Add a request that has ended, unless it goes on in the background."""
        if record.goes_on:
            return
        account = self._account(ModelId(record.model), record.key)
        account.requests += 1
        match record.end:
            case End.ANSWERED:
                account.answered += 1
            case End.REFUSED:
                account.refused += 1
            case End.FAILED:
                account.failed += 1
            case End.ABORTED:
                account.aborted += 1
        account.retried += record.retried
        if record.waited_s is not None:
            account.waited.add(record.waited_s)
        if record.first_s is not None:
            account.first_token.add(record.first_s)
        if self._frozen and not self._frozen.isdisjoint(record.tickets):
            account.frozen += 1
            self._frozen.difference_update(record.tickets)
        account.count(record.tokens(), answered=record.end is End.ANSWERED)

    def close_at_once(self, model: ModelId, key: str, data: bytes) -> None:
        """Add a request that did not wait, and whose answer came in one piece.

        They are counted many together, which takes less time for each.
        """
        self._later.append((model, key, data))
        if len(self._later) >= _TOGETHER or len(data) > _SMALL:
            self._close_together()

    def _close_together(self) -> None:
        together, self._later = self._later, []
        for model, key, data in together:
            account = self._account(model, key)
            account.requests += 1
            account.answered += 1
            account.waited.add(0.0)
            account.count(counts(data, data), answered=True)

    def snapshot(self) -> tuple[Account, ...]:
        """Copies, in the order in which they were first needed."""
        self._close_together()
        return tuple(
            replace(each, waited=each.waited.copy(), first_token=each.first_token.copy())
            for each in self._accounts.values()
        )

    def _account(self, model: ModelId, key: str) -> Account:
        found = self._accounts.get((model, key))
        if found is None:
            found = self._accounts[model, key] = Account(model, key)
        return found
