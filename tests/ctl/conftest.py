"""A daemon's control socket in a thread, for a client that blocks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from homegptd.faces.control import ControlServer
from homegptd.faces.sockets import listening
from tests.faces.small_box import SmallBox


class Daemon:
    """The box and its server on a loop of their own; `down` and `up` restart the server alone."""

    def __init__(self, path: str, *, paced: bool) -> None:
        self.path = path
        self.box = SmallBox(paced=paced)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="daemon")
        self._serving: asyncio.Task[None] | None = None

    def __enter__(self) -> Daemon:
        self._thread.start()
        assert self._ready.wait(5)
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._boxed.cancel)
        self._thread.join()

    def do(self, act: Callable[[], object]) -> None:
        """Do something with the box, in its thread."""

        async def doing() -> None:
            act()

        self._wait(doing())

    def up(self) -> None:
        begun = threading.Event()

        async def serve() -> None:
            with listening(self.path) as sock:
                begun.set()
                await ControlServer(self.box).serve(sock)

        def start() -> None:
            self._serving = self._loop.create_task(serve())

        self._loop.call_soon_threadsafe(start)
        assert begun.wait(5)

    def down(self) -> None:
        async def stop() -> None:
            assert self._serving is not None
            self._serving.cancel()
            await asyncio.wait([self._serving])
            await asyncio.sleep(0)  # transports close in the next turn

        self._wait(stop())

    def _wait(self, doing: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(doing, self._loop).result(5)

    def _run(self) -> None:
        async def life() -> None:
            ready = asyncio.Event()
            self._boxed = asyncio.current_task()  # type: ignore[assignment]
            self._loop.call_soon(self._ready.set)
            await self.box.run(ready)

        try:
            self._loop.run_until_complete(life())
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()


@pytest.fixture(autouse=True)
def locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown depends on it."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


@pytest.fixture
def socket_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = str(tmp_path / "control.sock")
    monkeypatch.setenv("HOMEGPT_SOCKET", path)
    return path


@pytest.fixture
def daemon(socket_path: str) -> Iterator[Daemon]:
    """Operations end at once."""
    with Daemon(socket_path, paced=False) as here:
        yield here


@pytest.fixture
def slow_daemon(socket_path: str) -> Iterator[Daemon]:
    """Operations take a step for each `box.go()`."""
    with Daemon(socket_path, paced=True) as here:
        yield here
