"""One simulated vLLM server: bind, load, listen, serve, end.

In a test:

    async with SimServer(Options(uds=path, speed=100)).running() as server:
        …

As a process see `__main__`. The socket file is left behind, as vLLM leaves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from homegptd.sim.app import build
from homegptd.sim.card import Card, FileCard, MemoryCard, new_box
from homegptd.sim.control import Control
from homegptd.sim.engine import Engine
from homegptd.sim.faults import Faults
from homegptd.sim.intake import Intake
from homegptd.sim.metrics import Metrics
from homegptd.sim.options import Options
from homegptd.sim.physics import HostOutOfMemory, PhysicsError

log = logging.getLogger("vllm")
_SIGINT, _SIGKILL, _SIGTERM = -2, -9, -15
Stage = Literal["imports", "loading", "serving", "ending", "zombie", "ended"]


class StartFailed(Exception):
    """`running` could not bring the server up; the text is the last log line of the start."""


class SimServer:
    """One server and its engine. `card` is a box shared with others in this process."""

    def __init__(self, options: Options, card: Card | None = None) -> None:
        self.options = options
        self.faults = Faults([replace(fault) for fault in options.faults])
        self.engine = Engine(options, card or _card(options), self.faults)
        self.metrics = Metrics()
        self.intake = Intake(self.engine)
        self.control = Control(self.engine, self.metrics, self.detach)
        self.stage: Stage = "imports"
        self.ready = asyncio.Event()
        self.failure = ""
        self._sigterms = 0
        self._stop = asyncio.Event()
        self._cut: asyncio.Future[int] | None = None  # ends the process in the middle of anything
        self._group: asyncio.TaskGroup | None = None
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._runner: web.AppRunner | None = None

    @asynccontextmanager
    async def running(self, *, uds: Path | None = None) -> AsyncIterator[SimServer]:
        """Serve for the length of the block, on `uds` if given. Raises StartFailed."""
        if uds is not None:
            self.options = self.engine.options = replace(self.options, uds=uds)
        try:
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(self.serve(), name="sim serve")
                ready = group.create_task(self.ready.wait(), name="sim ready")
                await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
                try:
                    if not self.ready.is_set():
                        raise StartFailed(self.failure)
                    yield self
                finally:
                    ready.cancel()
                    serving.cancel()
        except BaseExceptionGroup as several:  # the block's own exception, unwrapped
            if len(several.exceptions) > 1:
                raise
            raise several.exceptions[0] from None

    async def serve(self) -> int:
        """The whole life of the process; the exit code, negative for a signal."""
        self._cut = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.TaskGroup() as self._group:
                life = self._group.create_task(self._life(), name="sim life")
                await asyncio.wait({life, self._cut}, return_when=asyncio.FIRST_COMPLETED)
                code = self._cut.result() if self._cut.done() else life.result()
                for task in {life, *self._tasks}:
                    task.cancel()
        finally:
            await self._close()
        return code

    def terminate(self) -> None:
        """A SIGTERM (or SIGINT) arrived."""
        self._sigterms += 1
        log.info("Received SIGTERM number %d while %s", self._sigterms, self.stage)
        if self.stage in ("serving", "ending"):
            self._stop.set()
        elif self.stage in ("imports", "loading") and not self._swallows():
            self.cut(_SIGTERM if self.stage == "imports" else _SIGINT)

    def cut(self, code: int) -> None:
        """End at once, in the middle of anything, with this exit code."""
        if self._cut is not None and not self._cut.done():
            self._cut.set_result(code)

    def _swallows(self) -> bool:
        """The handshake swallows the first SIGTERM of a start (vLLM 0.22 and later)."""
        if self._sigterms > 1:
            return False
        loading = self.stage == "loading" and self.engine.profile.catches_sigterm_in_start
        return loading or self.faults.peek("swallowed-sigterm", "start") is not None

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` beside the requests, for as long as the server lives."""
        assert self._group is not None  # noqa: S101 -- requests only come while serving
        task = self._group.create_task(work, name="sim background")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def detach(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` to its end even if the waiting request is cancelled."""
        assert self._group is not None  # noqa: S101 -- requests only come while serving
        done = asyncio.get_running_loop().create_future()
        task = self._group.create_task(_report(work, done), name="sim control call")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await done

    # -- life ----------------------------------------------------------------------------------

    async def _life(self) -> int:
        engine, pass_time = self.engine, self.engine.pass_time
        log.info("vLLM API server version %s", self.options.version)
        await pass_time(self.options.speeds.imports_s)
        try:
            self._socket = self._bind()
        except OSError as why:
            return self._failed(f"[Errno {why.errno}] {why.strerror}: {self._address()}")
        self.stage = "loading"
        try:
            await engine.load()
        except HostOutOfMemory as why:
            self._failed(str(why))
            return _SIGKILL
        except PhysicsError as why:
            return self._failed(f"ValueError: {why}")
        fault = self.faults.peek("swallowed-sigterm", "start")
        if fault is not None and fault.value and self._sigterms:
            await engine.for_ever()
        await self._listen()
        await self._first(self._stop.wait(), engine.died.wait())
        return await (self._end() if self._stop.is_set() else self._mourn())

    def _failed(self, why: str) -> int:
        self.failure = why
        log.error("%s", why)
        return 1

    def _address(self) -> str:
        return str(self.options.uds or f"{self.options.host or '0.0.0.0'}:{self.options.port}")  # noqa: S104

    def _bind(self) -> socket.socket:
        """Bound but not listening: clients are refused until the model is loaded."""
        if self.options.uds is not None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        else:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if self.options.uds is not None:
                sock.bind(str(self.options.uds))
            else:
                sock.bind((self.options.host or "", self.options.port))
        except OSError:
            sock.close()
            raise
        return sock

    async def _listen(self) -> None:
        runner = web.AppRunner(
            build(self),
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=self.options.keep_alive_s,
            shutdown_timeout=0.5,
        )
        await runner.setup()
        self._runner = runner
        assert self._socket is not None  # noqa: S101 -- bound before
        await web.SockSite(runner, self._socket).start()
        self.stage = "serving"
        log.info("Application startup complete.")
        self.ready.set()

    async def _first(self, *waits: Coroutine[Any, Any, Any]) -> None:
        """Wait until one of several events is set."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(wait) for wait in waits]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()

    async def _end(self) -> int:
        """The graceful stop: abort (the default) or drain, then leave."""
        self.stage = "ending"
        engine, patience = self.engine, self.options.shutdown_timeout_s / self.options.speed
        if patience:
            self.intake.draining = True
            try:
                async with asyncio.timeout(patience):
                    await (engine.pass_time(3) if engine.is_sleeping_now() else engine.idle())
            except TimeoutError:
                log.warning("Shutdown timeout reached, requests are dropped")
            if engine.turns:
                engine.die("shut down")
        else:
            engine.abort_all()
            await engine.idle()
        await self._stop_listening()
        await engine.pass_time(0.3)
        return await self._leave()

    async def _mourn(self) -> int:
        """The engine died: the listener closes, the process follows, with exit code 0."""
        if self.engine.killed:
            return _SIGKILL
        if self.options.keep_alive_on_death:
            await self._stop.wait()
            return 0
        await self.engine.pass_time(0.3)
        await self._stop_listening()
        await self.engine.pass_time(1.5)
        return await self._leave()

    async def _leave(self) -> int:
        """Uvicorn waits for unfinished handlers; a control call to a dead engine never ends."""
        if self.engine.control_pending:
            self.stage = "zombie"
            self.engine.die("shut down")
            await self.engine.for_ever()
        return 0

    async def _stop_listening(self) -> None:
        for site in list(self._runner.sites) if self._runner else []:
            await site.stop()

    async def _close(self) -> None:
        self.stage = "ended"
        if self._runner is not None:
            await self._runner.cleanup()
        if self._socket is not None:
            self._socket.close()
        self.engine.dead = True
        self.engine.drop_memory()


async def _report(work: Coroutine[Any, Any, Any], done: asyncio.Future[Any]) -> None:
    try:
        result = await work
    except Exception as why:  # noqa: BLE001 -- handed to the request that waits
        if not done.done():
            done.set_exception(why)
    else:
        with contextlib.suppress(asyncio.InvalidStateError):
            done.set_result(result)


def _card(options: Options) -> Card:
    if options.card is not None:
        return FileCard(options.card)
    return MemoryCard(new_box(gpus=max(options.gpus) + 1))
