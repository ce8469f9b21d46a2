"""Connections are bounded in number, and those that say nothing in time."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from homegptd.faces.server import Server

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def fine(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(text="fine")


@asynccontextmanager
async def serving(**bounds: Any) -> AsyncIterator[int]:
    runner = web.ServerRunner(Server(fine, **bounds))
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
