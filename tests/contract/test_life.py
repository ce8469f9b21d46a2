"""Hangs, deaths and exit codes. Most of these tests cost their server its life."""

import asyncio
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from tests.contract.subjects import Client, Server, Stream, question, until

Launch = Callable[..., Server]
LONG = 1500


async def test_a_hung_engine_is_healthy_to_all_who_do_not_ask_it(client: Client, server: Server):
    server.freeze_engine_core(frozen=True)
    try:
        for path in ("/health", "/ping", "/version", "/load", "/metrics", "/v1/models"):
            assert (await client.get(path)).status == 200, path
        for asking in (client.asleep(), client.complete(1)):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await asking
    finally:
        server.freeze_engine_core(frozen=False)
    assert not await client.asleep()


async def test_sigterm_ends_with_0_once_its_clients_are_gone(launch: Launch):
    """What runs is aborted, mostly. About one time in eight on 0.32 the engine is killed before its
    last words are out: the stream then stays open, and the server waits for its client to leave."""
    server = launch()
    async with asyncio.TaskGroup() as group, asyncio.timeout(15):
        stream = Stream(Client(server), question(LONG))
        listening = group.create_task(stream.listen())
        await stream.heard(5)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait([listening], timeout=3)
        listening.cancel()
    assert stream.status == 200
    assert len(stream.events) < LONG
    assert stream.finish in ("abort", None)  # None: a bare [DONE], or no end at all
    assert await ended(server) == 0
    assert server.uds.exists()  # the socket file stays behind
    with pytest.raises(aiohttp.ClientConnectorError):
        await Client(server).get("/health")


async def test_a_stale_socket_file_makes_the_start_fail(launch: Launch, tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "vllm.sock"))
    server = launch(ready=False)
    assert await ended(server, 60) == 1
    assert "Address already in use" in server.tail()


async def test_an_unknown_flag_ends_the_start_with_2(launch: Launch):
    server = launch("--nonsense", ready=False)
    assert await ended(server, 60) == 2
    assert "unrecognized arguments: --nonsense" in server.tail()


async def test_without_dev_mode_nothing_sleeps_and_a_key_guards_v1_alone(launch: Launch):
    """And a dead engine core takes the server with it, with exit code 0."""
    server = launch("--api-key", "secret", VLLM_SERVER_DEV_MODE="0")
    client = Client(server)
    for method, path in (("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping")):
        assert (await client.ask(method, path)).status == 404, path
    refused = await client.get("/v1/models")
    assert (refused.status, refused.json) == (401, {"error": "Unauthorized"})
    key = {"Authorization": "Bearer secret"}
    assert (await client.ask("GET", "/v1/models", headers=key)).status == 200
    for path in ("/health", "/version", "/metrics", "/load"):
        assert (await client.get(path)).status == 200, path

    server.kill_engine_core()
    assert await ended(server) == 0
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.get("/health")


async def test_a_death_during_a_control_call_leaves_a_zombie(launch: Launch):
    server = launch()
    client = Client(server)
    async with asyncio.TaskGroup() as group, asyncio.timeout(20):
        stream = Stream(client, question(LONG))
        listening = group.create_task(stream.listen())
        await stream.heard(5)
        sleeping = group.create_task(client.post("/sleep?level=1&mode=wait"))
        await until(client.asleep)
        server.kill_engine_core()
        await asyncio.wait([listening])  # what ran ends with an error frame
        assert stream.status == 200
        assert "error" in stream.events[-1]
        await until(client.gone)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            await ended(server, 3)
        assert not sleeping.done()  # the call that never returns, and keeps the process
        sleeping.cancel()


async def ended(server: Server, deadline_s: float = 15) -> int:
    """The exit code, once there is one."""
    return await asyncio.to_thread(server.wait_for_exit, deadline_s)
