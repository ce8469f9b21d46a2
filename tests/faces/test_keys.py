"""Keys and web pages: who comes in over HTTP, and what is there for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from homegptd.config.keys import Key, digest
from homegptd.core.model import Act, Asleep, Down, ModelId, SleepLevel
from homegptd.faces import errors
from homegptd.faces.clients import Keyring
from homegptd.faces.early import Early
from homegptd.faces.guard import Guard
from homegptd.faces.routes import ROUTES, Route, Where

from . import box
from .box import (
    CHAT,
    END,
    HELLO,
    SSE,
    STREAM,
    Asked,
    Client,
    Engine,
    answer,
    in_turn,
    saying,
    token,
)

SECRET = "hg-the-secret-of-somebody"
TO_CODER = {"model_id": "coder"}
GET = {"method": "GET"}


def key(secret: str = SECRET, name: str = "somebody", **more: object) -> Key:
    return Key(name, digest(secret), **more)  # type: ignore[arg-type]


def ring(*keys: Key) -> Guard:
    return Guard(keys=Keyring(keys))


def bearer(secret: str = SECRET) -> str:
    return f"Authorization: Bearer {secret}\r\n"


async def echo(asked: Asked) -> None:
    asked.writer.write(answer({"headers": asked.headers, "asked": asked.json}))


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[dict[str, Path]]:
    one, other = Engine(tmp_path / "chat", echo), Engine(tmp_path / "coder", echo)
    async with one.running(), other.running():
        yield {"chat": one.path, "coder": other.path}


# ---------------------------------------------------------------- with keys


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
async def test_every_route_wants_a_key_before_it_reads(two: dict[str, Path], route: Route) -> None:
    path = route.path.replace("{id}", "resp_1")
    async with box.running(two, guard=ring(key())) as b:
        client = await b.connect()
        head = f"{route.method} {path} HTTP/1.1\r\nHost: localhost\r\n"
        client.writer.write(f"{head}Content-Length: 10000000\r\n\r\n".encode())
        status, headers = await client.head()  # nothing of the body was sent
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert headers["x-should-retry"] == "false"
        let_in = await b.ask(path, HELLO, method=route.method, more=bearer())
        assert let_in.status == {
            Where.BODY: 200, Where.FORM: 415, Where.STORED: 404, Where.SESSION: 426
        }[route.where]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "method"),
    [("/models", "GET"), ("/v1/models", "GET"), ("/v1/models/chat", "GET"), ("/switch", "POST"),
     ("/operations/1", "GET")],
)  # fmt: skip
async def test_the_box_is_shown_to_nobody_without_a_key(
    two: dict[str, Path], path: str, method: str
) -> None:
    async with box.running(two, guard=ring(key(manage=True))) as b:
        reply = await b.ask(path, TO_CODER, method=method)
        assert (reply.status, reply.error["code"]) == (401, "unauthorized")
        assert (await b.ask(path, TO_CODER, method=method, more=bearer())).status != 401


@pytest.mark.parametrize(
    "more",
    [bearer(), f"authorization: bearer  {SECRET}\r\n", f"x-api-key: {SECRET}\r\n",
     f"Authorization: Bearer other\r\nx-api-key: {SECRET}\r\n"],
)  # fmt: skip
async def test_a_key_is_shown_either_way(two: dict[str, Path], more: str) -> None:
    async with box.running(two, guard=ring(key("another", "other"), key())) as b:
        assert (await b.ask(content=HELLO, more=more)).status == 200


@pytest.mark.parametrize(
    "more",
    ["", bearer("hg-wrong"), bearer(SECRET + "x"), bearer(SECRET[:-1]), bearer("x" * 7000),
     f"Authorization: Basic {SECRET}\r\n", f"Authorization: {SECRET}\r\n", "x-api-key: \r\n",
     bearer("\u00fc\u20ac"), bearer(digest(SECRET).hex())],
)  # fmt: skip
async def test_what_is_not_a_key_is_401(two: dict[str, Path], more: str) -> None:
    async with box.running(two, guard=ring(key())) as b:
        client = await b.connect()
        reply = await client.ask(content=HELLO, more=more)
        assert (reply.status, reply.error["type"]) == (401, "authentication_error")


async def test_anthropics_clients_hear_of_it_in_their_words(two: dict[str, Path]) -> None:
    async with box.running(two, guard=ring(key())) as b:
        reply = await b.ask("/v1/messages", HELLO)
    assert reply.json["type"] == "error"
    assert reply.error["type"] == "authentication_error"


async def test_no_key_at_all_lets_nobody_in(two: dict[str, Path]) -> None:
    async with box.running(two, guard=ring()) as b:
        assert (await b.ask(content=HELLO, more=bearer())).status == 401


async def test_strangers_see_of_health_only_whether(two: dict[str, Path]) -> None:
    async with box.running(two, guard=ring(key(models=frozenset({"chat"})))) as b:
        assert (await b.ask("/health", **GET)).json == {"status": "ok", "phase": "ready"}
        known = (await b.ask("/health", **GET, more=bearer())).json
    assert known["models"] == {"chat": "active"}
    assert "coder" not in str(known)


async def test_a_key_stays_at_the_door(
    two: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with box.running(two, guard=ring(key())) as b:
            for more in (bearer(), f"x-api-key: {SECRET}\r\n"):
                reply = await b.ask(content=HELLO, more=more)
                assert SECRET not in reply.body.decode()
                assert "authorization" not in reply.json["headers"]
            await b.ask(content={"model": SECRET}, more=bearer("hg-wrong"))
    assert SECRET not in caplog.text
    assert "hg-wrong" not in caplog.text


async def test_the_engines_own_key_is_added(two: dict[str, Path]) -> None:
    own = {"chat": "engines-own"}
    async with box.running(two, guard=ring(key()), engine_keys=own.get) as b:
        asked = (await b.ask(content=HELLO, more=bearer())).json
        assert asked["headers"]["authorization"] == "Bearer engines-own"
        other = await b.ask(content={"model": "coder"}, more=bearer())
        assert "authorization" not in other.json["headers"]


# ---------------------------------------------------------------- what a key allows


async def test_models_that_a_key_may_not_use_are_not_there(two: dict[str, Path]) -> None:
    async with box.running(two, guard=ring(key(models=frozenset({"coder"})))) as b:

        async def ask(path: str = CHAT, content: object = None, **how: str) -> box.Reply:
            return await b.ask(path, content, **how, more=bearer())

        assert (await ask(content={"model": "coder"})).status == 200
        for name in ("chat", "talk", "lab/Chat-7B", "cha"):
            reply = await ask(content={"model": name})
            assert (reply.status, reply.error["code"]) == (404, "model_not_found")
            assert "chat" not in reply.error["message"].replace(f'"{name}"', "")
        listed = (await ask("/v1/models", **GET)).json["data"]
        assert [entry["id"] for entry in listed] == ["coder"]
        assert [view["id"] for view in (await ask("/models", **GET)).json] == ["coder"]
        assert (await ask("/v1/models/chat", **GET)).status == 404
        assert (await ask(content={"messages": []})).status == 400  # the default is another
        client = await b.connect()
        webui = "X-HomeGPT-Client: open-webui\r\n"
        client.send("/models/sse", method="GET", more=webui + bearer())
        await client.head()
        async with asyncio.timeout(5):
            assert b'"model":"coder"' in await client.reader.readuntil(
                b"\n\n"
            )  # and no other first
        client.hang_up()


async def test_a_key_that_may_not_switch_wakes_nobody(two: dict[str, Path]) -> None:
    now = asyncio.get_running_loop().time()
    phases = {"coder": Asleep(SleepLevel.ONE, now)}
    keys = ring(key(may_switch=False), key("hg-other", "other"))
    async with box.running(two, phases=phases, guard=keys) as b:  # type: ignore[arg-type]
        reply = await b.ask(content={"model": "coder"}, more=bearer())
        assert (reply.status, reply.error["code"]) == (409, "busy")
        assert b.hands.given == []
        assert (await b.ask(content=HELLO, more=bearer())).status == 200
        assert (await b.ask(content={"model": "coder"}, more=bearer("hg-other"))).status == 200


async def test_an_answer_that_is_cut_names_no_model_that_is_not_there(tmp_path: Path) -> None:
    async def begun(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await asked.hung_up()

    async with Engine(tmp_path / "chat", begun).running() as chat:
        paths = {"chat": chat.path, "coder": tmp_path / "coder"}
        keys = ring(key(models=frozenset({"chat"})), key("hg-all", "all"))
        now = asyncio.get_running_loop().time()
        phases = {"coder": Asleep(SleepLevel.ONE, now)}
        async with box.running(paths, phases=phases, guard=keys, awake_mib=900_000) as b:  # type: ignore[arg-type]
            clients = [await b.connect(), await b.connect()]
            for client, secret in zip(clients, (SECRET, "hg-all"), strict=True):
                client.send(content=STREAM, more=bearer(secret))
            await b.until(lambda: len(chat.asked) == 2)
            for client in clients:
                await client.head()
            flows = [each.flow for each in b.server.connections]
            b.scheduler.operate(Act.SWITCH, ModelId("coder"), by="a test", cut=True)
            ends = [(await client.reader.readuntil(END)).decode() for client in clients]
            for flow, sees_all in zip(flows, (False, True), strict=True):
                told = flow._outlet.told(errors.bad_request("coder is in the way"))
                assert ("coder" in told.message) is sees_all  # though nobody is asking here
    assert ["coder" in end for end in ends] == [False, True]
    assert "cut to make room for" in ends[0]
    assert "another model" in ends[0]


async def test_the_progress_of_a_wake_names_no_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever's turn it is in which a client hears of it; here nobody's."""
    waiting: list[Early] = []

    def wait(early: Early) -> None:
        waiting.append(early)

    monkeypatch.setattr(Early, "arm", wait)

    async def begun(asked: Asked) -> None:
        asked.writer.write(SSE + token("a"))
        await asked.hung_up()

    async with Engine(tmp_path / "coder", begun).running() as coder:
        paths = {"chat": tmp_path / "chat", "coder": coder.path}
        keys = ring(key(models=frozenset({"chat"})), key("hg-all", "all"))
        phases = {"chat": Asleep(SleepLevel.ONE, asyncio.get_running_loop().time())}
        async with box.running(paths, phases=phases, guard=keys, awake_mib=900_000) as b:  # type: ignore[arg-type]
            busy, *clients = [await b.connect() for _ in range(3)]
            busy.send(content=STREAM | {"model": "coder"}, more=bearer("hg-all"))
            await busy.head()
            for client, secret in zip(clients, (SECRET, "hg-all"), strict=True):
                more = bearer(secret) + "X-HomeGPT-Client: open-webui\r\n"
                client.send(content=STREAM, more=more)
            await b.until(lambda: len(waiting) == 2)
            for early in waiting:
                early.speak()
            told = [
                (await client.reader.readuntil(b"Waiting for 1 answer of "))
                and (await client.reader.readuntil(b"\n")).decode()
                for client in clients
            ]
    assert told[0].startswith("another model")
    assert told[1].startswith("coder")


async def test_a_key_waits_no_longer_than_it_may(two: dict[str, Path]) -> None:
    now = asyncio.get_running_loop().time()
    keys = ring(key(max_wait_s=0.05))
    async with box.running(two, phases={"coder": Down(now)}, guard=keys) as b:
        b.hands.on_start = lambda model: asyncio.Event().wait()  # type: ignore[assignment,return-value]
        reply = await b.ask(content={"model": "coder"}, more=bearer())
    assert (reply.status, reply.error["code"]) == (503, "waited_too_long")


async def test_a_key_has_only_so_many_requests_at_once(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def slow(asked: Asked) -> None:
        await go.wait()
        await echo(asked)

    engine = Engine(tmp_path / "chat", slow)
    keys = ring(key(concurrency=2), key("hg-other", "other"))
    async with engine.running(), box.running({"chat": engine.path}, guard=keys) as b:
        running: list[Client] = []
        for _ in range(2):
            running.append(await b.connect())
            running[-1].send(content=HELLO, more=bearer())
        await b.until(lambda: len(engine.asked) == 2)
        for path in (CHAT, "/v1/messages"):
            reply = await b.ask(path, HELLO, more=bearer())
            assert reply.status == 429
            assert reply.error["type"] == "rate_limit_error"
            assert int(reply.headers["retry-after"]) > 0
        running[0].hang_up()  # which frees its place
        await b.until(lambda: b.leases() == 1)
        go.set()
        assert (await b.ask(content=HELLO, more=bearer())).status == 200
        assert (await b.ask(content=HELLO, more=bearer("hg-other"))).status == 200
        assert (await running[1].reply()).status == 200
        assert keys.keys is not None
        assert not +keys.keys.running


async def test_managing_needs_a_key_with_that_right(two: dict[str, Path]) -> None:
    keys = ring(key(), key("hg-boss", "boss", manage=True))
    async with box.running(two, guard=keys) as b:
        reply = await b.ask("/switch", TO_CODER, more=bearer())
        assert (reply.status, reply.error["code"]) == (403, "forbidden")
        assert b.scheduler.state.operations == ()
        elsewhere = "Host: gpu.example.org\r\nX-Forwarded-For: 1.2.3.4\r\n"
        assert (await b.ask("/switch", TO_CODER, more=bearer("hg-boss") + elsewhere)).status == 200


async def test_an_operation_of_a_model_that_is_not_there_is_not_there(
    two: dict[str, Path],
) -> None:
    keys = ring(key("hg-boss", "boss", manage=True), key(models=frozenset({"chat"})))
    async with box.running(two, guard=keys) as b:
        done = (await b.ask("/switch", TO_CODER, more=bearer("hg-boss"))).json
        path = f"/operations/{done['id']}"
        assert (await b.ask(path, **GET, more=bearer("hg-boss"))).status == 200
        assert (await b.ask(path, **GET, more=bearer())).status == 404


async def test_keys_change_while_requests_run(two: dict[str, Path]) -> None:
    keyring = Keyring([key()])
    async with box.running(two, guard=Guard(keys=keyring)) as b:
        client = await b.connect()
        assert (await client.ask(content=HELLO, more=bearer())).status == 200
        keyring.keys = (key("hg-new", "new"),)
        assert (await client.ask(content=HELLO, more=bearer("hg-new"))).status == 200
        assert (await client.ask(content=HELLO, more=bearer())).status == 401


# ---------------------------------------------------------------- web pages

PAGE = "http://chat.example.org"
FOREIGN = [f"Origin: {PAGE}\r\n", "Origin: null\r\n", "Origin: https://localhost.evil\r\n"]


@pytest.mark.parametrize("more", [*FOREIGN, "Host: evil.example:9000\r\n"])
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
async def test_no_other_site_uses_the_models(two: dict[str, Path], route: Route, more: str) -> None:
    async with box.running(two) as b:
        reply = await b.ask(route.path, HELLO, method=route.method, more=more)
        assert reply.status == 403
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "host", ["gpu", "gpu.local:9000", "host.docker.internal", "[fd00::1]:9000", "GPU.home.arpa"]
)
async def test_names_that_no_stranger_can_have_are_the_boxs_own(
    two: dict[str, Path], host: str
) -> None:
    async with box.running(two) as b:
        assert (await b.ask(content=HELLO, more=f"Host: {host}\r\n")).status == 200


async def test_further_names_are_configured(two: dict[str, Path]) -> None:
    async with box.running(two, guard=Guard(hosts=frozenset({"gpu.example.org"}))) as b:
        assert (await b.ask(content=HELLO, more="Host: GPU.example.org:80\r\n")).status == 200
        assert (await b.ask(content=HELLO, more="Host: other.example.org\r\n")).status == 403


@pytest.mark.parametrize(
    "origin", ["app://obsidian.md", "chrome-extension://abcdef", "http://localhost:9000"]
)
async def test_programs_and_the_boxs_own_pages_are_no_other_site(
    two: dict[str, Path], origin: str
) -> None:
    async with box.running(two) as b:
        more = f"Host: localhost:9000\r\nOrigin: {origin}\r\n"
        assert (await b.ask(content=HELLO, more=more)).status == 200


async def test_a_site_that_is_named_may_use_the_models_but_not_manage(
    two: dict[str, Path],
) -> None:
    async with box.running(two, guard=Guard(cors=frozenset({PAGE}))) as b:
        more = f"Origin: {PAGE}\r\n"
        allowed = await b.ask(
            method="OPTIONS",
            more=f"{more}Access-Control-Request-Method: POST\r\n"
            "Access-Control-Request-Headers: authorization, content-type\r\n",
        )
        assert (allowed.status, allowed.body) == (200, b"")
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert allowed.headers["access-control-allow-headers"] == "authorization, content-type"
        assert "POST" in allowed.headers["access-control-allow-methods"]
        for path, content, status in ((CHAT, HELLO, 200), (CHAT, {"model": "x"}, 404)):
            reply = await b.ask(path, content, more=more)
            assert reply.status == status
            assert reply.headers["access-control-allow-origin"] == PAGE
            assert reply.headers["vary"] == "Origin"
        assert (await b.ask("/switch", TO_CODER, more=more)).status == 403


async def test_a_stream_may_be_read_too(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "chat", saying(box.SSE, box.token("a"), box.DONE, box.END))
    guard = Guard(cors=frozenset({"*"}), keys=Keyring([key()]))
    async with engine.running(), box.running({"chat": engine.path}, guard=guard) as b:
        more = bearer() + f"Origin: {PAGE}\r\n"
        reply = await b.ask(content=HELLO | {"stream": True}, more=more)
    assert (reply.complete, reply.headers["access-control-allow-origin"]) == (True, PAGE)


async def test_other_pages_get_no_permission(two: dict[str, Path]) -> None:
    async with box.running(two, guard=Guard(cors=frozenset({PAGE}))) as b:
        asks = "Access-Control-Request-Method: POST\r\n"
        reply = await b.ask(method="OPTIONS", more=f"Origin: http://evil.example\r\n{asks}")
        assert reply.status == 405
        assert "access-control-allow-origin" not in reply.headers
        plain = await b.ask(content=HELLO)
        assert "access-control-allow-origin" not in plain.headers


async def test_a_page_learns_that_it_needs_a_key(two: dict[str, Path]) -> None:
    guard = Guard(cors=frozenset({PAGE}), keys=Keyring([key()]))
    async with box.running(two, guard=guard) as b:
        reply = await b.ask(content=HELLO, more=f"Origin: {PAGE}\r\n")
    assert reply.status == 401
    assert reply.headers["access-control-allow-origin"] == PAGE


async def test_one_clients_rights_are_not_the_next_ones(tmp_path: Path) -> None:
    """On one connection, one after the other: also when the answer was relayed."""
    engine = Engine(tmp_path / "chat", in_turn(echo))
    guard = Guard(keys=Keyring([key(), key("hg-none", "none", models=frozenset())]))
    async with engine.running(), box.running({"chat": engine.path}, guard=guard) as b:
        client = await b.connect()
        for _ in range(3):
            assert (await client.ask(content=HELLO, more=bearer())).status == 200
            assert (await client.ask(content=HELLO, more=bearer("hg-none"))).status == 404
            assert (await client.ask(content=HELLO)).status == 401
