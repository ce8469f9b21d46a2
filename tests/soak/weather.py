"""What a soak does to the box: switches, stalls, kills, restarts, each kind in turn, at random."""

import asyncio
import json
import os
import random
import signal
import time
from contextlib import ExitStack, suppress
from socket import socket
from typing import Any

from tests.e2e.client import pid_of
from tests.e2e.harness import PATIENCE_S, Box, Running, SimModel, free_port

from .books import Books, Breach, Kind

MODELS = ("a", "b", "c", "d")
ALIASES = {"b": "second"}
EMBEDDER = "d"
_FLAGS = ("--sim-tokens-per-s", "2")
_READY_S = 120.0
_DECK = {
    Kind.SWITCH: 10, Kind.NOW: 2, Kind.SLEEP: 1, Kind.RELOAD: 2, Kind.STALL: 2, Kind.KILL: 4,
    Kind.STOP: 1, Kind.CRASH: 1,
}  # fmt: skip
_POLICIES = ("auto", "wait", "freeze")


class Weather:
    """One box and everything that happens to it, one thing after the other."""

    def __init__(self, box: Box, books: Books, dice: random.Random) -> None:
        self.box, self._books, self._dice = box, books, dice
        self._daemon: Running | None = None
        self._life = ExitStack()
        self._deck: list[Kind] = []
        self.adopted = self.reloaded = 0
        self.door = free_port()
        self._configure("auto")

    # ------------------------------------------------------------ the box

    def _configure(self, policy: str) -> None:
        """a and b need the card alone; c and d fit side by side."""
        flags = {
            "b": ("--served-model-name", "b", ALIASES["b"]),
            EMBEDDER: ("--sim-kind", "embed"),
        }
        sizes = {"a": 60.0, "b": 60.0, "c": 30.0, "d": 30.0}
        extras = {"b": "    aliases: [second]\n", "c": f"    host_port: {self.door}\n"}
        models = [
            SimModel(
                name, "active" if name == "a" else "sleep", awake_gb=sizes[name],
                flags=(*_FLAGS, *flags.get(name, ())), extra=extras.get(name, ""),
            )
            for name in MODELS
        ]  # fmt: skip
        self.box.write(*models, head=f"router: {{drain_s: 0.3, on_deadline: {policy}}}\n")
        text = self.box.config.read_text()
        before, mine, after = text.partition(f"  - id: {EMBEDDER}\n")
        after = after.replace("engine: {command", "engine: {kind: embed, command", 1)
        self.box.config.write_text(before + mine + after)

    async def begin(self) -> None:
        """Until every model was brought up, or is known to be out."""
        notify = await asyncio.to_thread(self._start)
        # nobody waits for what it tells systemd from here on, but somebody must take it
        asyncio.get_running_loop().add_reader(notify, notify.recv, 65536)

    def _start(self) -> socket:
        self._life = ExitStack()
        self._daemon = self._life.enter_context(self.box.daemon())
        self._daemon.ready(_READY_S)
        return self._daemon.notify

    async def end(self) -> None:
        """In good order. Raises: Breach where something is left."""
        self._deaf()
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        assert self._daemon is not None
        self._daemon.process.terminate()
        code = self._daemon.process.wait(40)
        left = self.box.engine_pids()
        self._life.close()
        if code or left:
            raise Breach(f"the daemon ended with {code} and left the processes {left}")

    def _deaf(self) -> None:
        assert self._daemon is not None
        asyncio.get_running_loop().remove_reader(self._daemon.notify)

    def abandon(self) -> None:
        """After a breach: no promises, just nothing left."""
        self._life.close()

    # ------------------------------------------------------------ the weather

    async def blow(self, until: float) -> None:
        """One trouble after the other; a restart that has begun goes on to its end.

        Raises: Breach.
        """
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < until:
                await asyncio.sleep(self._dice.uniform(0.2, 1.2))
                if not self._deck:
                    self._deck = [kind for kind, times in _DECK.items() for _ in range(times)]
                    self._dice.shuffle(self._deck)
                await self._make(self._deck.pop(), group)

    async def _make(self, kind: Kind, group: asyncio.TaskGroup) -> None:
        model = self._dice.choice(MODELS)
        match kind:
            case Kind.SWITCH | Kind.NOW:
                group.create_task(self._operate(kind, "switch", model, now=kind is Kind.NOW))
            case Kind.SLEEP:
                group.create_task(self._operate(kind, "sleep", model))
            case Kind.RELOAD:
                self._configure(self._dice.choice(_POLICIES))
                group.create_task(self._operate(kind, "reload"))
            case Kind.STALL:
                group.create_task(self._stall(model, self._dice.uniform(0.1, 1.0)))
            case Kind.KILL:
                self._kill(model)
            case Kind.STOP:
                await self._restart(kind)
            case Kind.CRASH:
                await self._restart(kind)

    async def _operate(
        self, kind: Kind, method: str, model: str | None = None, **more: Any
    ) -> None:
        """An operator's wish; some operators do not wait for its end."""
        trouble = self._books.trouble(kind, None if kind is Kind.NOW else model)
        asked = more if model is None else {"model": model, **more}
        leaves_s = self._dice.choice([0.05, _READY_S, _READY_S])
        with suppress(TimeoutError, OSError, EOFError):
            async with asyncio.timeout(leaves_s):
                await tell(self.box, method, **asked)
        trouble.until = time.monotonic()

    async def _stall(self, model: str, for_s: float) -> None:
        """SIGSTOP: alive, and says nothing."""
        try:
            pid = pid_of(self.box, model)
        except AssertionError:
            return
        trouble = self._books.trouble(Kind.STALL, model)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(for_s)
            finally:
                os.kill(pid, signal.SIGCONT)
        trouble.until = time.monotonic()

    def _kill(self, model: str) -> None:
        with suppress(AssertionError, ProcessLookupError, FileNotFoundError):
            pid = pid_of(self.box, model)
            trouble = self._books.trouble(Kind.KILL, model)
            os.kill(pid, signal.SIGKILL)
            trouble.until = time.monotonic()

    async def _restart(self, kind: Kind) -> None:
        assert self._daemon is not None
        trouble = self._books.trouble(kind)
        before = self.box.engine_pids()
        if kind is Kind.STOP:
            await self.end()
        else:
            self._deaf()
            self._daemon.sweep = False
            await asyncio.to_thread(self._daemon.kill)
            self._life.close()
        await self.begin()
        trouble.until = time.monotonic()
        if kind is Kind.CRASH:
            self.adopted += len(before & self.box.engine_pids())

    # ------------------------------------------------------------ afterwards

    async def quiet(self) -> None:
        """With no client left nothing may run, wait or be held anywhere. Raises: Breach."""
        deadline = time.monotonic() + PATIENCE_S
        while held := await self._held():
            if time.monotonic() > deadline:
                raise Breach(f"all clients are gone, but something is still held: {held}")
            await asyncio.sleep(0.05)

    async def _held(self) -> dict[str, object]:
        status = await tell(self.box, "status")
        held: dict[str, object] = {
            m["id"]: m["requests"] for m in status["models"] if any(m["requests"].values())
        }
        for name in MODELS:
            path = self.box.root / "control.sock.engines" / name
            path = path if path.exists() else self.box.root / "engines" / name
            with suppress(OSError, EOFError):
                state = await _get(str(path), "/sim/state")
                if state["running"] or state["waiting"]:
                    held[f"engine of {name}"] = (state["running"], state["waiting"])
        return held


async def tell(box: Box, method: str, **params: object) -> Any:
    """One call on the control socket; the result, or the error as it came."""
    reader, writer = await asyncio.open_unix_connection(str(box.socket), limit=1 << 24)
    try:
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        writer.write(json.dumps(request).encode() + b"\n")
        while line := await reader.readline():
            reply = json.loads(line)
            if reply.get("id") == 1:
                return reply.get("result") or reply["error"]
        raise EOFError
    finally:
        writer.close()


async def _get(path: str, what: str) -> Any:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(f"GET {what} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        if not answer:
            raise EOFError
        return json.loads(answer.partition(b"\r\n\r\n")[2])
    finally:
        writer.close()
