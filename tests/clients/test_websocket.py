"""A websocket client of the realtime route, as OpenAI's clients come (model in the URL) and as
vLLM's (model in the first message)."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from .asking import awake, nothing_runs, phase
from .conftest import Served

SOUND = base64.b64encode(bytes(range(256)) * 100).decode()


pytestmark = pytest.mark.parametrize("served", ["sim"], indirect=True)
"""There is no speech model small enough for a CPU."""


@asynccontextmanager
async def session(
    served: Served, query: str = ""
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with (
        aiohttp.ClientSession() as client,
        client.ws_connect(f"{served.v1}/realtime{query}") as socket,
    ):
        assert (await heard(socket))["type"] == "session.created"
        yield socket


async def heard(socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    async with asyncio.timeout(20):
        return await socket.receive_json()


async def transcribed(socket: aiohttp.ClientWebSocketResponse) -> str:
    """Say something, and read what was understood: piece by piece, and whole."""
    await socket.send_json({"type": "input_audio_buffer.append", "audio": SOUND})
    await socket.send_json({"type": "input_audio_buffer.commit"})
    pieces = ""
    while True:
        event = await heard(socket)
        if event["type"] == "transcription.done":
            assert event["text"] == pieces
            return pieces
        assert event["type"] == "transcription.delta", event
        pieces += event["delta"]


async def test_the_model_in_the_url(served: Served) -> None:
    await awake(served, "a")
    async with session(served, "?model=ears") as socket:
        assert "This is ears:" in await transcribed(socket)
    await nothing_runs(served, "ears")


async def test_the_model_in_the_first_message(served: Served) -> None:
    await awake(served, "a")
    async with session(served) as socket:
        await socket.send_json({"type": "session.update", "model": "ears"})
        first = await transcribed(socket)
        assert first == await transcribed(socket)
        assert await phase(served, "ears") == "awake"


async def test_a_wrong_model_is_told(served: Served) -> None:
    async with session(served) as socket:
        await socket.send_json({"type": "session.update", "model": "years"})
        event = await heard(socket)
        assert event["type"] == "error"
        assert "ears" in str(event)


async def test_who_vanishes_holds_nothing(served: Served) -> None:
    async with session(served, "?model=ears") as socket:
        await transcribed(socket)
        response = socket._response
        assert response.connection is not None
        transport = response.connection.transport
        assert transport is not None
        transport.abort()  # no closing handshake, as from a laptop that is shut
    await nothing_runs(served, "ears")
