"""Open WebUI with its header: dots, load, Eject, changes as a stream. Nobody else sees them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from homegptd.core.model import Asleep, Awake, SleepLevel
from homegptd.faces.guard import Guard

from . import box

WEBUI = "X-HomeGPT-Client: open-webui\r\n"


def asleep() -> Asleep:
    return Asleep(SleepLevel.ONE, asyncio.get_running_loop().time())


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Path]:
    return {"chat": tmp_path / "chat", "coder": tmp_path / "coder"}


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
async def test_the_list_has_dots_for_those_that_asked_for_them(
    two: dict[str, Path], path: str
) -> None:
    async with box.running(two, phases={"coder": asleep()}) as b:
        listed = (await b.ask(path, method="GET", more=WEBUI)).json
        plain = (await b.ask("/v1/models", method="GET")).json
        views = (await b.ask("/models", method="GET")).json
    assert [(each["id"], each["status"]["value"]) for each in listed["data"]] == [
        ("chat", "loaded"), ("coder", "unloaded"),
    ]  # fmt: skip
    assert all("status" not in each for each in plain["data"])
    assert [view["status"] for view in views] == ["active", "sleeping"]


async def test_load_wakes_and_says_so(two: dict[str, Path]) -> None:
    async with box.running(two, phases={"coder": asleep()}) as b:
        reply = await b.ask("/models/load", {"model": "coder"}, more=WEBUI)
        assert (reply.status, reply.json) == (200, {"success": True})
        assert isinstance(b.phase("coder"), Awake)


async def test_unload_puts_to_sleep(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        b.hands.sleeps = True
        reply = await b.ask("/models/unload", {"model": "talk"}, more=WEBUI)
        assert (reply.status, reply.json) == (200, {"success": True})
        assert isinstance(b.phase("chat"), Asleep)


async def test_what_cannot_be_loaded_is_told(two: dict[str, Path]) -> None:
    now = asyncio.get_running_loop().time()
    down = {"coder": box.core.Down(now)}
    async with box.running(two, phases=down, awake_mib=2 << 20) as b:
        reply = await b.ask("/models/load", {"model": "coder"}, more=WEBUI)
    assert (reply.status, reply.error["code"]) == (409, "does_not_fit")


@pytest.mark.parametrize(
    ("content", "status"),
    [({"model": "nothing"}, 404), ({}, 422), (b"{", 400), ({"model": 1}, 422)],
)
async def test_a_bad_load_does_nothing(two: dict[str, Path], content: Any, status: int) -> None:
    async with box.running(two) as b:
        for path in ("/models/load", "/models/unload"):
            assert (await b.ask(path, content, more=WEBUI)).status == status
        assert b.scheduler.state.operations == ()


async def test_who_may_not_manage_may_not_load(two: dict[str, Path]) -> None:
    async with box.running(two, guard=Guard(managers=())) as b:
        for path in ("/models/load", "/models/unload"):
            reply = await b.ask(path, {"model": "chat"}, more=WEBUI)
            assert (reply.status, reply.error["code"]) == (403, "forbidden")
        assert (await b.ask("/v1/models", method="GET", more=WEBUI)).status == 200


async def test_without_the_header_the_verbs_are_not_there(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        for path, method in (
            ("/models/load", "POST"), ("/models/unload", "POST"), ("/models/sse", "GET"),
        ):  # fmt: skip
            for more in ("", "X-HomeGPT-Client: curl\r\n"):
                reply = await b.ask(path, {"model": "chat"}, method=method, more=more)
                assert (reply.status, reply.error["code"]) == (404, "not_found")
        assert b.scheduler.state.operations == ()


async def test_changes_are_a_stream_of_events(two: dict[str, Path]) -> None:
    now = asyncio.get_running_loop().time()
    async with box.running(two, phases={"coder": box.core.Down(now)}) as b:
        go = asyncio.Event()
        b.hands.on_start = lambda model: go.wait()  # type: ignore[assignment,return-value]
        client = await b.connect()
        client.send("/models/sse", method="GET", more=WEBUI)
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        assert await news(client) == ("chat", "loaded")
        assert await news(client) == ("coder", "unloaded")
        other = await b.connect()
        other.send("/models/load", {"model": "coder"}, more=WEBUI)
        assert await news(client) == ("coder", "loading")
        go.set()
        assert await news(client) == ("coder", "loaded")
        assert (await other.reply()).json == {"success": True}
        client.hang_up()


async def news(client: box.Client) -> tuple[str, str]:
    async with asyncio.timeout(5):
        size = int(await client.reader.readuntil(b"\r\n"), 16)
        event = (await client.reader.readexactly(size + 2)).decode()
    told = json.loads(event.removeprefix("data: "))
    assert told["event"] == "model_status"
    return told["model"], told["data"]["status"]
