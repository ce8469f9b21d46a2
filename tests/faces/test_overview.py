"""The box at one glance over HTTP: status, memory, plans, and events as they happen."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from homegptd.config.keys import Key, digest
from homegptd.core.events import ShutdownAsked
from homegptd.core.model import Asleep, Down, ModelId, SleepLevel
from homegptd.faces import http, overview, sight
from homegptd.faces.clients import Keyring
from homegptd.faces.guard import Guard

from . import box

SECRET = "hg-the-secret-of-somebody"
LOOKS = ["/status", "/memory", "/plan/chat", "/events"]
GET: dict[str, Any] = {"method": "GET"}


def asleep() -> Asleep:
    return Asleep(SleepLevel.ONE, asyncio.get_running_loop().time())


def ring(**rights: Any) -> Guard:
    return Guard(keys=Keyring([Key("somebody", digest(SECRET), **rights)]))


def only_chat(**rights: Any) -> Guard:
    return ring(models=frozenset({ModelId("chat")}), **rights)


def bearer(secret: str = SECRET) -> dict[str, Any]:
    return {"method": "GET", "more": f"Authorization: Bearer {secret}\r\n"}


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Path]:
    return {"chat": tmp_path / "chat", "coder": tmp_path / "coder"}


# ---------------------------------------------------------------- who sees what


@pytest.mark.parametrize("path", LOOKS)
async def test_what_it_shows_is_guarded(two: dict[str, Path], path: str) -> None:
    async with box.running(two, guard=ring()) as b:
        assert (await b.ask(path, **GET)).status == 401
        assert (await b.ask(path, **bearer("hg-wrong"))).status == 401
    async with box.running(two) as b:
        for more in ("Host: evil.example\r\n", "Origin: http://evil.example\r\n"):
            assert (await b.ask(path, method="GET", more=more)).status == 403
        head = await b.ask(path, method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["cache-control"] == "no-store"


async def test_a_model_s_own_door_has_none_of_it(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        single = http.build_model_door(
            ModelId("chat"), scheduler=b.scheduler, desk=b.desk, addresses=lambda m: ""
        )
        assert not {"/", "/status", "/memory", "/plan/", "/events"} & set(single.paths)
        single.close()


async def test_status_says_what_the_client_may_do(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        told = (await b.ask("/status", **GET)).json
        assert told["you"] == {"key": None, "manage": True}
        assert "accounts" not in told
        proxied = await b.ask("/status", method="GET", more="X-Forwarded-For: 192.0.2.1\r\n")
        assert proxied.json["you"] == {"key": None, "manage": False}
    for manage in (True, False):
        async with box.running(two, guard=ring(manage=manage)) as b:
            told = (await b.ask("/status", **bearer())).json
            assert told["you"] == {"key": "somebody", "manage": manage}


async def test_the_bars_add_up(two: dict[str, Path]) -> None:
    async with box.running(two, phases={"coder": asleep()}) as b:
        told = (await b.ask("/status", **GET)).json
    (gpu,), host = told["gpus"], told["host"]
    assert [(each["model"], each["what"]) for each in gpu["held"]] == [
        ("chat", "awake"), ("coder", "residue"),
    ]  # fmt: skip
    assert {each["what"] for each in host["held"]} == {"host", "pinned"}
    for place in (gpu, host):
        held = sum(each["mib"] for each in place["held"])
        assert held == place["used_mib"] + place.get("reserved_mib", 0)
        assert held + place["foreign_mib"] + place["free_mib"] == place["total_mib"]


async def test_a_limited_key_hears_of_no_other_model(two: dict[str, Path]) -> None:
    """Not by a model's reasons, a plan's steps and sums, an operation's steps, or the bars."""
    coder_first = box.core.Policy(default=ModelId("coder"))
    async with box.running(
        two,
        guard=only_chat(manage=True),
        phases={"chat": asleep()},
        awake_mib=900_000,
        policy=coder_first,
    ) as b:
        b.hands.sleeps = True
        answers = {path: await b.ask(path, **bearer()) for path in LOOKS[:3]}
        assert [each["do"] for each in answers["/plan/chat"].json["steps"]] == ["sleep", "wake"]
        client = await b.connect()
        client.send("/switch", {"model_id": "chat"}, more=bearer()["more"])
        answers["/switch"] = await client.reply()
        answers["/operations/1"] = await b.ask("/operations/1", **bearer())
        answers["/models"] = await b.ask("/models", **bearer())
        for model in ("coder", "none"):
            refused = await b.ask(f"/plan/{model}", **bearer())
            assert (refused.status, "coder" in refused.body.decode()) == (404, model == "coder")
    for path, answer in answers.items():
        assert answer.status == 200, path
        assert "coder" not in answer.body.decode(), path
    assert [each["id"] for each in answers["/status"].json["models"]] == ["chat"]
    assert answers["/status"].json["default"] is None
    assert [each["id"] for each in answers["/memory"].json["models"]] == ["chat"]
    assert {each["model"] for each in answers["/status"].json["gpus"][0]["held"]} == {
        "chat", sight.OTHER,
    }  # fmt: skip


# ---------------------------------------------------------------- plans


async def test_a_plan_has_its_steps_and_the_sum(two: dict[str, Path]) -> None:
    async with box.running(two, phases={"coder": asleep()}) as b:
        plan = (await b.ask("/plan/coder", **GET)).json
        same = (await b.ask("/plan/c%6fder", **GET)).json
        alias = (await b.ask("/plan/talk", **GET)).json
        assert plan == await b.desk.plan("coder")
    assert plan["fits"] is True
    assert [(each["do"], each["model"]) for each in plan["steps"]] == [("wake", "coder")]
    assert any("to spare" in line for line in plan["sum"])
    assert (same["model"], alias["model"]) == ("coder", "chat")


async def test_a_refusal_shows_its_sum(two: dict[str, Path]) -> None:
    now = asyncio.get_running_loop().time()
    async with box.running(two, phases={"coder": Down(now)}, awake_mib=2 << 20) as b:
        plan = (await b.ask("/plan/coder", **GET)).json
    assert (plan["fits"], plan["steps"]) == (False, [])
    assert plan["sum"][0].startswith("needs 2048.0 GB on gpu0; 1024.0 total")


async def test_no_plan_for_an_unknown_model_but_the_near_one(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        refused = await b.ask("/plan/coderr", **GET)
        assert (refused.status, refused.error["code"]) == (404, "model_not_found")
        assert "did you mean coder" in refused.error["message"]
        assert (await b.ask("/plan/", **GET)).status == 404


# ---------------------------------------------------------------- events


async def event(client: box.Client) -> list[tuple[str, Any]]:
    """The next chunk: one or more events, or none for a comment."""
    async with asyncio.timeout(5):
        size = int(await client.reader.readuntil(b"\r\n"), 16)
        text = (await client.reader.readexactly(size + 2)).decode()[:-2]
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("event")]
    return [(kind[7:], json.loads(data[6:])) for kind, data in blocks]


async def listening(b: box.Box, more: str = "") -> box.Client:
    client = await b.connect()
    client.send("/events", method="GET", more=more)
    status, headers = await client.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    return client


async def test_events_begin_with_the_status_and_go_on_with_the_story(two: dict[str, Path]) -> None:
    async with box.running(two, phases={"coder": asleep()}) as b:
        client = await listening(b)
        ((kind, first),) = await event(client)
        assert kind == "status"
        asked = (await b.ask("/status", **GET)).json
        assert {**first, "now": 0, "models": 0} == {**asked, "now": 0, "models": 0}
        b.scheduler.operate(box.core.Act.WAKE, ModelId("coder"), by="a test")
        *story, (kind, then) = await event(client)
        assert {name for name, _ in story} == {"story"}
        told = [line["message"] for _, line in story]
        assert "a test asks to wake coder (operation 1)" in told
        assert {line["level"] for _, line in story} == {"info"}
        assert kind == "status"
        assert [each["phase"] for each in then["models"]] == ["awake", "awake"]
        late = await listening(b)  # hears what was told before
        assert [line["message"] for _, line in (await event(late))[:-1]] == told


async def test_requests_that_come_and_go_have_no_story_and_are_told(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        client = await listening(b)
        await event(client)
        async with b.scheduler.lease(ModelId("chat"), freezable=True):
            ((_, then),) = await event(client)
            assert then["models"][0]["requests"]["running"] == 1


async def test_a_quiet_stream_shows_that_it_lives(
    two: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "_QUIET_S", 0.0)
    async with box.running(two) as b:
        client = await listening(b)
        await event(client)
        assert await event(client) == []


async def test_a_limited_key_hears_the_story_of_its_models_alone(two: dict[str, Path]) -> None:
    async with box.running(two, guard=only_chat(), phases={"coder": asleep()}) as b:
        client = await listening(b, bearer()["more"])
        await event(client)
        b.scheduler.operate(box.core.Act.WAKE, ModelId("coder"), by="a test")
        b.died("chat")
        seen = await event(client)
        assert all(line["model"] == "chat" for kind, line in seen if kind == "story")
        assert any(kind == "story" for kind, _ in seen)
        assert "coder" not in json.dumps(seen)


async def test_only_so_many_listen(two: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "_MOST", 1)
    async with box.running(two) as b:
        client = await listening(b)
        refused = await b.ask("/events", **GET)
        assert (refused.status, refused.headers["retry-after"]) == (429, "2")
        client.hang_up()
        await b.until(lambda: b.clients_served() == 1)  # the one that was refused
        assert (await b.ask("/events", method="HEAD")).status == 200


async def test_the_stream_ends_with_the_right_to_it(two: dict[str, Path]) -> None:
    async with box.running(two, guard=ring()) as b:
        client = await listening(b, bearer()["more"])
        await event(client)
        b.door.guard = Guard(keys=Keyring())
        b.scheduler.operate(box.core.Act.SLEEP, ModelId("chat"), by="a test")
        async with asyncio.timeout(5):
            assert (await client.reader.readuntil(b"\r\n\r\n")) == b"0\r\n\r\n"


async def test_the_stream_does_not_keep_the_daemon_from_leaving(two: dict[str, Path]) -> None:
    async with box.running(two) as b:
        client = await listening(b)
        await event(client)
        b.scheduler.post(ShutdownAsked())
        *_, (_, last) = await event(client)
        assert last["phase_of_daemon"] == "stopping"
        async with asyncio.timeout(5):
            assert (await client.reader.readuntil(b"\r\n\r\n")) == b"0\r\n\r\n"


async def test_who_does_not_read_is_let_go(
    two: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "STUCK_S", 0.05)
    async with box.running(two) as b:
        long = "x" * 400_000
        monkeypatch.setattr(b.desk, "story", lambda heard=0: ([told(long)] * 40, 40))
        client = await b.connect(limit=1 << 16)
        client.send("/events", method="GET")
        async with asyncio.timeout(5):
            await b.until(lambda: not b.clients_served())


def told(message: str) -> dict[str, Any]:
    return {"time": 0.0, "level": "info", "kind": "told", "model": None, "message": message,
            "fields": {}}  # fmt: skip
