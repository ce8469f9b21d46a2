"""Connections to engines are kept open, since a new one costs more than most requests.

vLLM's server (uvicorn) closes one that has been idle for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), so one
that has been idle for longer than `IDLE_S` is not used again, and one that turns out to be dead
before the first byte is no news about the engine.
"""

from __future__ import annotations

import asyncio
import math
from typing import TypeAlias

from .ticks import Ticks
from .upstream import Connection, Unchunked

Address: TypeAlias = str | tuple[str, int]
"""The path of a Unix socket, or host and port."""

IDLE_S = 4.0
CONNECT_S = 5.0
_IDLE_PER_ENGINE = 64


class Upstream:
    """The connections to one engine."""

    def __init__(self, pool: Pool, address: Address) -> None:
        self.pool, self.address, self._clock = pool, address, pool.loop.time
        self._heard_at = -math.inf
        self._idle: list[Connection] = []

    def take(self) -> Connection | None:
        """The connection that was used last, if it is fresh enough. Its end may come at once."""
        idle, oldest = self._idle, self._clock() - IDLE_S
        while idle:
            connection = idle.pop()
            if connection.idle_since >= oldest:
                return connection
            connection.discard()
        return None

    async def connect(self, *, unchunked: bool = False) -> Connection:
        """A new connection. Raises: OSError, TimeoutError."""
        loop, at = self.pool.loop, self.address
        kind = Unchunked if unchunked else Connection
        async with asyncio.timeout(CONNECT_S):
            if isinstance(at, str):
                _, connection = await loop.create_unix_connection(lambda: kind(self), at)
            else:
                _, connection = await loop.create_connection(lambda: kind(self), *at)
        return connection

    def keep(self, connection: Connection) -> None:
        connection.idle_since = self._heard_at = self._clock()
        self._idle.append(connection)
        if len(self._idle) > _IDLE_PER_ENGINE:
            self._idle.pop(0).discard()

    def drop(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def heard(self) -> None:
        """The engine said something lately."""
        self._heard_at = self._clock()

    def silent_s(self) -> float:
        """How long the engine has said nothing, over any connection, in seconds."""
        return self._clock() - self._heard_at

    def close(self) -> None:
        while self._idle:
            self._idle.pop().discard()


class Pool:
    """Connections to all engines. One for the life of the daemon."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.ticks = Ticks(self.loop)
        self._upstreams: dict[Address, Upstream] = {}

    def upstream(self, address: Address) -> Upstream:
        found = self._upstreams.get(address)
        if found is None:
            found = self._upstreams[address] = Upstream(self, address)
        return found

    def close(self) -> None:
        for each in self._upstreams.values():
            each.close()
