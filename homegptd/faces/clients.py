"""Who asks: the client of the request that is being answered, and what its key allows.

The door finds out before anything else is read, and `asking()` knows it from then on, in whatever
the request leads to: a handler that did not think of keys cannot show a model to the wrong client.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import TypeAlias

from homegptd.config.keys import LONGEST, Key, digest
from homegptd.core.model import ModelId

from . import errors
from .errors import Denied

Headers: TypeAlias = tuple[tuple[str, str], ...]
_UNLIMITED = nullcontext()


class Keyring:
    """The keys that are good now, and how many requests each has under way.

    One for the life of the daemon: a reload replaces the keys and keeps the counts.
    """

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self.keys = tuple(keys)
        self.running: Counter[str] = Counter()

    def find(self, secret: str) -> Key | None:
        """The key that this is. Takes as long for each wrong one, and tells nothing by that."""
        shown, found = digest(secret[:LONGEST]), None
        for key in self.keys:
            if compare_digest(key.digest, shown):
                found = key
        return found


@dataclass(frozen=True, slots=True)
class Client:
    """One who asks over HTTP."""

    key: Key | None = None
    """None where nobody is asked for one, or it showed none that is good."""
    known: bool = True
    """False: it should have shown a key. Only paths that are open to everybody meet such a one."""
    running: Counter[str] = field(default_factory=Counter)
    headers: Headers = ()
    """What every answer to it must have: permission for its web page to read (CORS)."""

    @property
    def name(self) -> str:
        """Of its key; empty without one."""
        return "" if self.key is None else self.key.name

    @property
    def may_switch(self) -> bool:
        return self.key is None or self.key.may_switch

    @property
    def max_wait_s(self) -> float | None:
        return None if self.key is None else self.key.max_wait_s

    def sees(self, model: ModelId) -> bool:
        """Whether the model is there for it."""
        if self.key is None:
            return self.known
        return self.key.models is None or model in self.key.models

    def counted(self) -> AbstractContextManager[None]:
        """For the length of a request. Raises: Denied (429) where its key has enough of them."""
        if self.key is None or self.key.concurrency is None:
            return _UNLIMITED
        return self._one_more(self.key.name, self.key.concurrency)

    def goes_on(self) -> AbstractContextManager[None]:
        """For what goes on when its request has been answered: it was let in with that."""
        return _UNLIMITED if self.key is None else self._one_more(self.key.name, math.inf)

    @contextmanager
    def _one_more(self, name: str, most: float) -> Iterator[None]:
        if self.running[name] >= most:
            requests = "1 request" if most == 1 else f"{most} requests"
            text = f'the key "{name}" may have {requests} under way, and has'
            raise Denied(errors.of_reason("too-many-requests", text))
        self.running[name] += 1
        try:
            yield
        finally:
            self.running[name] -= 1


ANYBODY = Client()
_asking: ContextVar[Client] = ContextVar("client", default=ANYBODY)
asking = _asking.get
"""The client of this request. In callbacks of an engine's connection it is somebody else's."""
asks = _asking.set
"""Only the door says so."""
