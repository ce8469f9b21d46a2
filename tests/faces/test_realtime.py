"""Realtime sessions: which model they are for, that they wake it, and how they end."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from homegptd.core.model import Act, Asleep, Awake, Draining, SleepLevel
from homegptd.sim.options import Options
from homegptd.sim.server import SimServer

from . import box

SOUND = {"type": "input_audio_buffer.append", "audio": base64.b64encode(b"\0\1" * 800).decode()}
COMMIT = {"type": "input_audio_buffer.commit"}


def options(name: str) -> Options:
    return Options(model=name, served=(name,), kind="audio", speed=1000.0, tokens_per_s=5)


@asynccontextmanager
async def running(tmp_path: Path, **more: Any) -> AsyncIterator[tuple[box.Box, SimServer]]:
    server = SimServer(options("ears"))
    paths = {"chat": tmp_path / "chat", "ears": tmp_path / "ears"}
    kinds = {"chat": "embed", "ears": "audio"}
    async with server.running(uds=paths["ears"]), box.running(paths, kinds=kinds, **more) as b:
        yield b, server


@asynccontextmanager
async def session(b: box.Box, query: str = "", **more: Any) -> AsyncIterator[Any]:
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{b.url}/v1/realtime{query}", **more) as ws,
    ):
        created = await ws.receive_json(timeout=5)
        assert created["type"] == "session.created"
        assert created["id"].startswith("sess-")
        yield ws


async def said(ws: aiohttp.ClientWebSocketResponse) -> str:
    """The text of one utterance, checked against its pieces."""
    text = ""
    while (event := await ws.receive_json(timeout=5))["type"] == "transcription.delta":
        text += event["delta"]
    assert event["type"] == "transcription.done"
    assert event["text"] == text
    return text


async def ended(ws: aiohttp.ClientWebSocketResponse) -> tuple[dict[str, Any], int | None]:
    event = await ws.receive_json(timeout=5)
    assert (await ws.receive(timeout=5)).type in (
        aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING,
    )  # fmt: skip
    return event, ws.close_code


async def test_the_first_update_names_the_model(tmp_path: Path) -> None:
    async with running(tmp_path) as (b, _), session(b) as ws:
        await ws.send_json(SOUND)
        await ws.send_json({"type": "session.update"})
        assert (await ws.receive_json(timeout=5))["code"] == "invalid_event"
        await ws.send_json({"type": "session.update", "model": "ears"})
        await ws.send_json(COMMIT)
        first = await said(ws)
        await ws.send_json(SOUND)
        await ws.send_json(COMMIT)
        assert first == await said(ws) != ""
        assert b.leases("ears") == 1
        await ws.close()
        await b.until(lambda: b.leases("ears") == 0)


async def test_the_query_names_the_model_for_clients_of_openai(tmp_path: Path) -> None:
    protocols = ("realtime", "openai-insecure-api-key.x")
    async with running(tmp_path) as (b, _), session(b, "?model=ears", protocols=protocols) as ws:
        assert ws.protocol == "realtime"
        await ws.send_json({"type": "session.update", "session": {"voice": "x"}})
        await ws.send_json(SOUND)
        await ws.send_json(COMMIT)
        assert await said(ws)


async def test_a_session_wakes_its_model_and_is_greeted_meanwhile(tmp_path: Path) -> None:
    go = asyncio.Event()
    down = {"ears": box.core.Down(asyncio.get_running_loop().time())}
    async with running(tmp_path, phases=down) as (b, _):
        b.hands.on_start = lambda model: go.wait()  # type: ignore[assignment,return-value]
        async with session(b, "?model=ears") as ws:
            await ws.send_json(SOUND)
            await ws.send_json(COMMIT)
            await b.until(lambda: len(b.scheduler.state.waiting) == 1)
            go.set()
            await b.until(lambda: any(isinstance(e, box.Start) for e in b.hands.given))


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue(tmp_path: Path) -> None:
    never = asyncio.Event()
    down = {"ears": box.core.Down(asyncio.get_running_loop().time())}
    async with running(tmp_path, phases=down) as (b, _):
        b.hands.on_start = lambda model: never.wait()  # type: ignore[assignment,return-value]
        async with session(b, "?model=ears"):
            await b.until(lambda: len(b.scheduler.state.waiting) == 1)
        await b.until(lambda: b.scheduler.state.waiting == ())


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ({"type": "session.update", "model": "nothing"}, 'no model "nothing"'),
        ({"type": "session.update", "model": "chat"}, "engine.kind is embed"),
        ({"type": "session.update", "model": 3}, "must be a string"),
        (b"\0", "messages are texts"),
    ],
)
async def test_what_names_no_model_for_this_ends_the_session(
    tmp_path: Path, event: Any, says: str
) -> None:
    async with running(tmp_path) as (b, _), session(b) as ws:
        if isinstance(event, bytes):
            await ws.send_bytes(event)
        else:
            await ws.send_json(event)
        told, code = await ended(ws)
        assert told["type"] == "error"
        assert says in told["error"]
        assert code in (1008, 1003)
        assert b.hands.given == []


async def test_a_session_is_for_one_model(tmp_path: Path) -> None:
    async with running(tmp_path) as (b, _), session(b, "?model=ears") as ws:
        await ws.send_json({"type": "session.update", "model": "chat"})
        assert "engine.kind is embed" in (await ended(ws))[0]["error"]


@pytest.mark.parametrize(
    ("query", "more", "status"),
    [
        ("?model=nothing", {}, 404),
        ("?model=chat", {}, 400),
        ("", {"headers": {"Origin": "http://evil.example"}}, 403),
        ("", {"headers": {"Host": "evil.example"}}, 403),
    ],
)
async def test_a_session_that_may_not_begin_gets_no_handshake(
    tmp_path: Path, query: str, more: dict[str, Any], status: int
) -> None:
    async with running(tmp_path) as (b, _):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with session(b, query, **more):
                pass
        assert caught.value.status == status


async def test_who_does_not_upgrade_is_told_to(tmp_path: Path) -> None:
    async with running(tmp_path) as (b, _):
        reply = await b.ask("/v1/realtime?model=ears", method="GET")
        assert (reply.status, reply.headers["upgrade"]) == (426, "websocket")
        assert (await b.ask("/v1/realtime", b"")).status == 405


async def test_a_silent_session_ends(tmp_path: Path) -> None:
    async with running(tmp_path, realtime_idle_s=0.2) as (b, _), session(b, "?model=ears") as ws:
        told, code = await ended(ws)
        assert (told["code"], code) == ("idle", 1001)
        await b.until(lambda: b.leases("ears") == 0)


async def test_a_session_makes_room_in_a_pause(tmp_path: Path) -> None:
    phases = {"chat": Asleep(SleepLevel.ONE, asyncio.get_running_loop().time())}
    wide = {"phases": phases, "awake_mib": 600_000}
    async with running(tmp_path, **wide) as (b, _), session(b, "?model=ears") as ws:
        await b.until(lambda: b.leases("ears") == 1)
        b.desk.begin(Act.SWITCH, "chat", by="test")
        await b.until(lambda: isinstance(b.phase("ears"), Draining))
        told, code = await ended(ws)
        assert (told["code"], code) == ("cut", 1013)
        assert "makes room" in told["error"]


async def test_an_engine_that_dies_ends_its_sessions_with_a_reason(tmp_path: Path) -> None:
    async with running(tmp_path) as (b, server), session(b, "?model=ears") as ws:
        await ws.send_json(SOUND)
        await ws.send_json(COMMIT)
        assert await said(ws)
        server.engine.die("killed")
        await ws.send_json(SOUND)
        await ws.send_json(COMMIT)
        told = await ws.receive_json(timeout=5)
        assert told["type"] == "error"
        assert isinstance(b.phase("ears"), Awake)


async def test_an_engine_that_died_unnoticed_is_asked_again(tmp_path: Path) -> None:
    server, paths = SimServer(options("ears")), {"ears": tmp_path / "ears"}
    more = {"kinds": {"ears": "audio"}, "notice_death_s": 0.5}
    async with (
        box.running(paths, **more) as b,
        session(b, "?model=ears") as ws,
        server.running(uds=paths["ears"]),
    ):
        await ws.send_json(SOUND)
        await ws.send_json(COMMIT)
        assert await said(ws)


async def test_a_session_that_is_put_to_sleep_is_told_so(tmp_path: Path) -> None:
    async with running(tmp_path) as (b, _), session(b, "?model=ears") as ws:
        await b.until(lambda: b.leases("ears") == 1)
        b.desk.begin(Act.SLEEP, "ears", by="test")
        assert "is put to sleep" in (await ended(ws))[0]["error"]


async def test_an_engine_that_is_not_there_is_an_error_event(tmp_path: Path) -> None:
    paths = {"ears": tmp_path / "nobody"}
    more = {"kinds": {"ears": "audio"}, "notice_death_s": 0.05}
    async with box.running(paths, **more) as b, session(b, "?model=ears") as ws:
        told, code = await ended(ws)
        assert (told["code"], code) == ("engine_fault", 1013)
