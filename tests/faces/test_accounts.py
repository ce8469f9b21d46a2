"""What is counted of requests, and that counting changes nothing for their clients."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from homegptd.config.keys import Key, digest
from homegptd.core.model import Awake, Draining, FallingAsleep, ModelId, OrderId, SleepLevel
from homegptd.faces import usage
from homegptd.faces.accounts import BOUNDS_S, Account, Accounts, End, Record, Spread
from homegptd.faces.clients import Keyring
from homegptd.faces.guard import Guard
from homegptd.faces.usage import Tokens, asked_for, tokens, without

from . import box
from .box import (
    CHAT,
    DONE,
    END,
    HELLO,
    SSE,
    Asked,
    Engine,
    answer,
    chunk,
    dying_after,
    in_turn,
    saying,
    token,
)

STREAM = HELLO | {"stream": True}
USED = {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5}


def event(content: Any, kind: bytes = b"") -> bytes:
    return chunk(kind + b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n")


LAST = event({"id": "c1", "choices": [], "usage": USED})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock"


def only(b: box.Box) -> Account:
    (account,) = b.accounts.snapshot()
    return account


# ---------------------------------------------------------------- tokens


async def test_a_whole_answer_says_what_it_took(path: Path) -> None:
    said = {"choices": [{"message": {"content": '"usage":{"prompt_tokens":99}'}}], "usage": USED}
    async with Engine(path, saying(answer(said))).running(), box.running({"chat": path}) as b:
        assert (await b.ask(content=HELLO)).json == said
        account = only(b)
    assert (account.model, account.key, account.requests, account.answered) == ("chat", "", 1, 1)
    assert (account.tokens_read, account.tokens_written, account.uncounted) == (7, 5, 0)
    assert account.first_token.count == 0  # not a stream
    assert account.waited.count == 1


@pytest.mark.parametrize("size", [900_000, 3_000_000])
async def test_a_large_answer_too(path: Path, size: int) -> None:
    said = {"data": ["x" * size], "usage": {"prompt_tokens": 3, "total_tokens": 3}}
    async with Engine(path, saying(answer(said))).running(), box.running({"chat": path}) as b:
        assert (await b.ask("/v1/embeddings", HELLO)).json == said
        assert (only(b).tokens_read, only(b).tokens_written, only(b).uncounted) == (3, 0, 0)


PIECES = [SSE, token("a"), token("b", "stop"), LAST, DONE, END]


@pytest.mark.parametrize("step", [1, 7, 100, 100_000])
async def test_a_stream_is_asked_for_its_usage_and_the_client_does_not_see_it(
    path: Path, step: int
) -> None:
    whole = b"".join(PIECES)

    async def script(asked: Asked) -> None:
        assert asked.json == STREAM | {"stream_options": {"include_usage": True}}
        for at in range(0, len(whole), step):
            asked.writer.write(whole[at : at + step])
            await asked.writer.drain()
            await asyncio.sleep(0)

    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        reply = await client.ask(content=STREAM)
        assert reply.complete
        assert len(reply.events) == 3
        assert "usage" not in reply.body.decode()
        assert reply.events[-1] == "[DONE]"
        assert (only(b).tokens_read, only(b).tokens_written) == (7, 5)
        assert (only(b).first_token.count, only(b).uncounted) == (1, 0)


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": False}, None])
async def test_who_says_something_of_it_gets_what_the_engine_sends(
    path: Path, options: object
) -> None:
    asks = STREAM | {"stream_options": options}
    async with (
        Engine(path, saying(*PIECES)).running() as engine,
        box.running({"chat": path}) as b,
    ):
        reply = await b.ask(content=asks)
        assert engine.asked[0].json == asks
        assert json.loads(reply.events[2])["usage"] == USED
        assert only(b).tokens_written == 5


async def test_anthropics_streams_say_it_at_both_ends(path: Path) -> None:
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 0}}}
    delta = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 4}}
    pieces = [event(start, b"event: message_start\n"), event(delta, b"event: message_delta\n"), END]
    async with (
        Engine(path, saying(SSE, *pieces)).running() as engine,
        box.running({"chat": path}) as b,
    ):
        reply = await b.ask("/v1/messages", STREAM)
        assert engine.asked[0].json == STREAM
        assert b"message_delta" in reply.body
        assert (only(b).tokens_read, only(b).tokens_written) == (9, 4)


async def test_what_says_nothing_is_counted_as_that(path: Path) -> None:
    async with Engine(path, saying(answer({"a": 1}))).running(), box.running({"chat": path}) as b:
        await b.ask(content=HELLO)
        assert (only(b).answered, only(b).uncounted) == (1, 1)


async def test_an_old_client_gets_its_stream_as_ever(path: Path) -> None:
    async with (
        Engine(path, saying(SSE, token("a"), DONE, END)).running() as engine,
        box.running({"chat": path}) as b,
    ):
        reply = await b.ask(content=STREAM, version="1.0")
        assert engine.asked[0].json == STREAM
        assert reply.events[-1] == "[DONE]"


# ---------------------------------------------------------------- what became of a request


async def test_each_request_is_counted_once_by_how_it_ended(path: Path) -> None:
    fine = answer({"usage": USED})
    script = in_turn(
        saying(fine),
        saying(SSE, token("a"), token("", "abort"), DONE, END),
        dying_after(SSE),
        saying(fine),
    )
    async with (
        Engine(path, script).running(),
        box.running({"chat": path, "coder": path}, notice_s=0.05) as b,
    ):
        await b.ask(content=HELLO)  # answered
        await b.ask(content=STREAM)  # failed
        await b.ask(content=HELLO)  # sent again, then answered
        await b.ask(content={"model": "nothing"})  # refused
        await b.ask(content=b"{")
        nobody, chat = sorted(b.accounts.snapshot(), key=lambda each: each.model)
    assert (nobody.model, nobody.requests, nobody.refused) == ("", 2, 2)
    assert (chat.requests, chat.answered, chat.failed, chat.retried) == (3, 2, 1, 1)
    assert (chat.refused, chat.aborted, chat.tokens_written) == (0, 0, 10)


async def test_a_client_that_leaves_is_counted_as_that(path: Path) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await asked.hung_up()

    async with Engine(path, script).running(), box.running({"chat": path}) as b:
        client = await b.connect()
        client.send(content=STREAM)
        await client.head()
        client.hang_up()
        await b.until(lambda: b.leases() == 0)
        await b.until(lambda: bool(b.accounts.snapshot()))
        assert (only(b).aborted, only(b).answered, only(b).first_token.count) == (1, 0, 1)


async def test_keys_have_accounts_of_their_own(path: Path) -> None:
    keys = Keyring([Key("one", digest("hg-1")), Key("two", digest("hg-2"))])
    async with (
        Engine(path, saying(answer({"usage": USED}))).running(),
        box.running({"chat": path}, guard=Guard(keys=keys)) as b,
    ):
        for secret in ("hg-1", "hg-2", "hg-1"):
            await b.ask(content=HELLO, more=f"x-api-key: {secret}\r\n")
        await b.ask(content=HELLO)  # a stranger has no account
        counted = {each.key: each.requests for each in b.accounts.snapshot()}
        told = (await b.desk.status())["accounts"]
    assert counted == {"one": 2, "two": 1}
    assert [(each["key"], each["tokens_read"]) for each in told] == [("one", 14), ("two", 7)]


async def test_a_frozen_answer_is_counted_once(path: Path) -> None:
    now = asyncio.get_running_loop().time()
    accounts, record = Accounts(), Record("")
    record.model, record.end = "chat", End.ANSWERED
    async with box.running({"chat": path}) as b:
        state = b.scheduler.state
        engine = state.engines[ModelId("chat")]
        ticket = box.core.TicketId(7)
        record.granted(ticket, 0.0)
        for phase in (
            Awake(now),
            FallingAsleep(OrderId(1), now, SleepLevel.ONE, frozenset({ticket})),
            FallingAsleep(OrderId(3), now, SleepLevel.ONE, frozenset({ticket})),
            Draining(Awake(now), frozenset({ticket}), now, now),
        ):
            told = box.core.State({ModelId("chat"): replace(engine, phase=phase)})
            accounts.note_frozen(told)
    for _ in range(2):
        accounts.close(record)
    assert [each.frozen for each in accounts.snapshot()] == [1]


def test_a_snapshot_stays_as_it_was() -> None:
    accounts, record = Accounts(), Record("k")
    record.granted(box.core.TicketId(1), 0.3)
    accounts.close(record)
    (before,) = accounts.snapshot()
    accounts.close(record)
    assert (before.requests, before.waited.count) == (1, 1)
    assert accounts.snapshot()[0].waited.count == 2


def test_a_spread_counts_by_upper_bound() -> None:
    spread = Spread()
    for seconds in (0.0, BOUNDS_S[0], BOUNDS_S[0] * 1.01, 1e9):
        spread.add(seconds)
    assert (spread.counts[:2], spread.counts[-1], spread.count) == ([2, 1], 1, 4)


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}', (1, 2)),
        (b'"usage": {"input_tokens": 3, "output_tokens_details": {"x_tokens": 9}}', (3, None)),
        (b'"usage":{"input_tokens":3,"input_tokens_details":{"cached_tokens":2},'
         b'"output_tokens":4}', (3, 4)),
        (b'"usage":null', (None, None)),
        (b'{"usage":{"prompt_tokens":1},"x":1}\n{"usage":{"prompt_tokens":2}}', (2, None)),
        (b'{"content":"\\"usage\\":{\\"prompt_tokens\\":1}"}', (None, None)),
        (b"", (None, None)),
    ],
)  # fmt: skip
def test_counts_are_found_by_their_names(said: bytes, found: Tokens) -> None:
    assert tokens(said) == found


@pytest.mark.parametrize("body", [b"{}", b"[]", b"", b" ", b'{"stream_options":{}}', b"{ 1"])
def test_a_body_that_is_left_alone(body: bytes) -> None:
    assert asked_for(body) is None


def test_a_large_body_is_not_copied() -> None:
    assert asked_for(b'{"a":"' + b"x" * (usage._MOST_BODY + 1) + b'"}') is None


@given(st.dictionaries(st.text(), st.integers() | st.text(), min_size=1), st.integers(0, 3))
def test_asking_adds_one_key_and_nothing_else(content: dict[str, object], indent: int) -> None:
    body = json.dumps(content, indent=indent or None).encode()
    asked = asked_for(body)
    if asked is not None:
        assert json.loads(asked) == {"stream_options": {"include_usage": True}} | content


@given(
    st.lists(st.sampled_from([token("a"), token('"usage":{'), DONE, END]), max_size=4),
    st.lists(st.sampled_from([token("b", "stop"), DONE, END]), max_size=3),
)
def test_exactly_the_usage_event_is_taken_out(before: list[bytes], after: list[bytes]) -> None:
    first, rest = b"".join(before), b"".join(after)
    assert without(first + LAST + rest) == first + rest


@pytest.mark.parametrize(
    "data",
    [
        event({"choices": [{"delta": {}}], "usage": USED}),  # a token with its count
        LAST[:-2],
        LAST[5:],
        b"1\r\n" + LAST.partition(b"\r\n")[2],  # not its length
        token("a"),
        b"",
    ],
)
def test_what_is_not_exactly_that_stays(data: bytes) -> None:
    assert without(data) == data


async def test_status_has_the_accounts(path: Path) -> None:
    async with Engine(path, saying(*PIECES)).running(), box.running({"chat": path}) as b:
        await b.ask(CHAT, STREAM)
        (told,) = (await b.desk.status())["accounts"]
    assert told["first_token_s"] is not None
    assert told["first_token_s"] >= 0
    assert (told["tokens_read"], told["tokens_written"]) == (7, 5)


def test_answers_that_came_at_once_are_counted_together_and_soon() -> None:
    accounts, model = Accounts(), ModelId("a")
    small = b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    large = small.ljust(10_000)
    for number in range(1, 101):
        accounts.close_at_once(model, "", small)
        assert len(accounts._later) < 40
        if number % 7 == 0:
            [account] = accounts.snapshot()
            assert (account.requests, account.answered, account.waited.count) == (number,) * 3
    accounts.close_at_once(model, "", b"{}")
    accounts.close_at_once(model, "", large)
    assert accounts._later == []
    [account] = accounts.snapshot()
    assert (account.tokens_read, account.tokens_written, account.uncounted) == (303, 202, 1)
