"""The web application: routes that always exist, the side door, and what frames each request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Middleware

from homegptd.sim.faults import Fault
from homegptd.sim.inference import Inference
from homegptd.sim.messages import Messages
from homegptd.sim.pooling import Pooling
from homegptd.sim.responses import Responses
from homegptd.sim.shapes import DEAD, Body, Refused, refusal, reply
from homegptd.sim.speech import Speech

if TYPE_CHECKING:  # the server builds the app
    from homegptd.sim.server import SimServer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
access = logging.getLogger("uvicorn.access")
_CHAT = ("/v1/", "/score", "/rerank")


def build(server: SimServer) -> web.Application:
    """The application of one server."""
    app = web.Application(
        middlewares=[_frame(server), _key(server), _faulty(server)], client_max_size=1 << 30
    )
    app.on_response_prepare.append(_name_server)
    face = _Face(server)
    app.add_routes(face.routes())
    app.add_routes(_tasks(server))
    app.add_routes(server.control.routes())
    return app


def _tasks(server: SimServer) -> list[web.RouteDef]:
    """What the model is for."""
    match server.options.kind:
        case "generate":
            inference = Inference(server.intake)
            responses = Responses(inference, server.spawn)
            return [*inference.routes(), *responses.routes(), *Messages(inference).routes()]
        case "audio":
            return Speech(Inference(server.intake)).routes()
        case _:
            return Pooling(server.intake).routes()


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "uvicorn"


def _frame(server: SimServer) -> Middleware:  # the outermost: errors in vLLM's shapes, access log
    @web.middleware
    async def frame(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            answer = await handler(request)
        except Refused as why:
            answer = refusal(why)
            server.metrics.rejected += why.status == 503
        except web.HTTPException as why:
            allow = {"Allow": why.headers["Allow"]} if "Allow" in why.headers else None
            answer = reply({"detail": why.reason}, status=why.status, headers=allow)
        client, what = request.remote or "", f"{request.method} {request.path_qs} HTTP/1.1"
        access.info('%s - "%s" %d %s', client, what, answer.status, answer.reason)
        return answer

    return frame


def _key(server: SimServer) -> Middleware:
    """The API key guards a few prefixes only."""
    wanted = f"Bearer {server.options.api_key}"
    prefixes = server.engine.profile.guarded_prefixes

    @web.middleware
    async def key(request: web.Request, handler: Handler) -> web.StreamResponse:
        guarded = server.options.api_key and request.path.startswith(prefixes)
        if guarded and request.headers.get("Authorization") != wanted:
            return reply({"error": "Unauthorized"}, status=401)
        return await handler(request)

    return key


def _faulty(server: SimServer) -> Middleware:
    """Faults of requests that do not go through `Control`."""

    @web.middleware
    async def faulty(request: web.Request, handler: Handler) -> web.StreamResponse:
        operation = _operation(request)
        if operation is not None:
            await _strike(server, request, operation)
        return await handler(request)

    return faulty


def _operation(request: web.Request) -> str | None:
    match request.path:
        case "/health" | "/ping":
            return "health"
        case "/v1/models":
            return "models"
        case "/metrics":
            return "metrics"
        case path if path.startswith(_CHAT) and request.method == "POST":
            return "chat"
        case _:
            return None


async def _strike(server: SimServer, request: web.Request, operation: str) -> None:
    faults, engine = server.faults, server.engine
    loop, speed = asyncio.get_running_loop(), server.options.speed
    if fault := faults.take("reset", operation):
        if request.transport is not None:
            loop.call_later(fault.value / speed, request.transport.abort)
        if not fault.value:
            raise Refused(500, "connection reset")
    if fault := faults.take("die", operation):
        if fault.value:
            loop.call_later(fault.value / speed, engine.die, "killed by a fault")
        else:
            engine.die("killed by a fault")
    if operation == "chat" and faults.take("oom", operation):
        engine.die("CUDA out of memory. Tried to allocate 1.00 GiB.")
    if faults.take("500", operation):
        raise Refused(500, "Internal Server Error")
    if (fault := faults.peek("hang", operation)) and fault.on is not None:
        faults.take("hang", operation)
        await engine.for_ever()
    if fault := faults.take("slow", operation):
        await engine.pass_time(fault.value)


class _Face:
    """Endpoints of the API server that never cross into the engine, and the side door."""

    def __init__(self, server: SimServer) -> None:
        self.server = server

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health, allow_head=False),
            web.get("/ping", self.health, allow_head=False),
            web.post("/ping", self.health),
            web.get("/version", self.version, allow_head=False),
            web.get("/load", self.load, allow_head=False),
            web.get("/metrics", self.metrics, allow_head=False),
            web.get("/v1/models", self.models, allow_head=False),
            web.get("/sim/state", self.state, allow_head=False),
            web.post("/sim/fault", self.add_fault),
            web.delete("/sim/fault", self.clear_faults),
            web.post("/sim/die", self.die),
        ]

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.server.engine.dead else 200)

    async def version(self, request: web.Request) -> web.Response:
        return reply({"version": self.server.options.version})

    async def load(self, request: web.Request) -> web.Response:
        counted = self.server.options.server_load
        return reply({"server_load": self.server.intake.open if counted else 0})

    async def metrics(self, request: web.Request) -> web.Response:
        text = self.server.metrics.text(self.server.engine)
        kind = "text/plain; version=1.0.0; charset=utf-8"
        return web.Response(body=text.encode(), headers={"Content-Type": kind})

    async def models(self, request: web.Request) -> web.Response:
        options = self.server.options
        data: list[Body] = [
            {
                "id": name,
                "object": "model",
                "created": int(time.time()),
                "owned_by": "vllm",
                "root": options.model,
                "parent": None,
                "max_model_len": options.max_model_len,
                "permission": [],
            }
            for name in options.names
        ]
        return reply({"object": "list", "data": data})

    # -- side door -----------------------------------------------------------------------------

    async def state(self, request: web.Request) -> web.Response:
        return reply(state_of(self.server))

    async def add_fault(self, request: web.Request) -> web.Response:
        body = await request.json()
        try:
            fault = Fault(**body)
        except (TypeError, ValueError) as why:
            raise Refused(400, str(why)) from None
        fault.value = float(fault.value or 0)
        self.server.faults.ordered.append(fault)
        self.server.engine.notify()
        return reply(asdict(fault))

    async def clear_faults(self, request: web.Request) -> web.Response:
        name, faults = request.query.get("name"), self.server.faults
        faults.ordered = [f for f in faults.ordered if name is not None and f.name != name]
        self.server.engine.notify()
        return reply({"faults": [asdict(f) for f in faults.ordered]})

    async def die(self, request: web.Request) -> web.Response:
        self.server.engine.die("killed at the side door")
        return reply({"died": True, "message": DEAD})


def state_of(server: SimServer) -> Body:
    """The truth behind the API, for tests: what is mapped, what is believed, what is pending."""
    engine, memory = server.engine, server.engine.memory
    with engine.card.locked() as box:
        gpu_mib = {str(g): box.held_mib(memory.owner, g) for g in memory.footprint.gpus}
        free_mib = {str(g): box.free_mib(g) for g in memory.footprint.gpus}
        held = box.holdings.get(memory.owner)
        pinned_mib = held.pinned_mib if held else 0
    return {
        "stage": server.stage,
        "dead": engine.dead,
        "paused": engine.paused,
        "executor_asleep": sorted(engine.executor_asleep),
        "memory_asleep": sorted(memory.asleep),
        "level": memory.level,
        "weights_valid": memory.weights_valid,
        "residue_mib": memory.residue_mib,
        "kv_mib": memory.kv_mib,
        "gpu_mib": gpu_mib,
        "gpu_free_mib": free_mib,
        "pinned_mib": pinned_mib,
        "running": engine.running,
        "waiting": engine.waiting,
        "prompts": [turn.prompt for turn in engine.turns],
        "control_pending": engine.control_pending,
        "faults": [asdict(f) for f in server.faults.ordered],
    }
