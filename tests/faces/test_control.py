"""The control socket with real sockets: the specification's examples, limits, garbage, waiting."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypedDict

import pytest

from homegptd.faces.control import ControlServer, Limits
from homegptd.faces.methods import METHODS, Entry, Request, Table
from homegptd.faces.sockets import SocketInUse, listen, listening
from homegptd.wire.control import NoParams, OperationView, StatusView
from homegptd.wire.schema import problem
from tests.faces.small_box import SmallBox


class Peer:
    """A raw client: lines out, values in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *lines: str | bytes) -> None:
        for line in lines:
            self.writer.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
        await self.writer.drain()

    async def call(self, method: str, call_id: int = 1, **params: object) -> Any:
        message = {"jsonrpc": "2.0", "method": method, "id": call_id, "params": params}
        await self.send(json.dumps(message))
        return await self.answer(call_id)

    async def next(self) -> Any:
        line = await self.reader.readline()
        return json.loads(line) if line else None

    async def answer(self, call_id: object) -> Any:
        """The answer to a call; notifications on the way are read over."""
        while True:
            message = await self.next()
            if message is None or ("method" not in message and message["id"] == call_id):
                return message

    async def alive(self) -> None:
        assert (await self.call("version", 999))["result"]["pid"] == os.getpid()


class House:
    """A server on its socket with a small box behind it."""

    def __init__(self, box: SmallBox, server: ControlServer, path: str) -> None:
        self.box, self.server, self.path = box, server, path
        self.peers: list[Peer] = []

    async def peer(self) -> Peer:
        peer = Peer(*await asyncio.open_unix_connection(self.path, limit=1 << 24))
        self.peers.append(peer)
        return peer


@asynccontextmanager
async def house(
    tmp_path: Path, *, limits: Limits | None = None, table: Table = METHODS, paced: bool = False
) -> AsyncIterator[House]:
    box = SmallBox(paced=paced)
    server = ControlServer(box, limits=limits, table=table)
    path = str(tmp_path / "control.sock")
    ready = asyncio.Event()
    with listening(path) as sock:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(box.run(ready)), group.create_task(server.serve(sock))]
            await ready.wait()
            here = House(box, server, path)
            try:
                async with asyncio.timeout(20):
                    yield here
            finally:
                for peer in here.peers:
                    peer.writer.close()
                for task in tasks:
                    task.cancel()
    await asyncio.sleep(0)  # transports close in the next turn


# The list of section 7 of the specification


def example_table() -> Table:
    class Two(TypedDict):
        """Two numbers."""

        minuend: int
        subtrahend: int

    class Seven(TypedDict):
        """Up to three numbers."""

        a: int
        b: int
        c: int

    async def subtract(_: Request, given: Any) -> object:
        return given["minuend"] - given["subtrahend"]

    async def add(_: Request, given: Any) -> object:
        return sum(given.values())

    async def get_data(_: Request, __: Any) -> object:
        return ["hello", 5]

    async def notified(_: Request, __: Any) -> object:
        return None

    rows: list[Entry[Any]] = [
        Entry("subtract", "", Two, int, subtract),
        Entry("sum", "", Seven, int, add),
        Entry("get_data", "", NoParams, list[object], get_data),
        Entry("update", "", Seven, int, notified),
        Entry("notify_hello", "", Seven, int, notified),
        Entry("notify_sum", "", Seven, int, notified),
    ]
    return {row.name: row for row in rows}


def ok(result: object, call_id: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "result": result, "id": call_id}


def wrong(code: int, call_id: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "error": {"code": code}, "id": call_id}


PARSE, INVALID, MISSING = -32700, -32600, -32601
EXAMPLES: list[tuple[str, object]] = [
    ('{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}', ok(19, 1)),
    ('{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}', ok(-19, 2)),
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42},'
        ' "id": 3}',
        ok(19, 3),
    ),
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23},'
        ' "id": 4}',
        ok(19, 4),
    ),
    ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
    ('{"jsonrpc": "2.0", "method": "foobar"}', None),
    ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', wrong(MISSING, "1")),
    ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', wrong(PARSE, None)),
    ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', wrong(INVALID, None)),
    (
        '[ {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},'
        ' {"jsonrpc": "2.0", "method" ]',
        wrong(PARSE, None),
    ),
    ("[]", wrong(INVALID, None)),
    ("[1]", [wrong(INVALID, None)]),
    ("[1,2,3]", [wrong(INVALID, None)] * 3),
    (
        '[ {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},'
        ' {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},'
        ' {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},'
        ' {"foo": "boo"},'
        ' {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},'
        ' {"jsonrpc": "2.0", "method": "get_data", "id": "9"} ]',
        [
            ok(7, "1"),
            ok(19, "2"),
            wrong(INVALID, None),
            wrong(MISSING, "5"),
            ok(["hello", 5], "9"),
        ],
    ),
    (
        '[ {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},'
        ' {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]} ]',
        None,
    ),
]


def shown(answer: Any) -> Any:
    """An answer without the words of its errors, which the specification leaves to us."""
    if isinstance(answer, list):
        return [shown(one) for one in answer]
    if "error" in answer:
        assert answer["error"]["message"]
        return answer | {"error": {"code": answer["error"]["code"]}}
    return answer


@pytest.mark.parametrize(("line", "answer"), EXAMPLES)
async def test_an_example_of_the_specification_is_answered_as_it_says(
    tmp_path: Path, line: str, answer: object
) -> None:
    async with house(tmp_path, table=example_table()) as here:
        peer = await here.peer()
        await peer.send(line, '{"jsonrpc":"2.0","method":"get_data","id":"last"}')
        if answer is not None:
            first = await peer.next()
            if shown(first) == ok(["hello", 5], "last"):  # calls are answered side by side
                first = await peer.next()
            assert shown(first) == answer
        else:
            assert await peer.next() == ok(["hello", 5], "last")


# Methods


async def test_status_has_the_shape_that_was_promised(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        answer = await (await here.peer()).call("status")
        assert problem(answer["result"], StatusView, "status") is None


async def test_a_waiting_call_gets_progress_and_then_the_final_operation(tmp_path: Path) -> None:
    async with house(tmp_path, paced=True) as here:
        peer = await here.peer()
        await peer.send('{"jsonrpc":"2.0","method":"switch","params":{"model":"code"},"id":"s"}')
        first = await peer.next()
        assert first["method"] == "progress"
        assert first["params"]["call"] == "s"
        assert problem(first["params"]["operation"], OperationView, "operation") is None
        here.box.go(3)
        answer = await peer.answer("s")
        assert answer["result"]["state"] == "done"
        assert [step["state"] for step in answer["result"]["steps"]] == ["done"] * 3


async def test_a_call_that_does_not_wait_is_answered_at_once(tmp_path: Path) -> None:
    async with house(tmp_path, paced=True) as here:
        peer = await here.peer()
        answer = await peer.call("switch", model="coder", wait=False)
        assert answer["result"]["state"] == "running"
        number = answer["result"]["id"]
        assert (await peer.call("operation", id=number))["result"]["state"] == "running"
        assert (await peer.call("cancel", id=number))["result"]["state"] == "cancelled"


async def test_other_calls_of_a_connection_go_on_while_one_waits(tmp_path: Path) -> None:
    async with house(tmp_path, paced=True) as here:
        peer = await here.peer()
        await peer.send('{"jsonrpc":"2.0","method":"switch","params":["coder"],"id":1}')
        assert (await peer.call("status", 2))["result"]["operations"][0]["kind"] == "switch"
        here.box.go(3)
        assert (await peer.answer(1))["result"]["state"] == "done"


async def test_a_notification_begins_its_operation_and_is_told_nothing(tmp_path: Path) -> None:
    async with house(tmp_path, paced=True) as here:
        peer = await here.peer()
        await peer.send('{"jsonrpc":"2.0","method":"switch","params":["coder"]}')
        await peer.send('{"jsonrpc":"2.0","method":"version","id":1}')
        assert (await peer.next())["id"] == 1
        while not here.box.calls:
            await peer.alive()
        assert here.box.calls[0][0] == "switch"


async def test_the_kernel_says_who_calls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "homegptd.faces.control")
    async with house(tmp_path) as here:
        await (await here.peer()).call("sleep", model="chat", level=2)
        (kind, caller) = here.box.calls[0]
        assert (kind, caller.uid, caller.pid) == ("sleep", os.getuid(), os.getpid())
        line = f'sleep model="chat" level=2 by={caller.name} uid={caller.uid} pid={caller.pid}'
        assert line in caplog.text


@pytest.mark.parametrize(
    ("method", "params", "code", "words"),
    [
        ("switch", {}, -32602, "switch.model is missing"),
        ("switch", {"model": 3}, -32602, "switch.model must be text, not 3"),
        ("switch", {"model": "a", "wiat": 1}, -32602, "switch.wiat is unknown"),
        ("sleep", {"model": "a", "level": 3}, -32602, "sleep.level must be 1 or 2 or null, not 3"),
        ("status", ["x"], -32602, "status takes 0 parameters, not 1"),
        ("logs", {"model": "chat", "lines": 0}, -32602, "logs.lines must be between"),
        ("switch", {"model": "nope"}, -32003, 'there is no model "nope"'),
        ("wake", {"model": "coder"}, -32006, "do not fit"),
        ("operation", {"id": 5}, -32004, "there is no operation 5"),
        ("prove", {"model": "chat"}, -32603, "prove broke"),
        ("statsu", {}, -32601, 'Method not found: "statsu"'),
    ],
)
async def test_a_bad_call_is_told_why(
    tmp_path: Path, method: str, params: object, code: int, words: str
) -> None:
    async with house(tmp_path) as here:
        peer = await here.peer()
        message = {"jsonrpc": "2.0", "method": method, "params": params, "id": 1}
        await peer.send(json.dumps(message))
        error = (await peer.answer(1))["error"]
        assert error["code"] == code
        assert words in error["message"]
        assert error["data"]["reason"]
        await peer.alive()


async def test_events_follow_their_subscription(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        peer = await here.peer()
        assert (await peer.call("events"))["result"] == {}
        assert (await peer.call("events", 2))["result"] == {}
        here.box.tell("chat fell asleep")
        event = await peer.next()
        assert (event["method"], event["params"]["message"]) == ("event", "chat fell asleep")


async def test_a_subscriber_that_hangs_up_is_forgotten(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        peer, other = await here.peer(), await here.peer()
        await peer.call("events")
        peer.writer.close()
        while here.box.subscribers or here.server.connections > 1:
            await other.alive()


async def test_a_waiting_caller_that_hangs_up_leaves_its_operation_running(tmp_path: Path) -> None:
    async with house(tmp_path, paced=True) as here:
        peer, other = await here.peer(), await here.peer()
        await peer.send('{"jsonrpc":"2.0","method":"switch","params":["coder"],"id":1}')
        number = (await peer.next())["params"]["operation"]["id"]
        peer.writer.close()
        while here.server.connections > 1:
            await other.alive()
        here.box.go(3)
        final = await other.call("operation", id=number, wait=True)
        assert final["result"]["state"] == "done"


async def test_who_closes_only_their_half_still_gets_the_answer(tmp_path: Path) -> None:
    async with house(tmp_path, paced=True) as here:
        peer = await here.peer()
        peer.writer.write(b'{"jsonrpc":"2.0","method":"switch","params":["coder"],"id":1}')
        peer.writer.write_eof()
        assert (await peer.next())["method"] == "progress"
        here.box.go(3)
        assert (await peer.answer(1))["result"]["state"] == "done"
        assert await peer.next() is None


async def test_a_stopping_server_tells_its_callers(tmp_path: Path) -> None:
    box = SmallBox(paced=True)
    server = ControlServer(box)
    path = str(tmp_path / "control.sock")
    ready = asyncio.Event()
    with listening(path) as sock:
        async with asyncio.TaskGroup() as group:
            other = group.create_task(box.run(ready))
            serving = group.create_task(server.serve(sock))
            await ready.wait()
            peer = Peer(*await asyncio.open_unix_connection(path))
            idle = Peer(*await asyncio.open_unix_connection(path))
            await peer.send('{"jsonrpc":"2.0","method":"switch","params":["coder"],"id":1}')
            await peer.next()
            await idle.alive()
            serving.cancel()
            answer = await peer.answer(1)
            assert answer["error"]["data"]["reason"] == "shutting-down"
            for one in (peer, idle):
                closing = await one.next()
                assert closing["method"] == "closing"
                assert await one.next() is None
                one.writer.close()
            other.cancel()


# Limits


async def test_a_message_that_is_too_large_is_refused_and_the_next_one_served(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as here:
        peer = await here.peer()
        for size in (1 << 20, 3 << 20):
            await peer.send(b'{"x":"' + b"y" * size + b'"}')
            error = (await peer.next())["error"]
            assert error["data"]["reason"] == "too-large"
        await peer.alive()


async def test_a_large_message_within_the_limit_is_served(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        peer = await here.peer()
        answer = await peer.call("switch", model="m" * 1_000_000)
        assert answer["error"]["data"]["reason"] == "unknown-model"


async def test_a_batch_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        peer = await here.peer()
        await peer.send("[" + ",".join(["1"] * 101) + "]")
        assert "100 entries" in (await peer.next())["error"]["message"]


async def test_two_hundred_idle_connections_and_half_lines_hurt_nobody(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        for index in range(200):
            idle = await here.peer()
            if index % 2:
                idle.writer.write(b'{"jsonrpc": "2.0", "meth')
        peer = await here.peer()
        await peer.alive()
        assert here.server.connections == 201


async def test_the_connection_that_was_quiet_longest_makes_room(tmp_path: Path) -> None:
    async with house(tmp_path, limits=Limits(connections=2)) as here:
        first, second = await here.peer(), await here.peer()
        await first.alive()
        await second.alive()
        await first.alive()
        third = await here.peer()
        await third.alive()
        assert (await second.next())["params"]["reason"] == "busy"
        assert await second.next() is None
        await first.alive()


async def test_when_all_connections_are_at_work_a_new_one_is_refused(tmp_path: Path) -> None:
    async with house(tmp_path, limits=Limits(connections=1)) as here:
        peer = await here.peer()
        await peer.call("events")
        refused = await here.peer()
        assert (await refused.next())["params"]["reason"] == "busy"
        assert await refused.next() is None
        await peer.alive()


async def test_who_never_reads_is_cut_off(tmp_path: Path) -> None:
    async with house(tmp_path, limits=Limits(unread_s=0.05)) as here:
        here.box.log_text = ["x" * 1000] * 5000
        deaf = socket.socket(socket.AF_UNIX)
        deaf.connect(here.path)
        ask = b'{"jsonrpc":"2.0","method":"logs","params":["chat",5000],"id":1}\n'
        deaf.sendall(ask * 3)
        peer = await here.peer()
        await peer.alive()
        while here.server.connections > 1:
            await peer.alive()
        deaf.close()


async def test_calls_beyond_the_limit_wait_their_turn(tmp_path: Path) -> None:
    async with house(tmp_path, limits=Limits(calls=4)) as here:
        peer = await here.peer()
        lines = [f'{{"jsonrpc":"2.0","method":"version","id":{n}}}' for n in range(500)]
        await peer.send(*lines)
        answers = [await peer.next() for _ in lines]
        assert sorted(answer["id"] for answer in answers) == list(range(500))


async def test_garbage_hurts_nobody(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        good = await here.peer()
        for garbage in (
            os.urandom(4096), b"\0" * 100, b"\n\n\n\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"[" * 70_000, b'{"jsonrpc":"2.0","method":"status","params":{"\\ud800":1},"id":1}',
            b'{"jsonrpc":"2.0","method":"\\ud800","id":"\\udfff"}', b"{}", b"null",
            b'{"jsonrpc":"2.0","result":1,"id":1}',
        ):  # fmt: skip
            peer = await here.peer()
            await peer.send(garbage)
            peer.writer.write_eof()
            while await peer.next() is not None:
                pass
            await good.alive()


# The daemon runs on uvloop, whose transports and clock are its own

ON_UVLOOP = [
    test_a_waiting_call_gets_progress_and_then_the_final_operation,
    test_a_subscriber_that_hangs_up_is_forgotten,
    test_a_waiting_caller_that_hangs_up_leaves_its_operation_running,
    test_who_closes_only_their_half_still_gets_the_answer,
    test_a_stopping_server_tells_its_callers,
    test_a_message_that_is_too_large_is_refused_and_the_next_one_served,
    test_the_connection_that_was_quiet_longest_makes_room,
    test_when_all_connections_are_at_work_a_new_one_is_refused,
    test_who_never_reads_is_cut_off,
    test_garbage_hurts_nobody,
]


@pytest.mark.parametrize("scenario", ON_UVLOOP, ids=lambda scenario: scenario.__name__)
def test_it_is_the_same_on_uvloop(
    tmp_path: Path, scenario: Callable[[Path], Coroutine[Any, Any, None]]
) -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario(tmp_path))


# The socket's file


def test_a_stale_socket_is_replaced_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with listening(str(path)) as sock:
        assert sock.getsockname() == str(path)
        assert path.stat().st_mode & 0o777 == 0o660
    assert not path.exists()


def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "control.sock")
    with listening(path), pytest.raises(SocketInUse, match="another daemon answers there"):
        listen(path)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("precious")
    with pytest.raises(SocketInUse, match="is no socket"):
        listen(str(path))
    assert path.read_text() == "precious"


def test_the_socket_of_a_successor_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with listening(str(path)):
        path.unlink()
        successor = listen(str(path))
    assert path.exists()
    successor.close()


def test_an_unknown_group_is_named(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no-such-group"):
        listen(str(tmp_path / "control.sock"), group="no-such-group")
