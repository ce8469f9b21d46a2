"""Which model gave which response id (`/v1/responses/ID`): bounded, in memory, shared by all doors.

Of those in the background also under which lease they are made, and how they ended.

vLLM keeps stored responses inside the process of their engine, so an id is good for one incarnation
of it. The ids are read off the answers, whose first member they are (0.32: `ResponsesResponse`, and
`response.created` before any other event).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from homegptd.core.model import Engine, ModelId
from homegptd.runtime.lease import Lease

_MOST = 10_000
_MOST_BYTES = 32 << 20
_ID = re.compile(rb'"id":\s?"([A-Za-z0-9_-]{1,128})"')
_LOOK = 4096


class Stored:
    """The last ids, the oldest forgotten first."""

    def __init__(self, most: int = _MOST, most_bytes: int = _MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._by: dict[str, tuple[ModelId, int]] = {}
        self._ended: dict[str, tuple[ModelId, bytes]] = {}
        self._ended_bytes = 0
        self.running: dict[tuple[ModelId, str], Lease] = {}
        """Those in the background that their engine is making."""

    def __len__(self) -> int:
        return len(self._by)

    def learn(self, data: bytes, model: ModelId, engines: Mapping[ModelId, Engine]) -> str | None:
        """Take the id out of the first bytes of an answer. It stays that of the engine which gave
        it first, while that one may have it or its end is kept: a client can ask for any id
        (`request_id`)."""
        found = _ID.search(data, 0, _LOOK)
        if found is None:
            return None
        ident, incarnation = found[1].decode(), engines[model].incarnation
        if self.owner(ident, engines) not in (None, model):
            return ident
        self._by.pop(ident, None)
        self._drop(ident)
        self._by[ident] = model, incarnation
        if len(self._by) > self._most:
            del self._by[next(iter(self._by))]
        return ident

    def find(self, ident: str, engines: Mapping[ModelId, Engine]) -> ModelId | None:
        """The model whose engine may still have that response."""
        model, incarnation = self._by.get(ident, (None, 0))
        engine = engines.get(model) if model is not None else None
        if engine is None or engine.incarnation != incarnation:
            self._by.pop(ident, None)
            return None
        return model

    def owner(self, ident: str, engines: Mapping[ModelId, Engine]) -> ModelId | None:
        """The model that gave it: its engine may have it, or how it ended is kept."""
        kept, _ = self._ended.get(ident, (None, b""))
        return kept or self.find(ident, engines)

    def keep(self, ident: str, model: ModelId, body: bytes) -> None:
        """How a response in the background ended, for as long as there is room."""
        self._drop(ident)
        self._ended[ident] = model, body
        self._ended_bytes += len(body)
        while self._ended_bytes > self._most_bytes:
            self._drop(next(iter(self._ended)))

    def ended(self, ident: str) -> tuple[ModelId, bytes] | None:
        """The same, and by which model, whatever has become of its engine."""
        return self._ended.get(ident)

    def _drop(self, ident: str) -> None:
        _, body = self._ended.pop(ident, (None, b""))
        self._ended_bytes -= len(body)
