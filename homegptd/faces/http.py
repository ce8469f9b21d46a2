"""The HTTP door: one table of exact paths, and the server behind it.

aiohttp's low-level server calls `Door` for every request. No path is decoded, normalised or
redirected: `/v1/../sleep`, `/%73leep` or `//v1/models` are simply not there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from socket import socket
from typing import TypeAlias
from urllib.parse import unquote

from aiohttp import web

from homegptd.core.model import ModelId
from homegptd.runtime.scheduler import Scheduler

from . import apidoc, dashboard, errors, methods
from .accounts import Accounts
from .clients import Client, Headers, asks
from .desk import Desk
from .errors import Denied, Problem, Shape
from .guard import Access, Guard
from .llamacpp import LlamaCpp
from .management import Management
from .models import Models
from .overview import Overview
from .pool import Address
from .router import EngineKeys, Router, Settings, no_key
from .routes import ROUTES, Route, Where
from .server import Server
from .stored import Stored
from .target import in_origin_form

log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]

_BACKLOG = 4096
"""asyncio's 100 loses connections when a whole group of clients comes at once."""
_KEEP_ALIVE_S = 75.0


@dataclass(frozen=True, slots=True)
class Path:
    """What a path answers, by method."""

    handlers: Mapping[str, Handler]
    access: Access = Access.OPEN
    otherwise: Handler | None = None
    """Gets every other method, where the methods depend on what is behind the slash."""
    shape: Shape = Shape.OPENAI
    """How its clients expect to be turned away."""


class Door:
    """Every path there is."""

    def __init__(self, guard: Guard, router: Router) -> None:
        self.express = router.express(guard)
        self._router = router
        self._paths: dict[str, Path] = {}

    def add(self, path: str, entry: Path) -> None:
        """An exact path, or one that ends in a slash and takes names: `/operations/` NAME.

        Other faces (metrics) add theirs before the door opens.
        """
        if path in self._paths:
            raise ValueError(f"{path} is there already")
        self._paths[path] = entry

    @property
    def guard(self) -> Guard:
        """Who lets requests in; a reload puts another one here."""
        return self.express.guard

    @guard.setter
    def guard(self, guard: Guard) -> None:
        self.express.guard = guard

    @property
    def paths(self) -> Mapping[str, Path]:
        return self._paths

    async def described(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        """Every path there is, as OpenAPI."""
        return web.json_response(apidoc.document(self._paths))

    def admits(self, request: web.BaseRequest, access: Access) -> bool:
        """Whether who asked may do that now: an answer may outlive its key."""
        client = self.guard.greet(request)
        try:
            self.guard.admit(request, client, access)
        except Denied:
            return False
        asks(client)
        return True

    def close(self) -> None:
        self._router.pool.close()

    def __call__(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        client = self.guard.greet(request)
        asks(client)
        answer = self._answered(request, client)
        return _with(client.headers, answer) if client.headers else answer

    async def _answered(self, request: web.BaseRequest, client: Client) -> web.StreamResponse:
        shape = Shape.OPENAI
        try:
            if request.raw_path[:1] != "/" and "://" in request.raw_path:
                request = in_origin_form(request)
            entry, rest = self._find(request.raw_path.partition("?")[0])
            shape = entry.shape
            if request.method == "OPTIONS":
                allowed = self.guard.preflight(request, client)
                if allowed is not None:
                    return allowed
            return await self._admitted(request, client, entry)(request, rest)
        except Denied as denied:
            problem = denied.problem
        except methods.Refused as refused:
            problem = errors.of_reason(refused.reason, refused.message, hint=refused.hint)
        except ConnectionError:
            raise  # the client is gone; aiohttp knows what to do
        except Exception:
            log.exception("%s %s failed", request.method, request.raw_path[:200])
            problem = errors.of_reason("internal", "this is a defect; the log has the story")
        return errors.response(problem, shape)

    def _admitted(self, request: web.BaseRequest, client: Client, entry: Path) -> Handler:
        """Raises: Denied."""
        method = request.method
        handler = entry.handlers.get("GET" if method == "HEAD" else method, entry.otherwise)
        if handler is None:
            raise Denied(_wrong_method(method, entry.handlers))
        self.guard.admit(request, client, entry.access)
        return handler

    def _find(self, path: str) -> tuple[Path, str]:
        """Raises: Denied."""
        entry = self._paths.get(path)
        if entry is not None and (path == "/" or not path.endswith("/")):
            return entry, ""
        end = path.find("/", 1) + 1
        while end > 0:
            entry = self._paths.get(path[:end])
            if entry is not None and path[end:]:
                return entry, unquote(path[end:])
            end = path.find("/", end) + 1
        raise Denied(_not_there(path))


async def _with(headers: Headers, answer: Awaitable[web.StreamResponse]) -> web.StreamResponse:
    response = await answer
    if isinstance(response, web.Response):
        response.headers.update(headers)
    return response


def _not_there(path: str) -> Problem:
    return Problem(404, "not_found", f"there is no {path[:200]}")


def _wrong_method(method: str, known: Iterable[str]) -> Problem:
    allowed = ", ".join(known)
    text = f"the method {method[:20]} means nothing here, only {allowed}"
    return Problem(405, "method_not_allowed", text, headers={"Allow": allowed})


def build(
    *,
    scheduler: Scheduler,
    desk: Desk,
    addresses: Callable[[ModelId], Address],
    engine_keys: EngineKeys = no_key,
    settings: Settings | None = None,
    guard: Guard | None = None,
    stored: Stored | None = None,
    accounts: Accounts | None = None,
) -> Door:
    """The door with everything that the daemon answers by itself."""
    models = Models(desk)
    router = Router(
        scheduler,
        models,
        addresses=addresses,
        engine_keys=engine_keys,
        settings=settings or Settings(),
        stored=stored,
        accounts=accounts,
    )
    management = Management(scheduler, desk, models)
    llama = LlamaCpp(scheduler, desk, models, management)
    door = _open_door(router, management, llama, guard)
    look, manage = Access.LOOK, Access.MANAGE
    overview = Overview(scheduler, desk, models, door.admits)
    door.add("/", Path({"GET": dashboard.page}))
    door.add("/status", Path({"GET": overview.status}, look))
    door.add("/memory", Path({"GET": overview.memory}, look))
    door.add("/plan/", Path({"GET": overview.plan}, look))
    door.add("/events", Path({"GET": overview.events}, look))
    door.add("/models", Path({"GET": llama.models}, look))
    door.add("/models/sse", Path({"GET": llama.events}, look))
    door.add("/models/load", Path({"POST": llama.load}, manage))
    door.add("/models/unload", Path({"POST": llama.unload}, manage))
    door.add("/switch", Path({"POST": management.switch}, manage))
    door.add("/operations/", Path({"GET": management.operation}, look))
    return door


def build_model_door(
    model: ModelId,
    *,
    scheduler: Scheduler,
    desk: Desk,
    addresses: Callable[[ModelId], Address],
    engine_keys: EngineKeys = no_key,
    settings: Settings | None = None,
    guard: Guard | None = None,
    stored: Stored | None = None,
    accounts: Accounts | None = None,
) -> Door:
    """A door to one model, through the same router: asleep, it is woken instead of crashed.

    The original's per-model ports; nothing can be managed here.
    """
    models = Models(desk, only=model)
    router = Router(
        scheduler,
        models,
        addresses=addresses,
        engine_keys=engine_keys,
        settings=settings or Settings(),
        stored=stored,
        accounts=accounts,
    )
    management = Management(scheduler, desk, models)
    return _open_door(router, management, LlamaCpp(scheduler, desk, models, management), guard)


def _open_door(
    router: Router, management: Management, llama: LlamaCpp, guard: Guard | None
) -> Door:
    """What every client may ask."""
    door = Door(guard or Guard(), router)
    door.add("/health", Path({"GET": management.health}))
    door.add("/openapi.json", Path({"GET": door.described}))
    door.add("/v1/models", Path({"GET": llama.listed}, Access.USE))
    door.add("/v1/models/", Path({"GET": management.entry}, Access.USE))
    for route in ROUTES:
        if route.where is not Where.STORED:
            handlers = {route.method: _to_model(router, route)}
            door.add(route.path, Path(handlers, Access.USE, shape=route.shape))
    stored = [route for route in ROUTES if route.where is Where.STORED]
    by_id = _to_stored(router, stored)
    known = dict.fromkeys((route.method for route in stored), by_id)
    shape = stored[0].shape
    door.add("/v1/responses/", Path(known, Access.USE, otherwise=by_id, shape=shape))
    return door


def _to_model(router: Router, route: Route) -> Handler:
    def handler(request: web.BaseRequest, rest: str) -> Awaitable[web.StreamResponse]:
        if request.method != route.method:  # HEAD, where GET is relayed
            raise Denied(_wrong_method(request.method, (route.method,)))
        return router.answer(request, route)

    return handler


def _to_stored(router: Router, routes: list[Route]) -> Handler:
    """By the raw path: an id needs no escapes, so an escaped one is not there."""

    async def handler(request: web.BaseRequest, rest: str) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        here = [route for route in routes if route.ident(path)]
        if not here:
            raise Denied(_not_there(path))
        for route in here:
            if route.method == request.method:
                return await router.answer(request, route)
        raise Denied(_wrong_method(request.method, [route.method for route in here]))

    return handler


async def serve(
    door: Door, sockets: Iterable[socket], *, shutdown_s: float = 10.0
) -> web.ServerRunner:
    """Answer on listening or bound sockets, in tests as in production.

    `await runner.cleanup()` stops accepting, gives running answers `shutdown_s` and ends; then
    `door.close()`.
    """
    server = Server(
        door,
        handler_cancellation=True,  # a client that hangs up ends its request, in every phase
        access_log=None,
        keepalive_timeout=_KEEP_ALIVE_S,
        express=door.express,
        lingering_time=2.0,
    )
    runner = web.ServerRunner(server, shutdown_timeout=shutdown_s)
    await runner.setup()
    for each in sockets:
        await web.SockSite(runner, each, backlog=_BACKLOG).start()
    return runner
