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

from . import errors, methods
from .accounts import Accounts
from .clients import Client, asks
from .desk import Desk
from .errors import Denied, Problem, Shape
from .guard import Access, Guard
from .management import Management
from .models import Models
from .router import ROUTES, EngineKeys, Route, Router, Settings, no_key
from .server import Server
from .upstream import Address

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
    shape: Shape = Shape.OPENAI
    """How its clients expect to be turned away."""


class Door:
    """Every path there is."""

    def __init__(self, guard: Guard, router: Router) -> None:
        self.guard = guard
        self._router = router
        self._paths: dict[str, Path] = {}

    def add(self, path: str, entry: Path) -> None:
        """An exact path, or one that ends in a slash and takes names: `/operations/` NAME.

        Other faces (dashboard, metrics) add theirs before the door opens.
        """
        if path in self._paths:
            raise ValueError(f"{path} is there already")
        self._paths[path] = entry

    def close(self) -> None:
        self._router.pool.close()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        client = self.guard.greet(request)
        asks(client)
        response = await self._answered(request, client)
        if client.headers and isinstance(response, web.Response):
            response.headers.update(client.headers)
        return response

    async def _answered(self, request: web.BaseRequest, client: Client) -> web.StreamResponse:
        shape = Shape.OPENAI
        try:
            entry, rest = self._find(request.raw_path.partition("?")[0])
            shape = entry.shape
            return await self._answer(request, client, entry, rest)
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

    async def _answer(
        self, request: web.BaseRequest, client: Client, entry: Path, rest: str
    ) -> web.StreamResponse:
        method = request.method
        if method == "OPTIONS" and (allowed := self.guard.preflight(request, client)) is not None:
            return allowed
        handler = entry.handlers.get("GET" if method == "HEAD" else method)
        if handler is None:
            raise Denied(_wrong_method(method, entry))
        self.guard.admit(request, client, entry.access)
        return await handler(request, rest)

    def _find(self, path: str) -> tuple[Path, str]:
        """Raises: Denied."""
        entry = self._paths.get(path)
        if entry is not None and not path.endswith("/"):
            return entry, ""
        end = path.find("/", 1) + 1
        while end > 0:
            entry = self._paths.get(path[:end])
            if entry is not None and path[end:]:
                return entry, unquote(path[end:])
            end = path.find("/", end) + 1
        raise Denied(Problem(404, "not_found", f"there is no {path[:200]}"))


def _wrong_method(method: str, entry: Path) -> Problem:
    allowed = ", ".join(entry.handlers)
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
        accounts=accounts,
    )
    management = Management(scheduler, desk, models)
    door = _open_door(router, management, guard)
    look, manage = Access.LOOK, Access.MANAGE
    door.add("/models", Path({"GET": management.models}, look))
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
        accounts=accounts,
    )
    return _open_door(router, Management(scheduler, desk, models), guard)


def _open_door(router: Router, management: Management, guard: Guard | None) -> Door:
    """What every client may ask."""
    door = Door(guard or Guard(), router)
    door.add("/health", Path({"GET": management.health}))
    door.add("/v1/models", Path({"GET": management.listed}, Access.USE))
    door.add("/v1/models/", Path({"GET": management.entry}, Access.USE))
    for route in ROUTES:
        door.add(route.path, Path({"POST": _to_model(router, route)}, Access.USE, route.shape))
    return door


def _to_model(router: Router, route: Route) -> Handler:
    async def handler(request: web.BaseRequest, rest: str) -> web.StreamResponse:
        return await router.answer(request, route)

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
        lingering_time=2.0,
    )
    runner = web.ServerRunner(server, shutdown_timeout=shutdown_s)
    await runner.setup()
    for each in sockets:
        await web.SockSite(runner, each, backlog=_BACKLOG).start()
    return runner
