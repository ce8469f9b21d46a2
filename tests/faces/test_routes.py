"""What each row of the table promises: where the model is, what wakes it, what is sent twice."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from homegptd.core.model import Act, Asleep, SleepLevel
from homegptd.faces import http
from homegptd.faces.adjust import Adjustment
from homegptd.faces.routes import ROUTES, Where
from homegptd.faces.stored import Stored
from homegptd.faces.tasks import is_task

from . import box
from .box import CHAT, HELLO, SSE, Asked, Engine, answer, chunk, dying_after, in_turn, saying

TITLE = (
    "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n"
    "### Guidelines:\n- x\n### Chat History:\n<chat_history>\nUSER: hi\n</chat_history>"
)
FORM = "Content-Type: multipart/form-data; boundary=XX\r\n"


def asleep() -> Asleep:
    return Asleep(SleepLevel.ONE, asyncio.get_running_loop().time())


def form(*fields: tuple[str, str]) -> bytes:
    parts = "".join(
        f'--XX\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in (("file", "\0sound"), *fields)
    )
    return parts.encode() + b"--XX--\r\n"


async def echo(asked: Asked) -> None:
    where = asked.writer.get_extra_info("sockname")
    text = asked.body.decode()
    asked.writer.write(answer({"asked": text, "line": asked.line, "by": Path(where).name}))


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[box.Box]:
    """Two models, awake both; `chat` is the default."""
    one, other = Engine(tmp_path / "chat", echo), Engine(tmp_path / "coder", echo)
    models = {"chat": one.path, "coder": other.path}
    async with one.running(), other.running(), box.running(models) as b:
        yield b


def asked(reply: box.Reply) -> Any:
    return json.loads(reply.json["asked"])


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("path", [r.path for r in ROUTES if r.where is Where.FORM])
async def test_a_form_goes_to_the_model_it_names(two: box.Box, path: str) -> None:
    content = form(("language", "de"), ("model", "coder"))
    reply = await two.ask(path, content, more=FORM)
    assert (reply.json["by"], reply.json["line"]) == ("coder", f"POST {path} HTTP/1.1")
    assert reply.json["asked"] == content.decode()


async def test_a_form_without_a_model_names_the_default(two: box.Box) -> None:
    for fields in ((), (("model", ""),), (("model", "default"),)):
        reply = await two.ask("/v1/audio/transcriptions", form(*fields), more=FORM)
        assert reply.json["by"] == "chat"
        assert 'name="model"\r\n\r\nchat\r\n' in reply.json["asked"]


@pytest.mark.parametrize(
    ("content", "more", "status", "says"),
    [
        (form(("model", "nothing")), FORM, 404, 'no model "nothing"'),
        (form()[:-9], FORM, 400, "does not end"),
        (b"{}", "Content-Type: application/json\r\n", 415, "multipart/form-data"),
        (form(), "Content-Type: multipart/form-data\r\n", 400, "boundary"),
    ],
)
async def test_a_form_that_cannot_be_routed(
    two: box.Box, content: bytes, more: str, status: int, says: str
) -> None:
    reply = await two.ask("/v1/audio/transcriptions", content, more=more)
    assert reply.status == status
    assert says in reply.error["message"]


# ---------------------------------------------------------------- names


async def test_default_is_a_name_for_the_default_model(two: box.Box) -> None:
    reply = await two.ask(content={"model": "default", "stop": "}"})
    assert json.loads(reply.json["asked"]) == {"model": "chat", "stop": "}"}


async def test_active_is_the_model_used_last_of_those_awake(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("chat", "coder", "embed")}
    engines = [Engine(path, echo) for path in paths.values()]
    kinds = {"chat": "generate", "coder": "generate", "embed": "embed"}
    async with (
        engines[0].running(), engines[1].running(), engines[2].running(),
        box.running(paths, kinds=kinds) as b,
    ):  # fmt: skip
        await b.ask(content={"model": "coder"})
        await b.ask("/v1/embeddings", {"model": "embed"})
        assert asked(await b.ask(content={"model": "active"})) == {"model": "coder"}
        assert asked(await b.ask("/v1/embeddings", {"model": "active"})) == {"model": "embed"}
        await b.ask(content=HELLO)
        assert asked(await b.ask(content={"model": "active"})) == {"model": "chat"}


async def test_virtual_names_can_be_looked_up_but_are_not_listed(two: box.Box) -> None:
    await two.ask(content={"model": "coder"})
    for name, model in (("active", "coder"), ("default", "chat")):
        assert (await two.ask(f"/v1/models/{name}", method="GET")).json["id"] == model
    listed = (await two.ask("/v1/models", method="GET")).json["data"]
    assert [each["id"] for each in listed] == ["chat", "coder"]


async def test_a_model_of_that_very_name_goes_before(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "active", echo)
    async with engine.running(), box.running({"chat": tmp_path / "s", "active": engine.path}) as b:
        assert asked(await b.ask(content={"model": "active"})) == {"model": "active"}


async def test_active_is_the_default_while_nothing_is_awake(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "chat", echo)
    async with engine.running(), box.running({"chat": engine.path}, phases={"chat": asleep()}) as b:
        assert asked(await b.ask(content={"model": "active"})) == {"model": "chat"}


# ---------------------------------------------------------------- what wakes nobody


QUIET = [r for r in ROUTES if not r.wakes and r.where is Where.BODY]


@pytest.mark.parametrize("route", QUIET, ids=lambda route: route.path)
async def test_counting_tokens_wakes_nobody_and_waits_for_nobody(
    tmp_path: Path, route: Any
) -> None:
    engine = Engine(tmp_path / "chat", echo)
    async with engine.running(), box.running({"chat": engine.path}, phases={"chat": asleep()}) as b:
        reply = await b.ask(route.path, HELLO)
        assert b.hands.given == []
        assert engine.asked == []
    assert reply.status == 409
    assert reply.headers["x-should-retry"] == "false"
    assert f"POST {route.path} wakes no model" in reply.error["message"]
    assert "homegptctl switch chat" in reply.error["message"]


async def test_counting_tokens_waits_for_a_model_that_comes_up_anyway(tmp_path: Path) -> None:
    go = asyncio.Event()
    engine = Engine(tmp_path / "chat", echo)
    down = box.core.Down(asyncio.get_running_loop().time())
    async with engine.running(), box.running({"chat": engine.path}, phases={"chat": down}) as b:
        b.hands.on_start = lambda model: go.wait()  # type: ignore[assignment,return-value]
        b.desk.begin(Act.START, "chat", by="test")
        client = await b.connect()
        client.send("/tokenize", {"prompt": "x"})
        await b.until(lambda: len(b.scheduler.state.waiting) == 1)
        go.set()
        assert (await client.reply()).status == 200


async def test_a_model_that_only_an_operator_switches_to_says_so(tmp_path: Path) -> None:
    phases = {"coder": asleep()}
    paths = {"chat": tmp_path / "chat", "coder": tmp_path / "coder"}
    async with box.running(paths, phases=phases, auto_switch=False) as b:
        reply = await b.ask(content={"model": "coder"})
    assert (reply.status, reply.error["code"]) == (409, "busy")
    assert "only an operator switches to it" in reply.error["message"]
    assert "homegptctl switch coder" in reply.error["message"]


# ---------------------------------------------------------------- background tasks


def chat(text: str) -> dict[str, object]:
    return {"model": "coder", "messages": [{"role": "user", "content": text}]}


async def test_a_title_switches_to_nobody(tmp_path: Path) -> None:
    paths = {"chat": tmp_path / "chat", "coder": tmp_path / "coder"}
    async with box.running(paths, phases={"coder": asleep()}, task_grace_s=0.05) as b:
        reply = await b.ask(content=chat(TITLE))
        assert b.hands.given == []
    assert (reply.status, reply.error["code"]) == (409, "busy")
    assert "router.background_tasks" in reply.error["message"]


async def test_a_title_that_comes_before_its_chat_is_answered_with_it(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "coder", echo)
    paths = {"chat": tmp_path / "chat", "coder": engine.path}
    async with engine.running(), box.running(paths, phases={"coder": asleep()}) as b:
        title = await b.connect()
        title.send(content=chat(TITLE))
        assert (await b.ask("/health", method="GET")).status == 200  # the title is waiting
        assert b.hands.given == []
        assert (await b.ask(content=chat("hello"))).status == 200
        assert (await title.reply()).status == 200


async def test_a_title_for_an_awake_model_is_a_request_like_any_other(two: box.Box) -> None:
    assert asked(await two.ask(content=chat(TITLE))) == chat(TITLE)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (chat(TITLE), True),
        (
            chat(TITLE.replace("Generate a concise, 3-5 word title", "Generate 1-3 broad tags")),
            True,
        ),
        (chat("### Task:\nSuggest 3-5 relevant follow-up questions or prompts"), True),
        (chat("### Task:\nYou are an autocompletion system."), True),
        (chat("### Task:\nWrite the function"), False),
        (chat("Summarise: " + TITLE), False),
        ({"messages": [*chat(TITLE)["messages"]] * 2}, False),  # type: ignore[misc]
        ({"messages": [{"role": "system", "content": TITLE}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": TITLE}]}]}, False),
        ({"messages": TITLE}, False),
        ({"prompt": TITLE}, False),
    ],
)
def test_tasks_are_told_from_chats(content: dict[str, object], told: bool) -> None:
    assert is_task(json.dumps(content).encode()) is told


# ---------------------------------------------------------------- stored responses

RESPONSE = {"id": "resp_1", "object": "response", "status": "completed", "output": [{"id": "msg"}]}
CREATED = (
    b'event: response.created\ndata: {"response":{"id":"resp_2","object":"response"},'
    b'"sequence_number":0,"type":"response.created"}\n\n'
)
DONE = b'event: response.completed\ndata: {"type":"response.completed"}\n\n'


async def stored(given: Asked) -> None:
    if given.line.startswith("POST /v1/responses "):
        if given.json.get("stream"):
            given.writer.write(SSE + chunk(CREATED) + chunk(DONE) + box.END)
        else:
            given.writer.write(answer(RESPONSE))
    else:
        given.writer.write(answer({"line": given.line, "body": given.body.decode()}))


@pytest.fixture
async def keeper(tmp_path: Path) -> AsyncIterator[tuple[box.Box, Engine]]:
    """`coder` keeps responses; the default does not."""
    engine = Engine(tmp_path / "coder", stored)
    paths = {"chat": tmp_path / "chat", "coder": engine.path}
    async with engine.running(), box.running(paths) as b:
        yield b, engine


async def test_a_response_is_found_again_by_its_id(keeper: tuple[box.Box, Engine]) -> None:
    b, _ = keeper
    await b.ask("/v1/responses", {"model": "coder", "input": "x"})
    await b.ask("/v1/responses", {"model": "coder", "input": "x", "stream": True})
    for ident in ("resp_1", "resp_2"):
        got = await b.ask(f"/v1/responses/{ident}", method="GET")
        assert got.json["line"] == f"GET /v1/responses/{ident} HTTP/1.1"
        gone = await b.ask(f"/v1/responses/{ident}/cancel", b"")
        assert gone.json["line"] == f"POST /v1/responses/{ident}/cancel HTTP/1.1"
    more = await b.ask("/v1/responses/resp_1?stream=true&starting_after=4&x=/sleep", method="GET")
    assert more.json["line"] == ("GET /v1/responses/resp_1?starting_after=4&stream=true HTTP/1.1")


async def test_a_chat_goes_on_where_its_last_response_is(keeper: tuple[box.Box, Engine]) -> None:
    b, engine = keeper
    await b.ask("/v1/responses", {"model": "coder", "input": "x"})
    await b.ask("/v1/responses", {"input": "y", "previous_response_id": "resp_1"})
    assert engine.asked[-1].json == {
        "input": "y", "previous_response_id": "resp_1", "model": "coder",
    }  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses/resp_9", "/v1/responses/msg", "/v1/responses/%72esp_1",
        "/v1/responses/resp_1/", "/v1/responses//resp_1", "/v1/responses/../responses/resp_1",
        "/v1/responses/resp_1/input_items", "/v1/responses/resp_1%2Fcancel", "/v1/responses/",
    ],
)  # fmt: skip
async def test_other_ids_and_spellings_are_not_there(
    keeper: tuple[box.Box, Engine], path: str
) -> None:
    b, engine = keeper
    await b.ask("/v1/responses", {"model": "coder", "input": "x"})
    for method in ("GET", "POST"):
        reply = await b.ask(path, b"", method=method)
        if path.endswith(("resp_9", "msg")) and method == "POST":
            assert reply.status == 405
            continue
        assert (reply.status, reply.error["code"]) == (404, "not_found")
    assert len(engine.asked) == 1


async def test_heads_and_other_methods_are_not_relayed(keeper: tuple[box.Box, Engine]) -> None:
    b, engine = keeper
    await b.ask("/v1/responses", {"model": "coder", "input": "x"})
    for method, path, allowed in (
        ("HEAD", "/v1/responses/resp_1", "GET"),
        ("DELETE", "/v1/responses/resp_1", "GET"),
        ("OPTIONS", "/v1/responses/resp_1/cancel", "POST"),
        ("GET", "/v1/responses/resp_1/cancel", "POST"),
    ):
        reply = await b.ask(path, method=method)
        assert (reply.status, reply.headers["allow"]) == (405, allowed)
    assert len(engine.asked) == 1


async def test_a_restarted_engine_has_no_responses(keeper: tuple[box.Box, Engine]) -> None:
    b, engine = keeper
    await b.ask("/v1/responses", {"model": "coder", "input": "x"})
    b.died("coder")
    await b.until(lambda: b.scheduler.state.engines[box.ModelId("coder")].incarnation == 1)
    reply = await b.ask("/v1/responses/resp_1", method="GET")
    assert (reply.status, reply.error["param"]) == (404, "response_id")
    assert len(engine.asked) == 1


async def test_a_door_to_one_model_is_the_same_router(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "coder", stored)
    paths = {"chat": tmp_path / "chat", "coder": engine.path}
    kept = Stored()
    async with engine.running(), box.running(paths) as b:
        sock = socket.create_server(("127.0.0.1", 0))
        door = http.build_model_door(
            box.ModelId("coder"), scheduler=b.scheduler, desk=b.desk, stored=kept,
            addresses=lambda model: str(paths[model]),
        )  # fmt: skip
        runner = await http.serve(door, [sock], shutdown_s=0.5)
        at = replace(b, port=sock.getsockname()[1])
        for name in (None, "active", "default", "coder"):
            await at.ask("/v1/responses", {"model": name, "input": "x"})
            assert engine.asked[-1].json["model"] == "coder"
        assert (await at.ask("/v1/responses/resp_1", method="GET")).status == 200
        assert (await at.ask("/v1/responses", {"model": "chat"})).status == 404
        kept.learn(b'{"id":"resp_7"}', box.ModelId("chat"), b.scheduler.state.engines)
        assert (await at.ask("/v1/responses/resp_7", method="GET")).status == 404
        for path in ("/models/load", "/switch", "/models"):
            assert (await at.ask(path, {"model": "coder"})).status == 404
        await runner.cleanup()
        door.close()


@pytest.mark.parametrize(
    ("more", "tries"),
    [({}, 2), ({"store": False}, 2), ({"background": True}, 1), ({"store": True}, 1),
     ({"previous_response_id": "resp_0"}, 1)],
)  # fmt: skip
async def test_what_the_engine_keeps_is_never_asked_twice(
    tmp_path: Path, more: dict[str, object], tries: int
) -> None:
    engine = Engine(tmp_path / "chat", in_turn(dying_after(), saying(answer(RESPONSE))))
    async with engine.running(), box.running({"chat": engine.path}, notice_s=0.05) as b:
        reply = await b.ask("/v1/responses", {"input": "x"} | more)
    assert len(engine.asked) == tries
    assert reply.status == (200 if tries == 2 else 502)


async def test_an_id_stays_with_the_engine_that_gave_it_first(tmp_path: Path) -> None:
    paths = {"chat": tmp_path / "a", "coder": tmp_path / "b"}
    async with box.running(paths) as b:
        kept, engines = Stored(), b.scheduler.state.engines
        kept.learn(b'{"id":"r1"}', box.ModelId("chat"), engines)
        kept.learn(b'{"id":"r1"}', box.ModelId("coder"), engines)
        assert kept.find("r1", engines) == "chat"


async def test_ids_are_forgotten_in_the_order_they_came(tmp_path: Path) -> None:
    async with box.running({"chat": tmp_path / "s"}) as b:
        kept, engines = Stored(most=2), b.scheduler.state.engines
        for number in (1, 2, 1, 3):
            kept.learn(b'{"id":"r%d"}' % number, box.ModelId("chat"), engines)
        assert [kept.find(f"r{n}", engines) for n in (1, 2, 3)] == ["chat", None, "chat"]
        assert len(kept) == 2


# ---------------------------------------------------------------- request settings


async def test_settings_of_the_configuration_are_written_into_requests(two: box.Box) -> None:
    kwargs = {"enable_thinking": False}
    two.desk.adjustments = {
        box.ModelId("chat"): Adjustment(
            {"temperature": 0.6, "chat_template_kwargs": kwargs | {"deep": {"a": 1}}},
            {"max_tokens": 100, "logit_bias": None, "chat_template_kwargs": kwargs},
        )
    }
    content = HELLO | {
        "temperature": None,
        "logit_bias": {"1": 2},
        "chat_template_kwargs": {"enable_thinking": True, "deep": {"b": 2}},
    }
    assert asked(await two.ask(content=content)) == HELLO | {
        "temperature": 0.6,
        "max_tokens": 100,
        "chat_template_kwargs": {"enable_thinking": False, "deep": {"a": 1, "b": 2}},
    }
    kept = HELLO | {"temperature": 1, "max_tokens": 7, "chat_template_kwargs": 3}
    assert asked(await two.ask(content=kept)) == HELLO | {
        "temperature": 1, "max_tokens": 100, "chat_template_kwargs": kwargs,
    }  # fmt: skip
    other = {"model": "coder", "max_tokens": 5}
    assert asked(await two.ask(content=other)) == other


async def test_settings_reach_forms_and_requests_without_a_model(two: box.Box) -> None:
    two.desk.adjustments = {box.ModelId("chat"): Adjustment({"language": "de"}, {"temperature": 0})}
    reply = await two.ask("/v1/audio/transcriptions", form(("language", "en")), more=FORM)
    text = reply.json["asked"]
    assert text.index('"language"\r\n\r\nde') < text.index('"language"\r\n\r\nen')
    assert text.index('"temperature"\r\n\r\n0') > text.index('"language"\r\n\r\nen')
    assert asked(await two.ask(content={})) == {"model": "chat", "language": "de", "temperature": 0}


async def test_a_body_that_settings_cannot_be_written_into_is_refused(two: box.Box) -> None:
    two.desk.adjustments = {box.ModelId("chat"): Adjustment({"a": 1})}
    torn = b'{"pad": "' + b"x" * 70_000 + b'", "model": "chat"} x'
    reply = await two.ask(CHAT, torn)
    assert (reply.status, reply.error["code"]) == (400, "bad_request")
