"""Connections are bounded in number, and those that say nothing in time."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from aiohttp import web

from homegptd.faces.server import Connection, Server

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def fine(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(text="fine")


@asynccontextmanager
async def serving(handler: Handler = fine, **bounds: Any) -> AsyncIterator[int]:
    runner = web.ServerRunner(Server(handler, **bounds))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(5):
            return await reader.read() == b""
    except ConnectionError:
        return True


async def test_half_a_head_is_not_waited_for() -> None:
    async with serving(head_s=0.1) as port:
        reader, writer = await connect(port)
        writer.write(GET[:20])
        assert await ended(reader)
        writer.close()


async def test_a_connection_that_has_asked_once_may_be_silent() -> None:
    async with serving(head_s=0.1) as port:
        reader, writer = await connect(port)
        writer.write(GET)
        assert b"fine" in await reader.readuntil(b"fine")
        silent, other = await connect(port)
        assert await ended(silent)  # so head_s is over for both
        writer.write(GET)
        assert b"fine" in await reader.readuntil(b"fine")
        writer.close()
        other.close()


async def test_no_clock_runs_for_a_connection_that_waits_for_its_answer() -> None:
    clocks: list[object] = []

    async def looking(request: web.BaseRequest) -> web.StreamResponse:
        connection = cast("Connection", request.protocol)
        clocks.extend((connection.look, connection._keepalive_handle))
        return await fine(request)

    async with serving(looking, keepalive_timeout=0.1) as port:
        reader, writer = await connect(port)
        writer.write(GET + GET)
        for _ in range(2):
            assert b"fine" in await reader.readuntil(b"fine")
        assert clocks[:2] == [None, None]
        assert await ended(reader)  # nobody is silent for ever
        writer.close()


async def test_a_request_keeps_no_dictionary_of_what_it_was_asked() -> None:
    asked: list[object] = []

    async def looking(request: web.BaseRequest) -> web.StreamResponse:
        asked.extend((request.keep_alive, dict(request._cache)))
        return await fine(request)

    async with serving(looking) as port:
        reader, writer = await connect(port)
        writer.write(GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert (await reader.read()).count(b"fine") == 2
        assert asked == [True, {}, False, {}]
        writer.close()


async def test_a_full_server_lets_the_oldest_silent_one_go() -> None:
    async with serving(most=2) as port:
        silent, first = await connect(port)
        speaking, second = await connect(port)
        second.write(GET)
        await speaking.readuntil(b"fine")
        third_reader, third = await connect(port)
        assert await ended(silent)
        third.write(GET)
        assert b"fine" in await third_reader.readuntil(b"fine")
        for writer in (first, second, third):
            writer.close()


async def test_what_is_not_http_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving() as port:
        reader, writer = await connect(port)
        writer.write(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.0 400")
        writer.close()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


async def test_a_request_that_fails_is_the_last_of_its_connection_and_of_no_other() -> None:
    async def failing(request: web.BaseRequest) -> web.StreamResponse:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)
        return await fine(request)

    async with serving(failing) as port:
        for _ in range(2):
            reader, writer = await connect(port)
            writer.write(GET + GET)
            said = await reader.read()
            assert said.startswith(b"HTTP/1.1 504")
            assert said.count(b"HTTP/1.1") == 1
            writer.close()


async def test_a_time_limit_inside_a_request_harms_no_later_one() -> None:
    async def impatient(request: web.BaseRequest) -> web.StreamResponse:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            return await fine(request)
        raise AssertionError

    async with serving(impatient) as port:
        reader, writer = await connect(port)
        for _ in range(3):
            writer.write(GET)
            await reader.readuntil(b"fine")
        writer.close()


@pytest.mark.parametrize("pipelined", [False, True])
async def test_a_client_that_hangs_up_ends_its_request(pipelined: bool) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def waiting(request: web.BaseRequest) -> web.StreamResponse:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        raise AssertionError

    async with serving(waiting, handler_cancellation=True) as port, asyncio.timeout(5):
        _, writer = await connect(port)
        writer.write(GET * (2 if pipelined else 1))
        await begun.wait()
        begun.clear()
        writer.transport.abort()
        await ended.wait()
    assert not begun.is_set()


async def test_a_server_that_ends_waits_for_a_request() -> None:
    begun = asyncio.Event()

    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        begun.set()
        await asyncio.sleep(0.05)
        return await fine(request)

    async with serving(slow) as port, asyncio.timeout(5):
        reader, writer = await connect(port)
        writer.write(GET)
        await begun.wait()
    assert b"fine" in await reader.read()
    writer.close()
