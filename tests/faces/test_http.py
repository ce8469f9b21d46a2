"""Management over HTTP: what it answers, and to whom."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from homegptd.core.model import (
    Asleep,
    Awake,
    Down,
    Failure,
    OrderId,
    SleepLevel,
    Starting,
)
from homegptd.faces.guard import Guard

from . import box
from .box import Box, Engine, answer, saying

TO_CODER = {"model_id": "coder"}


def asleep() -> Asleep:
    return Asleep(SleepLevel.ONE, asyncio.get_running_loop().time())


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Path]:
    return {"chat": tmp_path / "chat", "coder": tmp_path / "coder"}


async def test_health_is_ok_when_some_model_can_serve(two: dict[str, Path]) -> None:
    async with box.running(two, phases={"coder": asleep()}) as b:
        reply = await b.ask("/health", method="GET")
        head = await b.ask("/health", method="HEAD")
    assert (reply.status, reply.json["status"]) == (200, "ok")
    assert reply.json["models"] == {"chat": "active", "coder": "sleeping"}
    assert (head.status, head.body) == (200, b"")


async def test_health_reports_the_bootstrap_as_it_goes(two: dict[str, Path]) -> None:
    now = asyncio.get_running_loop().time()
    phases = {"chat": Starting(OrderId(1), now), "coder": Down(now)}
    async with box.running(two, phases=phases, booted=False) as b:
        reply = await b.ask("/health", method="GET")
    assert (reply.status, reply.json["status"]) == (503, "bootstrap")
    assert reply.json["models"] == {"chat": "switching", "coder": "stopped"}
    assert reply.json["summary"]


async def test_health_is_not_ok_when_nothing_can_serve(tmp_path: Path) -> None:
    now = asyncio.get_running_loop().time()
    down = Down(now, Failure("broken"), None)
    async with box.running({"chat": tmp_path / "s"}, phases={"chat": down}) as b:
        reply = await b.ask("/health", method="GET")
    assert (reply.status, reply.json["status"]) == (503, "degraded")


async def test_models_is_an_array_with_the_original_keys(two: dict[str, Path]) -> None:
    async with box.running(two, phases={"coder": asleep()}) as b:
        views = (await b.ask("/models", method="GET")).json
    assert [(v["id"], v["name"], v["status"]) for v in views] == [
        ("chat", "Chat", "active"),
        ("coder", "Coder", "sleeping"),
    ]
    assert views[0]["default"] is True
    assert views[1]["level"] == 1


async def test_a_switch_answers_when_it_is_done(two: dict[str, Path]) -> None:
    async with box.running(two, phases={"coder": asleep()}) as b:
        reply = await b.ask("/switch", TO_CODER)
        assert isinstance(b.phase("coder"), Awake)
    assert reply.status == 200
    assert (reply.json["state"], reply.json["model"]) == ("done", "coder")
    assert reply.json["by"].startswith("http 127.0.0.1")


async def test_a_switch_that_nobody_waits_for_is_an_operation_to_look_at(
    two: dict[str, Path],
) -> None:
    go = asyncio.Event()
    now = asyncio.get_running_loop().time()
    async with box.running(two, phases={"coder": Down(now)}) as b:
        b.hands.on_start = lambda model: go.wait()  # type: ignore[assignment,return-value]
        reply = await b.ask("/switch?wait=false", TO_CODER)
        assert (reply.status, reply.json["state"]) == (202, "running")
        where = reply.headers["location"]
        assert where == f"/operations/{reply.json['id']}"
        assert (await b.ask(where, method="GET")).json["state"] == "running"
        go.set()
        await b.until(lambda: isinstance(b.phase("coder"), Awake))
        assert (await b.ask(where, method="GET")).json["state"] == "done"


async def test_a_disabled_model_is_started_by_a_switch(two: dict[str, Path]) -> None:
    now = asyncio.get_running_loop().time()
    async with box.running(two, phases={"coder": Down(now)}, disabled=("coder",)) as b:
        assert (await b.ask(content={"model": "coder"})).error["code"] == "model_disabled"
        assert (await b.ask("/switch", TO_CODER)).status == 200


async def test_what_does_not_fit_is_refused_with_its_sum(two: dict[str, Path]) -> None:
    now = asyncio.get_running_loop().time()
    async with box.running(two, phases={"coder": Down(now)}, awake_mib=2 << 20) as b:
        reply = await b.ask("/switch", TO_CODER)
    assert reply.status == 409
    assert reply.error["code"] == "does_not_fit"
    assert "needs 2048.0 GB on gpu0; 1024.0 total" in reply.error["message"]
    assert reply.json["operation"]["state"] == "failed"


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        ({"model_id": "nothing"}, 404, 'no model "nothing"'),
        (b"{", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        ({}, 422, "model_id"),
        ({"model_id": 3}, 422, "$.model_id"),
        ({"model": "chat"}, 422, "model"),
        ({"model_id": "chat", "now": "yes"}, 422, "$.now"),
        (b'{"model_id": "' + b"x" * 70_000 + b'"}', 413, "larger than"),
    ],
)
async def test_a_bad_switch_is_told_what_is_wrong(
    two: dict[str, Path], content: object, status: int, says: str
) -> None:
    async with box.running(two) as b:
        reply = await b.ask("/switch", content)
        assert b.scheduler.state.operations == ()
    assert reply.status == status
    assert says in reply.error["message"]


async def test_a_client_that_leaves_a_switch_does_not_end_it(two: dict[str, Path]) -> None:
    go = asyncio.Event()
    now = asyncio.get_running_loop().time()
    async with box.running(two, phases={"coder": Down(now)}) as b:
        b.hands.on_start = lambda model: go.wait()  # type: ignore[assignment,return-value]
        client = await b.connect()
        client.send("/switch", TO_CODER)
        await b.until(lambda: len(b.scheduler.state.operations) == 1)
        client.hang_up()
        go.set()
        await b.until(lambda: isinstance(b.phase("coder"), Awake))


@pytest.mark.parametrize(
    ("path", "more", "status", "code"),
    [
        ("/switch?wait=maybe", "", 400, "bad_request"),
        ("/switch", "Content-Type: text/plain\r\n", 415, "bad_request"),
        ("/switch/", "", 404, "not_found"),
        ("/operations/1", "", 405, "method_not_allowed"),
        ("/models", "", 405, "method_not_allowed"),
    ],
)
async def test_mistakes_are_json_errors(
    two: dict[str, Path], path: str, more: str, status: int, code: str
) -> None:
    async with box.running(two) as b:
        reply = await b.ask(path, {"model_id": "chat"}, more=more)
    assert (reply.status, reply.error["code"]) == (status, code)


@pytest.mark.parametrize("name", ["999", "x", "-1", "1.5", "9" * 30, "%31%32"])
async def test_an_operation_that_is_not_there(two: dict[str, Path], name: str) -> None:
    async with box.running(two) as b:
        reply = await b.ask(f"/operations/{name}", method="GET")
    assert (reply.status, reply.error["code"]) == (404, "unknown_operation")


# ---------------------------------------------------------------- to whom


async def switched(b: Box, more: str = "") -> int:
    return (await b.ask("/switch", {"model_id": "chat"}, more=more)).status


@pytest.mark.parametrize(
    "host", ["localhost:9000", "127.0.0.1:9000", "[::1]:9000", "192.168.1.5", "a.localhost"]
)
async def test_the_box_may_be_called_by_its_names(two: dict[str, Path], host: str) -> None:
    async with box.running(two) as b:
        assert await switched(b, f"Host: {host}\r\n") == 200


@pytest.mark.parametrize(
    "more",
    [
        "Host: evil.example\r\n",
        "Host: localhost.evil.example:9000\r\n",
        "Host: 127.0.0.1.evil.example\r\n",
        "Host: [::1].evil.example\r\n",
        "Host: \r\n",
        "Origin: http://evil.example\r\n",
        "Origin: null\r\n",
        "Origin: http://localhost.evil\r\n",
        "Sec-Fetch-Site: cross-site\r\n",
        "X-Forwarded-For: 127.0.0.1\r\n",
        "Forwarded: for=127.0.0.1\r\n",
    ],
)
async def test_no_other_site_and_no_proxy_may_manage(two: dict[str, Path], more: str) -> None:
    async with box.running(two) as b:
        reply = await b.ask("/switch", {"model_id": "chat"}, more=more)
        assert b.scheduler.state.operations == ()
    assert (reply.status, reply.error["code"]) == (403, "forbidden")


async def test_a_page_of_the_box_itself_may_manage(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        more = "Host: localhost:9000\r\nOrigin: http://localhost:9000\r\n"
        assert await switched(b, more + "Sec-Fetch-Site: same-origin\r\n") == 200


async def test_a_rebound_name_can_read_nothing_of_the_box(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        reply = await b.ask("/models", method="GET", more="Host: evil.example\r\n")
    assert reply.status == 403


async def test_an_address_from_elsewhere_may_ask_models_but_not_manage(
    two: dict[str, Path],
) -> None:
    elsewhere = Guard(managers=())
    engine = Engine(two["chat"], saying(answer({"choices": []})))
    async with engine.running(), box.running(two, guard=elsewhere) as b:
        assert await switched(b) == 403
        assert (await b.ask("/health", method="GET")).status == 200
        assert (await b.ask("/v1/models", method="GET")).status == 200
        assert (await b.ask(content={"model": "chat"})).status == 200


async def test_a_defect_is_an_answer_and_a_line_in_the_log(
    two: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    async with box.running(two) as b:

        async def broken(request: object, rest: str) -> None:
            raise KeyError("x")

        b.door.add("/broken", box.http.Path({"GET": broken}))  # type: ignore[dict-item]
        client = await b.connect()
        reply = await client.ask("/broken", method="GET")
        assert (reply.status, reply.error["code"]) == (500, "internal")
        assert (await client.ask("/health", method="GET")).status == 200
    assert "GET /broken failed" in caplog.text


CHUNKED = b"Transfer-Encoding: chunked"


async def test_garbage_hurts_nobody(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        for garbage, wrong in (
            (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
            (b"GET / HTTP/9.9\r\n\r\n", 400),
            (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", 431),
            (b"POST /switch HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}", 400),
            (b"POST /switch HTTP/1.1\r\nContent-Length: 2\r\n" + CHUNKED + b"\r\n\r\n{}", 400),
            (b"GET /health HTTP/1.1\r\nHost: x\r\n folded: 1\r\n\r\n", 400),
        ):
            client = await b.connect()
            client.writer.write(garbage)
            status, _ = await client.head()
            assert status == wrong
        assert (await b.ask("/health", method="GET")).status == 200
