"""The box at one glance, over HTTP: /status, /memory, /plan/MODEL, and /events as they happen.

The same views as on the control socket, as far as the client who asks may see them. The dashboard
lives on these paths alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from aiohttp import web

from homegptd.core.model import ModelId, State
from homegptd.runtime.scheduler import Scheduler
from homegptd.wire import control as wire

from . import errors, methods
from .clients import asking
from .desk import Desk
from .errors import Denied
from .guard import Access
from .models import Models

Admits = Callable[[web.BaseRequest, Access], bool]
"""Whether who asked may (still) do that; a reload may have changed it since."""

_MOST = 32
"""Listeners at once. Each costs a status at every change."""
_GATHER_S = 0.25
"""Changes that follow one another this closely are told as one."""
_LOOK_S = 1.0
"""Until the next look for what has no story: requests that come and go."""
_QUIET_S = 15.0
"""Until a stream without news gets a comment."""
STUCK_S = 30.0
"""A listener that has not read for so long is gone."""


class Overview:
    """What `homegptctl status`, `memory`, `plan` and `events` show, for clients of HTTP."""

    def __init__(self, scheduler: Scheduler, desk: Desk, models: Models, admits: Admits) -> None:
        self._scheduler = scheduler
        self._desk = desk
        self._models = models
        self._admits = admits
        self._listeners = 0

    async def status(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        return web.json_response(await self._box(request), headers=_FRESH)

    async def memory(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        report = await self._desk.memory(None)
        report["models"] = [each for each in report["models"] if _sees(each["id"])]
        return web.json_response(self._models.shown(report), headers=_FRESH)

    async def plan(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        model = self._models.find(rest)
        if model is None:
            raise Denied(errors.refused(self._models.unknown(rest)))
        plan = await self._desk.plan(model)
        return web.json_response(self._models.shown(plan), headers=_FRESH)

    async def events(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        """What was told lately and the status; then both as they change."""
        if self._listeners >= _MOST:
            raise methods.Refused("too-many-requests", f"{_MOST} listen to the events already")
        self._listeners += 1
        try:
            return await self._stream(request)
        finally:
            self._listeners -= 1

    # ------------------------------------------------------------ inside

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        head = {"Content-Type": "text/event-stream", **_FRESH, **dict(asking().headers)}
        answer = web.StreamResponse(headers=head)
        await answer.prepare(request)
        if request.method == "HEAD":
            return answer
        async with aclosing(self._news(request)) as news:
            async for event in news:
                try:
                    async with asyncio.timeout(STUCK_S):
                        await answer.write(event)
                except TimeoutError:
                    if request.transport is not None:
                        request.transport.abort()
                    break
        return answer

    async def _news(self, request: web.BaseRequest) -> AsyncGenerator[bytes, None]:
        told: State | None = None
        heard, spoke_at = 0, 0.0
        changed = asyncio.Event()
        with self._scheduler.watched(lambda lines: changed.set()):
            while self._admits(request, Access.LOOK):
                changed.clear()
                state, now = self._scheduler.state, self._scheduler.loop.time()
                lines, heard = self._desk.story(heard)
                said = [
                    _event("story", self._models.shown(each))
                    for each in lines
                    if _sees(each["model"])
                ]
                if state is not told:
                    said.append(_event("status", await self._box(request)))
                    told = state
                if said or now - spoke_at >= _QUIET_S:
                    spoke_at = now
                    yield b"".join(said) or b": homegpt\n\n"
                if state.stopping and not state.granted:
                    return  # the daemon leaves now, and would wait for this
                await asyncio.sleep(_GATHER_S)
                try:
                    async with asyncio.timeout(_LOOK_S):
                        await changed.wait()
                except TimeoutError:
                    continue

    async def _box(self, request: web.BaseRequest) -> wire.BoxView:
        status = await self._desk.status()
        status.pop("accounts", None)  # they name other keys
        status["models"] = [each for each in status["models"] if _sees(each["id"])]
        status["queue"] = [each for each in status["queue"] if _sees(each["model"])]
        status["operations"] = [each for each in status["operations"] if _sees(each["model"])]
        status["default"] = status["default"] if _sees(status["default"]) else None
        you: wire.ClientView = {
            "key": asking().name or None,
            "manage": self._admits(request, Access.MANAGE),
        }
        return self._models.shown(wire.BoxView(**status, you=you))


_FRESH = {"Cache-Control": "no-store"}


def _sees(model: str | None) -> bool:
    """What is about no model is for those who see them all."""
    return asking().sees(ModelId(model or ""))


def _event(kind: str, told: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(told))
