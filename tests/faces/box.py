"""A daemon in miniature: the real scheduler, desk and door, and engines as a test likes them.

`Box` serves on a TCP port of the loopback. Its models are awake from the start; orders are carried
out by `Hands`, which do what the test told them. `Engine` is a hand-written HTTP server on a Unix
socket that does anything a broken server could do.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from homegptd.core import model as core
from homegptd.core.commands import Command, Order, Probe, Sleep, Start, Stop, Wake, Watch
from homegptd.core.events import EngineDied, Event, SleepEnded, StartEnded, StopEnded, WakeEnded
from homegptd.core.model import Awake, EngineSpec, Failure, Gpu, ModelId, SleepLevel, State, Traits
from homegptd.faces import http
from homegptd.faces.accounts import Accounts
from homegptd.faces.ask import Limits
from homegptd.faces.bodies import Bodies
from homegptd.faces.desk import Desk
from homegptd.faces.early import Pace
from homegptd.faces.front import Front
from homegptd.faces.guard import Guard
from homegptd.faces.pool import Address
from homegptd.faces.router import EngineKeys, Settings, no_key
from homegptd.runtime.scheduler import Scheduler

PROVED = {core.Proof.FREEZE: True, core.Proof.RELOAD: True}
TRAITS = Traits("0.32.0", frozenset({SleepLevel.ONE}), can_keep=True, proofs=PROVED)
CHAT = "/v1/chat/completions"


def spec(model: str, **more: Any) -> EngineSpec:
    sizes = {"awake_mib": 1000, "residue_mib": 10, "pinned_mib": 10, "host_mib": 10}
    return EngineSpec(ModelId(model), (Gpu(0),), **(sizes | more))


class Hands:
    """Carries out starts, wakes and stops at once, after what the test wants to happen."""

    def __init__(self) -> None:
        self.given: list[Command] = []
        self.on_start: Callable[[str], Awaitable[None]] = self._nothing
        self.sleeps = False
        """Whether sleeps are carried out too."""
        self.post: Callable[[Event], None] = lambda event: None

    async def _nothing(self, model: str) -> None:
        return

    def carry_out(self, command: Order | Watch | Probe, group: asyncio.TaskGroup) -> None:
        self.given.append(command)
        group.create_task(self._do(command))

    async def _do(self, command: Order | Watch | Probe) -> None:
        match command:
            case Start(model, order):
                await self.on_start(model)
                self.post(StartEnded(model, order, TRAITS))
            case Wake(model, order):
                self.post(WakeEnded(model, order))
            case Sleep(model, order) if self.sleeps:
                self.post(SleepEnded(model, order))
            case Stop(model, order):
                self.post(StopEnded(model, order))


@dataclass
class Box:
    scheduler: Scheduler
    desk: Desk
    door: http.Door
    server: web.Server
    hands: Hands
    host: str
    port: int
    accounts: Accounts
    clients: list[Client] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def leases(self, model: str = "chat") -> int:
        return len(core_held(self.scheduler.state, model))

    def clients_served(self) -> int:
        """How many connections of clients the door has open."""
        return len(self.server.connections)

    def fronts(self) -> int:
        """How many of them have gone the short way only."""
        return sum(isinstance(each, Front) for each in self.server.connections)

    def phase(self, model: str = "chat") -> core.Phase:
        return self.scheduler.state.engines[ModelId(model)].phase

    def died(self, model: str, why: str = "its engine was killed") -> None:
        incarnation = self.scheduler.state.engines[ModelId(model)].incarnation
        self.scheduler.post(EngineDied(ModelId(model), incarnation, Failure(why)))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for a step after which `holds`; a test that waits in vain times out."""
        changed = asyncio.Event()
        with self.scheduler.watched(lambda lines: changed.set()):
            async with asyncio.timeout(5):
                while not holds():
                    changed.clear()
                    try:
                        async with asyncio.timeout(0.01):  # not every step has a story
                            await changed.wait()
                    except TimeoutError:
                        continue

    async def connect(self, *, limit: int = 1 << 24) -> Client:
        client = Client(*await asyncio.open_connection(self.host, self.port, limit=limit))
        self.clients.append(client)
        return client

    async def ask(self, *given: Any, **more: Any) -> Reply:
        """One request on a connection of its own."""
        return await (await self.connect()).ask(*given, **more)


def core_held(state: State, model: str) -> frozenset[core.TicketId]:
    from homegptd.core.invariants import held

    return frozenset(held(state.engines[ModelId(model)]))


@asynccontextmanager
async def running(
    addresses: dict[str, Path] | dict[str, tuple[str, int]],
    *,
    limits: Limits | None = None,
    notice_s: float = 2.0,
    notice_death_s: float = 15.0,
    task_grace_s: float = 5.0,
    realtime_idle_s: float = 60.0,
    max_body_bytes: int = 64 << 20,
    max_held_bytes: int = 256 << 20,
    bodies: Bodies | None = None,
    pace: Pace | None = None,
    timings: dict[str, float] | None = None,
    kinds: dict[str, str] | None = None,
    phases: dict[str, core.Phase] | None = None,
    policy: core.Policy | None = None,
    booted: bool = True,
    disabled: tuple[str, ...] = (),
    guard: Guard | None = None,
    engine_keys: EngineKeys = no_key,
    **specs: Any,
) -> AsyncIterator[Box]:
    """A box whose first model is the default. `chat` has the alias `talk`."""
    now = asyncio.get_running_loop().time()
    phases = phases or {}
    engines = {
        ModelId(name): core.Engine(
            spec(name, **specs),
            phases.get(name, Awake(now)),
            TRAITS,
            enabled=name not in disabled,
            took={act: (seconds,) * 9 for act, seconds in (timings or {}).items()},
        )
        for name in addresses
    }
    default = ModelId(next(iter(addresses)))
    state = State(
        engines,
        policy or core.Policy(default=default),
        {Gpu(0): 1 << 20},
        1 << 20,
        booted=booted,
        since=now,
    )
    hands = Hands()
    scheduler = Scheduler(state, hands, max_wait_s=20.0)
    hands.post = scheduler.post
    names = {ModelId(name): (name.title(), ()) for name in addresses}
    if "chat" in addresses:
        names[ModelId("chat")] = ("Chat", ("talk", "lab/Chat-7B"))
    accounts = Accounts()
    desk = Desk(scheduler, names, kinds=kinds, logs=_no_logs, reload=_no_reload, accounts=accounts)
    bodies = bodies or Bodies(max_held_bytes)
    settings = Settings(
        max_body_bytes,
        bodies,
        lambda model: limits or Limits(),
        pace or Pace(),
        notice_s=notice_s,
        notice_death_s=notice_death_s,
        task_grace_s=task_grace_s,
        realtime_idle_s=realtime_idle_s,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    async with scheduler.running():
        with desk.open():
            door = http.build(
                scheduler=scheduler,
                desk=desk,
                addresses=lambda model: _address(addresses[model]),
                engine_keys=engine_keys,
                settings=settings,
                guard=guard,
                accounts=accounts,
            )
            runner = await http.serve(door, [listener], shutdown_s=0.5)
            assert runner.server is not None
            small = Box(scheduler, desk, door, runner.server, hands, host, port, accounts)
            try:
                yield small
            finally:
                for client in small.clients:
                    client.hang_up()
                del small.clients[:]
                await runner.cleanup()
                door.close()


def _address(of: Path | tuple[str, int]) -> Address:
    return of if isinstance(of, tuple) else str(of)


async def _no_logs(model: ModelId, lines: int) -> list[str]:
    return []


async def _no_reload() -> str:
    return ""


# ---------------------------------------------------------------- engines


@dataclass
class Asked:
    """A request as an engine got it."""

    line: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int
    connection: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def hung_up(self) -> None:
        """Until the other end has closed the connection."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass


Script = Callable[[Asked], Awaitable[None]]


@dataclass
class Engine:
    """A server that plays a script for each request; returning keeps the connection open."""

    path: Path
    script: Script
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        self.path.unlink(missing_ok=True)
        self._writers: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_unix_server(self._serve, str(self.path), limit=1 << 26)
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                writer.transport.abort()
            self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._writers.add(writer)
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                line, *rest = head.rstrip("\r\n").split("\r\n")
                headers = {k.lower(): v for k, _, v in (each.partition(": ") for each in rest)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                asked = Asked(line, headers, body, reader, writer, len(self.asked) + 1, number)
                self.asked.append(asked)
                await self.script(asked)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def token(text: str, finish: str | None = None) -> bytes:
    """One event as vLLM writes it, in its own chunk."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    body = json.dumps({"id": "c1", "choices": [choice]}, separators=(",", ":"))
    return chunk(b"data: " + body.encode() + b"\n\n")


DONE = chunk(b"data: [DONE]\n\n")
END = b"0\r\n\r\n"
SSE = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def answer(content: Any, status: str = "200 OK", more: bytes = b"") -> bytes:
    """A whole JSON answer."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (
        b"HTTP/1.1 %s\r\nserver: uvicorn\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n%s\r\n%s" % (status.encode(), len(body), more, body)
    )


def saying(*pieces: bytes) -> Script:
    """Write these bytes and wait for the next request."""

    async def script(asked: Asked) -> None:
        for piece in pieces:
            asked.writer.write(piece)
            await asked.writer.drain()

    return script


def dying_after(*pieces: bytes) -> Script:
    """Write these bytes and close."""

    async def script(asked: Asked) -> None:
        asked.writer.writelines(pieces)
        asked.writer.close()

    return script


def in_turn(*scripts: Script) -> Script:
    """A script for each request; the last one for all that follow."""

    async def script(asked: Asked) -> None:
        await scripts[min(asked.number, len(scripts)) - 1](asked)

    return script


# ---------------------------------------------------------------- clients


@dataclass
class Reply:
    """What came back. `complete` is False where the connection ended too soon."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[str]:
        """The data of each server-sent event."""
        return [
            line.removeprefix("data: ")
            for event in self.body.decode().split("\n\n")
            for line in event.split("\n")
            if line.startswith("data: ")
        ]


class Client:
    """A client that sees every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(
        self, path: str = CHAT, content: Any = None, *, method: str = "POST", more: str = "",
        version: str = "1.1",
    ) -> Reply:  # fmt: skip
        self.send(path, content, method=method, more=more, version=version)
        return await self.reply(method)

    def send(
        self, path: str = CHAT, content: Any = None, *, method: str = "POST", more: str = "",
        version: str = "1.1",
    ) -> None:  # fmt: skip
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        if method != "POST":
            body = b""
        kind = "" if "ontent-" in more else "Content-Type: application/json\r\n"
        host = "" if "Host:" in more else "Host: localhost\r\n"
        head = f"{method} {path} HTTP/{version}\r\n{host}{kind}{more}"
        self.writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = raw.rstrip("\r\n").split("\r\n")
        headers = {k.lower(): v for k, _, v in (each.partition(": ") for each in rest)}
        return int(line.split(" ")[1]), headers

    async def reply(self, method: str = "POST") -> Reply:
        status, headers = await self.head()
        try:
            body, complete = await self._body(headers, method)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            body = error.partial if isinstance(error, asyncio.IncompleteReadError) else b""
            complete = False
        return Reply(status, headers, body, complete)

    async def _body(self, headers: dict[str, str], method: str) -> tuple[bytes, bool]:
        if method == "HEAD":
            return b"", True
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"])), True
        if headers.get("transfer-encoding") != "chunked":
            return await self.reader.read(), True
        pieces: list[bytes] = []
        while True:
            try:
                size = int(await self.reader.readuntil(b"\r\n"), 16)
                pieces.append((await self.reader.readexactly(size + 2))[:-2])
            except (asyncio.IncompleteReadError, ConnectionError):
                return b"".join(pieces), False
            if size == 0:
                return b"".join(pieces), True

    async def closed(self) -> bool:
        """Whether the server closes the connection now."""
        async with asyncio.timeout(5):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True

    def hang_up(self) -> None:
        self.writer.transport.abort()


HELLO = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}
STREAM = HELLO | {"stream": True}
