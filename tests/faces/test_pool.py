"""Connections that wait for the next request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from homegptd.faces.pool import IDLE_S, Pool, Upstream
from homegptd.faces.upstream import Connection
from tests.faces.test_upstream import Sink, Transport

GOOD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class Full(Transport):
    """One that has sent so much of what was written, and can be stopped."""

    def __init__(self, unsent: int = 0) -> None:
        super().__init__()
        self.unsent = unsent
        self.reads = True

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    async def made() -> Upstream:
        return Pool().upstream("engine")

    with asyncio.Runner() as runner:
        yield runner.run(made())


def answered(upstream: Upstream, transport: Full | None = None, *, paused: bool = False) -> Full:
    """A connection over which an answer came."""
    connection, transport = Connection(upstream), transport or Full()
    given: Any = transport
    connection.connection_made(given)
    connection.send(Sink(connection), b"GET / HTTP/1.1\r\n\r\n", b"")
    if paused:
        connection.pause()
    connection.data_received(GOOD)
    connection.leave()
    return transport


def at(connection: Connection | None) -> object:
    assert connection is not None
    return connection._transport


def test_the_one_that_was_used_last_comes_first(upstream: Upstream) -> None:
    first, second = answered(upstream), answered(upstream)
    assert [at(upstream.take()), at(upstream.take()), upstream.take()] == [second, first, None]


def test_one_that_was_idle_for_too_long_is_closed(upstream: Upstream) -> None:
    transport = answered(upstream)
    upstream._idle[0].idle_since -= IDLE_S + 0.1
    assert upstream.take() is None
    assert transport.closed


def test_no_more_are_kept_than_make_sense(upstream: Upstream) -> None:
    made = [answered(upstream) for _ in range(70)]
    assert [each.closed for each in made] == [True] * 6 + [False] * 64


def test_one_that_has_ended_is_forgotten(upstream: Upstream) -> None:
    answered(upstream)
    upstream._idle[0].connection_lost(None)
    assert upstream.take() is None


def test_one_with_an_answer_was_heard(upstream: Upstream) -> None:
    assert upstream.silent_s() == float("inf")
    answered(upstream)
    assert upstream.silent_s() < 60


def test_one_that_still_sends_its_request_is_not_kept(upstream: Upstream) -> None:
    assert answered(upstream, Full(unsent=1)).closed
    assert upstream.take() is None


def test_one_that_was_stopped_is_read_again(upstream: Upstream) -> None:
    assert answered(upstream, paused=True).reads
    assert upstream.take() is not None


def test_all_are_closed_at_the_end(upstream: Upstream) -> None:
    transport = answered(upstream)
    upstream.pool.close()
    assert transport.closed
