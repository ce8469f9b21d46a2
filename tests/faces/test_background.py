"""Responses in the background hold their engine, and how they ended can be asked for ever after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homegptd.config.keys import Key, digest
from homegptd.core.model import Act, Awake, Draining, ModelId, OnDeadline, Policy
from homegptd.faces import background
from homegptd.faces.accounts import Account
from homegptd.faces.ask import Limits
from homegptd.faces.clients import Keyring
from homegptd.faces.guard import Guard
from homegptd.faces.stored import Stored

from . import box
from .box import END, SSE, Asked, Engine, Reply, answer, chunk

PATH = "/v1/responses"
ASK = {"model": "chat", "input": "x", "background": True}
CREATED = (
    b'event: response.created\ndata: {"response":{"id":"resp_1","object":"response"},'
    b'"sequence_number":0,"type":"response.created"}\n\n'
)


class Maker:
    """An engine that makes one response, until the test says how it ended."""

    def __init__(self) -> None:
        self.status = "queued"
        self.output = ["hello"]
        self.mute = False
        self.cancelled = False
        self.looks = 0
        self.looked = asyncio.Event()

    @property
    def body(self) -> dict[str, Any]:
        used = {"input_tokens": 3, "output_tokens": 4}
        ended = self.status in ("completed", "incomplete")
        told = {"id": "resp_1", "status": self.status, "usage": used if ended else None}
        return told | {"output": self.output if ended else []}

    async def __call__(self, given: Asked) -> None:
        method, path = given.line.split(" ")[:2]
        if method == "GET":
            self.looks += 1
            self.looked.set()
            if self.mute:
                await given.hung_up()
            elif "stream=true" in path:
                given.writer.write(SSE + chunk(CREATED))
            elif self.status == "unknown":
                given.writer.write(answer({"error": {"message": "no"}}, "404 Not Found"))
            else:
                given.writer.write(self.said(self.body))
        elif path.endswith("/cancel"):
            self.cancelled = True
            if self.status == "queued":
                self.status = "cancelled"
            given.writer.write(self.said(self.body))
        elif given.json.get("stream"):
            given.writer.write(SSE + chunk(CREATED))
        elif given.json.get("background"):
            given.writer.write(self.said(self.body))
        else:
            given.writer.write(answer({"id": "resp_2", "status": "completed"}))

    def said(self, content: dict[str, Any]) -> bytes:
        return answer(json.dumps(content, separators=(",", ":")).encode())

    async def is_looked_at(self) -> None:
        async with asyncio.timeout(5):
            self.looked.clear()
            await self.looked.wait()


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_OFTEN_S", 0.02)


@asynccontextmanager
async def running(tmp_path: Path, maker: Maker, **more: Any) -> AsyncIterator[box.Box]:
    engine = Engine(tmp_path / "chat", maker)
    paths = {"chat": engine.path, "coder": tmp_path / "coder"}
    async with engine.running(), box.running(paths, **more) as b:
        yield b


@pytest.fixture
async def b(tmp_path: Path, maker: Maker) -> AsyncIterator[box.Box]:
    async with running(tmp_path, maker) as b:
        yield b


async def get(b: box.Box, query: str = "") -> Reply:
    return await b.ask(f"{PATH}/resp_1{query}", method="GET")


async def until_kept(b: box.Box) -> Reply:
    """Until its lease is over, so that what is asked for is what was kept."""
    await b.until(lambda: b.leases() == 0)
    return await get(b)


def account(b: box.Box) -> Account:
    return next(each for each in b.accounts.snapshot() if each.tokens_read or each.failed)


async def test_the_engine_counts_as_answering_until_it_has_made_it(
    b: box.Box, maker: Maker
) -> None:
    reply = await b.ask(PATH, ASK)
    assert (reply.status, reply.json["status"]) == (200, "queued")
    assert b.leases() == 1
    assert (await get(b)).json["status"] == "queued"
    await maker.is_looked_at()
    assert b.leases() == 1
    maker.status = "completed"
    assert (await until_kept(b)).json["output"] == ["hello"]
    found = account(b)
    assert (found.requests, found.answered, found.uncounted) == (4 - 1, 3, 2)
    assert (found.tokens_read, found.tokens_written) == (3, 4)


async def test_a_response_that_is_not_made_in_the_background_holds_nothing(
    b: box.Box, maker: Maker
) -> None:
    for content in (ASK | {"background": False}, ASK | {"background": None}):
        assert (await b.ask(PATH, content)).status == 200
    assert (b.leases(), maker.looks) == (0, 0)


async def test_what_its_engine_does_not_know_holds_nothing(b: box.Box, maker: Maker) -> None:
    maker.status = "unknown"
    await b.ask(PATH, ASK)
    await b.until(lambda: b.leases() == 0)
    assert [each.answered for each in b.accounts.snapshot()] == [1]


async def test_a_drain_waits_for_it(b: box.Box, maker: Maker) -> None:
    await b.ask(PATH, ASK)
    b.desk.begin(Act.SLEEP, "chat", by="test")
    assert isinstance(b.phase(), Draining)
    await maker.is_looked_at()
    assert (await get(b)).json["status"] == "queued"  # not 409
    assert isinstance(b.phase(), Draining)
    maker.status = "completed"
    await b.until(lambda: not isinstance(b.phase(), Draining))
    assert (await get(b)).json["status"] == "completed"


async def test_it_is_frozen_as_a_stream_is_and_can_be_asked_for_and_cancelled(
    tmp_path: Path, maker: Maker
) -> None:
    freezing = Policy(drain_s=0.0, on_deadline=OnDeadline.FREEZE)
    async with running(tmp_path, maker, policy=freezing) as b:
        await b.ask(PATH, ASK)
        b.desk.begin(Act.SLEEP, "chat", by="test")
        await b.until(lambda: not isinstance(b.phase(), Awake | Draining))
        assert b.leases() == 1
        assert (await get(b)).json["status"] == "queued"
        cancelled = await b.ask(f"{PATH}/resp_1/cancel", b"")
        assert cancelled.json["status"] == "cancelled"
        assert (await until_kept(b)).json["status"] == "cancelled"
    assert [(a.aborted, a.failed) for a in b.accounts.snapshot()] == [(1, 0)]


async def test_time_spent_frozen_does_not_count(tmp_path: Path, maker: Maker) -> None:
    freezing = Policy(drain_s=0.0, on_deadline=OnDeadline.FREEZE, max_answer_s=0.8)
    limits = Limits(first_byte_s=0.1)
    async with running(tmp_path, maker, policy=freezing, limits=limits) as b:
        await b.ask(PATH, ASK)
        b.desk.begin(Act.SLEEP, "chat", by="test")
        await b.until(lambda: not isinstance(b.phase(), Awake | Draining))
        for _ in range(10):
            await maker.is_looked_at()
            await asyncio.sleep(0.1)
        assert not maker.cancelled


async def test_what_is_cut_is_cancelled_at_its_engine(tmp_path: Path, maker: Maker) -> None:
    async with running(tmp_path, maker) as b:
        await b.ask(PATH, ASK)
        await maker.is_looked_at()
        b.desk.begin(Act.SLEEP, "chat", by="test", cut=True)
        told = (await until_kept(b)).json
        assert maker.cancelled
        assert (told["id"], told["status"]) == ("resp_1", "cancelled")
        assert "an operator asked for it now" in told["error"]["message"]
    assert account(b).failed == 1


async def test_what_has_ended_before_it_was_cut_is_whole(b: box.Box, maker: Maker) -> None:
    await b.ask(PATH, ASK)
    maker.status = "completed"
    b.desk.begin(Act.SLEEP, "chat", by="test", cut=True)
    told = (await until_kept(b)).json
    assert (told["status"], "error" in told) == ("completed", False)


async def test_it_ends_with_its_engine_and_says_so(b: box.Box, maker: Maker) -> None:
    await b.ask(PATH, ASK)
    await maker.is_looked_at()
    b.died("chat")
    told = (await until_kept(b)).json
    assert (told["status"], told["error"]["message"]) == (
        "failed", 'the engine of "chat" was lost',
    )  # fmt: skip
    await b.until(lambda: b.scheduler.state.engines[ModelId("chat")].incarnation == 1)
    assert (await get(b)).json["status"] == "failed"
    assert (await b.ask(f"{PATH}/resp_1/cancel", b"")).status == 404


async def test_one_that_never_ends_is_given_up(tmp_path: Path, maker: Maker) -> None:
    """vLLM forgets some that fail: "queued" for ever."""
    short, limits = Policy(max_answer_s=0.2), Limits(first_byte_s=0.1)
    async with running(tmp_path, maker, policy=short, limits=limits) as b:
        await b.ask(PATH, ASK)
        told = (await until_kept(b)).json
        assert maker.cancelled
        assert (told["status"], "took more than" in told["error"]["message"]) == (
            "cancelled", True,
        )  # fmt: skip


async def test_an_engine_that_does_not_say_is_asked_again(
    b: box.Box, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_LOOK_S", 0.05)
    await b.ask(PATH, ASK)
    maker.mute = True
    for _ in range(3):
        await maker.is_looked_at()
    assert b.leases() == 1
    maker.mute, maker.status = False, "completed"
    assert (await until_kept(b)).json["status"] == "completed"


async def test_a_stream_is_made_to_its_end_without_its_client(b: box.Box, maker: Maker) -> None:
    client = await b.connect()
    client.send(PATH, ASK | {"stream": True})
    await client.reader.readuntil(b"resp_1")
    client.hang_up()
    for _ in range(3):
        await maker.is_looked_at()
    assert b.leases() == 1
    maker.status = "completed"
    assert (await until_kept(b)).json["status"] == "completed"
    assert account(b).answered >= 1


async def test_streams_of_a_cancelled_response_end(b: box.Box, maker: Maker) -> None:
    """vLLM's own never do."""
    first, second = await b.connect(), await b.connect()
    first.send(PATH, ASK | {"stream": True})
    await first.reader.readuntil(b"resp_1")
    second.send(f"{PATH}/resp_1?stream=true", method="GET")
    await second.reader.readuntil(b"resp_1")
    await b.ask(f"{PATH}/resp_1/cancel", b"")
    for client in (first, second):
        assert b"event: error" in await client.reader.readuntil(END)
    assert (await until_kept(b)).json["status"] == "cancelled"


async def test_a_stop_of_the_daemon_cancels_it(b: box.Box, maker: Maker) -> None:
    await b.ask(PATH, ASK)
    b.scheduler.cut_all("homeGPT is stopping")
    await b.scheduler.idle()
    assert maker.cancelled


async def test_an_id_that_is_given_anew_is_asked_of_its_engine(b: box.Box, maker: Maker) -> None:
    await b.ask(PATH, ASK)
    maker.status = "completed"
    assert (await until_kept(b)).json["status"] == "completed"
    maker.status = "queued"
    await b.ask(PATH, ASK)
    assert (await get(b)).json["status"] == "queued"
    maker.status = "incomplete"
    assert (await until_kept(b)).json["status"] == "incomplete"


@pytest.mark.parametrize("restarted", [False, True])
async def test_an_id_stays_that_of_the_model_which_gave_it_first(
    tmp_path: Path, maker: Maker, restarted: bool
) -> None:
    """A client can ask for any id."""
    other = Maker()
    other.output = ["not yours"]
    async with running(tmp_path, maker) as b, Engine(tmp_path / "coder", other).running():
        await b.ask(PATH, ASK)
        maker.status = other.status = "completed"
        assert (await until_kept(b)).json["output"] == ["hello"]
        if restarted:
            b.died("chat")
        assert (await b.ask(PATH, ASK | {"model": "coder"})).status == 200
        await b.until(lambda: b.leases("coder") == 0)
        assert (await get(b)).json["output"] == ["hello"]


def test_what_is_kept_is_bounded() -> None:
    kept, chat = Stored(most_bytes=100), ModelId("chat")
    for ident in ("a", "b", "a", "c"):
        kept.keep(ident, chat, b"x" * 40)
    assert [kept.ended(ident) is not None for ident in "abc"] == [True, False, True]
    kept.keep("d", chat, b"x" * 101)
    assert [kept.ended(ident) for ident in "acd"] == [None] * 3
    kept.keep("e", chat, b"x" * 100)
    assert kept.ended("e") == (chat, b"x" * 100)


@asynccontextmanager
async def with_key(tmp_path: Path, maker: Maker, most: int) -> AsyncIterator[tuple[box.Box, str]]:
    key = Key("one", digest("hg-one"), concurrency=most)
    async with running(tmp_path, maker, guard=Guard(keys=Keyring([key]))) as b:
        yield b, "Authorization: Bearer hg-one\r\n"


async def test_it_counts_for_the_key_that_asked(tmp_path: Path, maker: Maker) -> None:
    async with with_key(tmp_path, maker, 1) as (b, bearer):
        assert (await b.ask(PATH, ASK, more=bearer)).status == 200
        await maker.is_looked_at()
        assert (await b.ask(PATH, ASK, more=bearer)).status == 429
        maker.status = "completed"
        await b.until(lambda: b.leases() == 0)
        assert (await b.ask(PATH, ASK, more=bearer)).status == 200


async def test_who_may_have_one_under_way_may_ask_for_it_and_cancel_it(
    tmp_path: Path, maker: Maker
) -> None:
    async with with_key(tmp_path, maker, 1) as (b, bearer):
        assert (await b.ask(PATH, ASK, more=bearer)).status == 200
        await maker.is_looked_at()
        asked = await b.ask(f"{PATH}/resp_1", method="GET", more=bearer)
        assert (asked.status, asked.json["status"]) == (200, "queued")
        assert (await b.ask(f"{PATH}/resp_1/cancel", b"", more=bearer)).status == 200


async def test_a_stream_of_it_counts_once(tmp_path: Path, maker: Maker) -> None:
    async with with_key(tmp_path, maker, 2) as (b, bearer):
        client = await b.connect()
        client.send(PATH, ASK | {"stream": True}, more=bearer)
        await client.reader.readuntil(b"resp_1")
        await maker.is_looked_at()
        other = ASK | {"background": False}
        assert (await b.ask(PATH, other, more=bearer)).status == 200
        client.hang_up()
        await maker.is_looked_at()
        assert (await b.ask(PATH, other, more=bearer)).status == 200
        maker.status = "completed"
        await b.until(lambda: b.leases() == 0)
        assert (await b.ask(PATH, ASK, more=bearer)).status == 200
