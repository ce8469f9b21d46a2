"""llama.cpp's router verbs, for Open WebUI: dots at the models that answer now, and Eject.

Only for a client that says so by a header, which a connection of Open WebUI can be given: others
hide models that are not `loaded`. Awake is `loaded`, asleep is `unloaded`, since a green dot should
mean an answer at once. Shapes: llama.cpp, tools/server/README.md, "Using multiple models".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from homegptd.core.model import Act
from homegptd.runtime.scheduler import Scheduler
from homegptd.wire import control as wire

from . import errors
from .clients import asking
from .desk import Desk
from .errors import Denied, Problem
from .management import Management, ended, json_body
from .models import Models

HEADER, OPEN_WEBUI = "X-HomeGPT-Client", "open-webui"
_STATUS = {
    "awake": "loaded", "draining": "loaded", "proving": "loaded",
    "starting": "loading", "waking": "loading",
}  # fmt: skip
_QUIET_S = 15.0
"""Until a stream without news gets a comment."""


def opted_in(request: web.BaseRequest) -> bool:
    """Whether the client is Open WebUI with its header set."""
    return request.headers.get(HEADER, "").lower() == OPEN_WEBUI


class _Which(msgspec.Struct):
    model: str


class LlamaCpp:
    """What differs for clients that opted in, and what is there only for them."""

    def __init__(
        self, scheduler: Scheduler, desk: Desk, models: Models, management: Management
    ) -> None:
        self._scheduler = scheduler
        self._desk = desk
        self._models = models
        self._management = management

    async def models(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        if opted_in(request):
            return web.json_response(self._listed())
        return await self._management.models(request, rest)

    async def listed(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        if opted_in(request):
            return web.json_response(self._listed())
        return await self._management.listed(request, rest)

    async def load(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        """Answers when the model is awake."""
        return await self._done(request, Act.SWITCH)

    async def unload(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        """Answers when the model is asleep."""
        return await self._done(request, Act.SLEEP)

    async def events(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        """Every model's status, and then each that changes."""
        _only_for_those(request)
        head = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        head |= dict(asking().headers)
        answer = web.StreamResponse(headers=head)
        await answer.prepare(request)
        if request.method != "HEAD":
            async with aclosing(self._changes()) as changes:
                async for event in changes:
                    await answer.write(event)
        return answer

    # ------------------------------------------------------------ inside

    def _listed(self) -> dict[str, object]:
        status = {view["id"]: _dot(view) for view in self._desk.models()}
        listed = self._models.entries()
        data = [{**each, "status": {"value": status[str(each["id"])]}} for each in listed]
        return {"object": "list", "data": data}

    async def _changes(self) -> AsyncGenerator[bytes, None]:
        told: dict[str, str] = {}
        changed = asyncio.Event()
        with self._scheduler.watched(lambda lines: changed.set()):
            while True:
                changed.clear()
                now = {view["id"]: _status(view) for view in self._models.views()}
                for model in told.keys() - now.keys():
                    yield _event({"model": model, "event": "model_remove"})
                for model, status in now.items():
                    if told.get(model) != status:
                        data = {"status": status}
                        yield _event({"model": model, "event": "model_status", "data": data})
                told = now
                try:
                    async with asyncio.timeout(_QUIET_S):
                        await changed.wait()
                except TimeoutError:
                    yield b": homegpt\n\n"

    async def _done(self, request: web.BaseRequest, act: Act) -> web.StreamResponse:
        _only_for_those(request)
        wish = await json_body(request, _Which, '{"model": "…"}', param="model")
        if self._models.find(wish.model) is None:
            raise Denied(errors.refused(self._models.unknown(wish.model)))
        view = self._desk.begin(act, wish.model, by=f"Open WebUI {request.remote or ''}".strip())
        view = self._models.shown(await self._management.end_of(view))
        return ended(view) if view["error"] else web.json_response({"success": True})


def _only_for_those(request: web.BaseRequest) -> None:
    if not opted_in(request):
        text = f"there is no such path without the header {HEADER}: {OPEN_WEBUI}"
        raise Denied(Problem(404, "not_found", text))


def _dot(view: wire.ModelView) -> str:
    return "loaded" if _status(view) == "loaded" else "unloaded"


def _status(view: wire.ModelView) -> str:
    return _STATUS.get(view["phase"], "unloaded")


def _event(told: dict[str, object]) -> bytes:
    return b"data: " + msgspec.json.encode(told) + b"\n\n"
