"""What the original manager offered over HTTP (health, models, switch), and a look at operations.

Handlers take the request and the rest of the path behind theirs (empty for an exact path).
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TypeVar

import msgspec
from aiohttp import web

from homegptd.core.model import Act, ModelId
from homegptd.runtime.scheduler import Scheduler
from homegptd.wire import control as wire

from . import errors, methods
from .bodies import read_body
from .clients import asking
from .desk import Desk
from .errors import Denied
from .models import Models
from .views import can_serve

_SMALL_BODY = 64 * 1024
Wish = TypeVar("Wish")


class _Switch(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /switch."""

    model_id: str
    now: bool = False


class Management:
    """What the original manager offered over HTTP, and a look at operations."""

    def __init__(self, scheduler: Scheduler, desk: Desk, models: Models) -> None:
        self._scheduler = scheduler
        self._desk = desk
        self._models = models

    async def health(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        """200 once the bootstrap is over and some model is up or can be brought up."""
        state = self._scheduler.state
        status = await self._desk.status()
        ok = state.booted and not state.stopping and can_serve(state)
        told: dict[str, object] = {
            "status": "ok" if ok else status["phase_of_daemon"],
            "phase": status["phase_of_daemon"],
        }
        client = asking()
        if client.known:
            seen = [view for view in status["models"] if client.sees(ModelId(view["id"]))]
            told["models"] = {view["id"]: view["status"] for view in seen}
            told["version"] = status["version"]
            if len(seen) == len(status["models"]):  # it names them all
                told["summary"] = status["summary"]
        headers = None if ok else {"Retry-After": "5"}
        return web.json_response(told, status=200 if ok else 503, headers=headers)

    async def models(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        return web.json_response(self._models.views())

    async def switch(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        """Answers when the switch has ended; with `?wait=false` at once, with the operation."""
        wait = _flag(request, "wait", default=True)
        wish = await json_body(request, _Switch, '{"model_id": "…"}', param="model_id")
        if self._models.find(wish.model_id) is None:
            raise Denied(errors.refused(self._models.unknown(wish.model_id), param="model_id"))
        by = f"http {request.remote or 'local'}"
        view = self._desk.begin(Act.SWITCH, wish.model_id, by=by, cut=wish.now)
        if not wait:
            where = {"Location": f"/operations/{view['id']}"}
            return web.json_response(self._models.shown(view), status=202, headers=where)
        return ended(self._models.shown(await self.end_of(view)))

    async def end_of(self, view: wire.OperationView) -> wire.OperationView:
        """Its last view."""
        async with aclosing(self._desk.operation_updates(view["id"])) as updates:
            async for update in updates:
                view = update
        return view

    async def operation(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        if not (rest.isascii() and rest.isdigit() and len(rest) < 16):
            raise methods.Refused("unknown-operation", f'no operation "{rest[:100]}"')
        view = await self._desk.operation(int(rest))
        if not asking().sees(ModelId(view["model"] or "")):
            raise methods.Refused("unknown-operation", f"no operation {rest}")
        return web.json_response(self._models.shown(view))

    async def listed(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        return web.json_response(self._models.listed())

    async def entry(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        entry = self._models.entry(rest)
        if entry is None:
            raise Denied(errors.refused(self._models.unknown(rest)))
        return web.json_response(entry)


def _flag(request: web.BaseRequest, name: str, *, default: bool) -> bool:
    given = request.query.get(name)
    if given is None:
        return default
    if given not in ("true", "false", "1", "0"):
        text = f'"{name}" must be true or false'
        raise Denied(errors.bad_request(text, param=name))
    return given in ("true", "1")


async def json_body(request: web.BaseRequest, kind: type[Wish], form: str, *, param: str) -> Wish:
    """Raises: Denied: 415, 400 where the body is not JSON, 422 where it is not the right JSON."""
    if request.content_type != "application/json":
        text = f'the content type is "{request.content_type}", it must be application/json'
        raise Denied(errors.bad_request(text, status=415))
    body = await read_body(request, _SMALL_BODY)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as why:
        told = str(why)  # msgspec names the place as `$.model_id`
        text = f"the body must be {form}: {told[:1].lower()}{told[1:]}"
        raise Denied(errors.bad_request(text, param=param, status=422)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as why:
        raise Denied(errors.bad_request(f"the body is not JSON: {why}")) from None


def ended(view: wire.OperationView) -> web.Response:
    """An operation that has ended, as an answer."""
    failed = view["error"]
    if failed is None:
        return web.json_response(view)
    problem = errors.of_reason(failed["reason"], failed["message"], hint=failed["hint"])
    told = errors.body(problem, errors.Shape.OPENAI) | {"operation": view}
    return web.json_response(told, status=problem.status, headers=problem.headers)
