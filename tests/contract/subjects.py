"""Two servers that must behave alike: the simulated engine, and a real vLLM where there is one."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

NAME = "tiny"
"""The model's name at both."""
KEEP_ALIVE_S = 1
MAX_QUEUED = 6
FLAGS = ["--max-model-len", "2048", "--max-num-seqs", "4"]
SHARED = ["--enable-server-load-tracking", "--max-num-queued-reqs", str(MAX_QUEUED)]
ENV = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
}
SIM_FLAGS = [
    "--enable-sleep-mode",
    *("--sim-weights-gb", "1", "--sim-kv-gb", "1"),
    *("--sim-imports-s", "0.1", "--sim-compile-s", "0.1", "--sim-pin-gbps", "25"),
    *("--sim-tokens-per-s", "60", "--sim-speed", "20"),
]


class SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("vllm", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


@dataclass
class Server:
    """One server process and where it listens."""

    kind: str
    process: "subprocess.Popen[bytes]"
    uds: Path
    log: Path
    pieces: list[str] = field(default_factory=list)

    @property
    def is_sim(self) -> bool:
        return self.kind == "sim"

    def blocking(self, method: str, path: str, *, body: object = None) -> tuple[int, bytes]:
        connection = SocketConnection(self.uds, timeout=5.0)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def wait_until_ready(self, deadline_s: float) -> None:
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.blocking("GET", "/health")[0] == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready after {deadline_s} s:\n{self.tail()}")

    def tail(self, characters: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def wait_for_exit(self, deadline_s: float) -> int:
        return self.process.wait(deadline_s)

    def freeze_engine_core(self, *, frozen: bool) -> None:
        """Stop the engine process in its tracks, or let it go on."""
        if self.is_sim and frozen:
            self.blocking("POST", "/sim/fault", body={"name": "hang"})
        elif self.is_sim:
            self.blocking("DELETE", "/sim/fault")
        else:
            self._signal_engine_core(signal.SIGSTOP if frozen else signal.SIGCONT)

    def kill_engine_core(self) -> None:
        """As the kernel would: without a word to anybody."""
        if self.is_sim:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.blocking("POST", "/sim/die")
        else:
            self._signal_engine_core(signal.SIGKILL)

    def _signal_engine_core(self, number: int) -> None:
        for pid in children(self.process.pid):
            if "EngineCore" in command(pid):
                os.kill(pid, number)

    def end(self) -> None:
        """Whatever state it is in, with everything below it."""
        family = [*descendants(self.process.pid)]
        for pid in [self.process.pid, *family]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


def start(
    kind: str, folder: Path, flags: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Server:
    """Launch and return at once. `real` needs HOMEGPT_REAL_VLLM and HOMEGPT_REAL_MODEL."""
    uds, log = folder / "vllm.sock", folder / "vllm.log"
    if kind == "sim":
        argv = [sys.executable, "-m", "homegptd.sim", NAME, *SIM_FLAGS]
    else:
        python, model = os.environ["HOMEGPT_REAL_VLLM"], os.environ["HOMEGPT_REAL_MODEL"]
        argv = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        argv += ["--enforce-eager"]
    argv += ["--served-model-name", NAME, "--uds", str(uds), *FLAGS, *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **ENV, **(env or {})}
        )
    return Server(kind, process, uds, log)


@contextlib.contextmanager
def running(kind: str, folder: Path, flags: Sequence[str] = ()) -> Iterator[Server]:
    server = start(kind, folder, flags)
    try:
        server.wait_until_ready(20 if kind == "sim" else 240)
        yield server
    finally:
        server.end()


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        found = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for file in found for child in file.read_text().split()]
    return []


def descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from descendants(child)


def command(pid: int) -> str:
    """The name that vLLM gives its processes (setproctitle): `VLLM::EngineCore`."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


async def until(holds: Callable[[], Awaitable[bool]], *, deadline_s: float = 5.0) -> None:
    """Look again and again; there is nothing in another process to wait for."""
    async with asyncio.timeout(deadline_s):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.01)


# --- a client


@dataclass
class Reply:
    status: int
    text: str
    headers: "aiohttp.typedefs.LooseHeaders"

    @property
    def json(self):
        return json.loads(self.text)


@dataclass
class Client:
    """A new connection for each request, as an engine's adapter and a careful proxy have."""

    server: Server

    def session(self, *, force_close: bool = True) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            "http://vllm",
            connector=aiohttp.UnixConnector(str(self.server.uds), force_close=force_close),
            timeout=aiohttp.ClientTimeout(total=60),
        )

    async def ask(self, method: str, path: str, body: object = None, **more: object) -> Reply:
        async with (
            self.session() as session,
            session.request(method, path, json=body, **more) as answer,
        ):
            return Reply(answer.status, await answer.text(), answer.headers)

    async def get(self, path: str) -> Reply:
        return await self.ask("GET", path)

    async def post(self, path: str, body: object = None, **more: object) -> Reply:
        return await self.ask("POST", path, body, **more)

    async def asleep(self) -> bool:
        return (await self.get("/is_sleeping")).json["is_sleeping"]

    async def used_by(self, requests: int) -> bool:
        return (await self.get("/load")).json["server_load"] == requests

    async def unused(self) -> bool:
        return await self.used_by(0)

    async def gone(self) -> bool:
        """Nobody listens any more."""
        try:
            await self.get("/version")
        except aiohttp.ClientConnectorError:
            return True
        return False

    async def complete(
        self, tokens: int = 8, prompt: str = "One two three", **more: object
    ) -> Reply:
        return await self.post("/v1/completions", question(tokens, prompt, **more))

    async def gauge(self, name: str, label: str = "") -> float:
        """Sum of a metric's samples whose labels contain `label`."""
        lines = (await self.get("/metrics")).text.splitlines()
        found = [x for x in lines if x.startswith((f"{name}{{", f"{name} ")) and label in x]
        assert found, f"no metric {name} with {label}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def question(tokens: int, prompt: str = "One two three", **more: object) -> dict[str, object]:
    body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return {**body, "ignore_eos": True, **more}


class Stream:
    """A streamed answer being heard. Run `listen` in a task; look at the rest meanwhile."""

    def __init__(self, client: Client, body: dict[str, object], path: str = "/v1/completions"):
        self.client, self.path = client, path
        self.body = {**body, "stream": True}
        self.status = 0
        self.headers: object = None
        self.events: list[dict] = []
        self.done = False
        self._waits: list[tuple[int, object]] = []

    @property
    def text(self) -> str:
        return "".join(c["text"] for e in self.events for c in e["choices"])

    @property
    def tokens(self) -> int:
        """By their ids where they were asked for: a slow reader gets several in one event."""
        choices = [choice for event in self.events for choice in event["choices"]]
        return sum(len(c.get("token_ids") or c["text"][:1]) for c in choices)

    @property
    def finish(self) -> str | None:
        reasons = [c["finish_reason"] for e in self.events for c in e.get("choices", ())]
        return next((r for r in reasons if r), None)

    async def listen(self) -> "Stream":
        async with (
            self.client.session() as session,
            session.post(self.path, json=self.body) as answer,
        ):
            self.status, self.headers = answer.status, answer.headers
            async for line in answer.content:
                if line.strip() == b"data: [DONE]":
                    self.done = True
                elif line.startswith(b"data: "):
                    self.events.append(json.loads(line[6:]))
                    self._tell()
                else:
                    assert not line.strip(), line
        return self

    async def listen_to_names(self) -> None:
        """As `listen`, where events have names and no `[DONE]` follows them."""
        async with (
            self.client.session() as session,
            session.post(self.path, json=self.body) as answer,
        ):
            async for line in answer.content:
                if line.startswith(b"data: "):
                    self.events.append(json.loads(line[6:]))
                    self._tell()

    async def heard(self, events: int) -> None:
        """Wait until so many events have come. The caller sets the deadline."""
        arrived = asyncio.Event()
        self._waits.append((events, arrived))
        self._tell()
        await arrived.wait()

    def _tell(self) -> None:
        for events, arrived in self._waits:
            if len(self.events) >= events:
                arrived.set()
