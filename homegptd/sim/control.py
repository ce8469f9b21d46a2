"""The dev-mode endpoints: sleep, wake, pause, collective_rpc and their neighbours.

A call that crosses into the engine runs apart from the connection it came on: when the client
gives up it goes on all the same, as in vLLM. The server has no timeouts of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast, get_args

from aiohttp import web

from homegptd.sim.engine import Engine
from homegptd.sim.metrics import Metrics
from homegptd.sim.physics import PhysicsError
from homegptd.sim.scheduler import Mode
from homegptd.sim.shapes import DEAD, Body, Refused, reply

Detach = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
_METHODS = ("reload_weights", "sleep", "wake_up", "check_health", "get_model")


class Control:
    """Handlers for one engine. `detach` runs a coroutine that outlives its request."""

    def __init__(self, engine: Engine, metrics: Metrics, detach: Detach) -> None:
        self.engine = engine
        self.metrics = metrics
        self.detach = detach

    def routes(self) -> list[web.RouteDef]:
        known, dev = self.engine.profile, self.engine.options.dev_mode
        routes: list[web.RouteDef] = []
        if known.has_pause and (dev or not known.pause_needs_dev_mode):
            routes += [
                web.post("/pause", self.pause),
                web.post("/resume", self.resume),
                web.get("/is_paused", self.is_paused, allow_head=False),
            ]
        if not dev:
            return routes
        if known.releases_kv:
            routes.append(web.post("/release_kv_cache_memory", self.release_kv))
        return [
            *routes,
            web.post("/sleep", self.sleep),
            web.post("/wake_up", self.wake),
            web.get("/is_sleeping", self.is_sleeping, allow_head=False),
            web.post("/collective_rpc", self.collective_rpc),
            web.post("/reset_prefix_cache", self.reset_prefix_cache),
            web.post("/reset_mm_cache", self.empty),
            web.post("/reset_encoder_cache", self.empty),
            web.get("/server_info", self.server_info, allow_head=False),
        ]

    # -- sleep and wake ------------------------------------------------------------------------

    async def sleep(self, request: web.Request) -> web.Response:
        level, mode = self._sleep_parameters(request)
        await self._timed("sleep", request, lambda: self._sleep(level, mode))
        self.metrics.slept(level)
        return self._answer({"status": "sleeping", "level": level})

    async def _sleep(self, level: int, mode: Mode) -> None:
        faults, engine = self.engine.faults, self.engine
        if faults.take("500", "sleep"):
            await engine.poisonous_sleep(level, mode)
            raise PhysicsError("Memory usage increased after sleeping.")
        if faults.take("lie", "sleep"):
            return
        half = faults.take("half", "sleep")
        await engine.sleep(level, mode, keep=("weights",) if half else ())

    async def wake(self, request: web.Request) -> web.Response:
        tags: list[str] | None = request.query.getall("tags", []) or None
        awake = await self._timed("wake", request, lambda: self._wake(tags))
        if awake or not self.engine.profile.json_bodies:
            self.metrics.sleep_state = "awake"
        return self._answer({"status": "awake" if awake else "sleeping", "tags": tags})

    async def _wake(self, tags: list[str] | None) -> bool:
        faults = self.engine.faults
        if faults.take("500", "wake"):
            raise PhysicsError("Internal Server Error")
        if faults.take("lie", "wake"):
            return True
        if faults.take("half", "wake"):
            return await self.engine.wake(["weights"])
        return await self.engine.wake(tags)

    async def is_sleeping(self, request: web.Request) -> web.Response:
        asleep = await self._crossing("is_sleeping", request, self.engine.is_sleeping)
        return reply({"is_sleeping": asleep})

    def _sleep_parameters(self, request: web.Request) -> tuple[int, Mode]:
        text, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
        try:
            level = int(text)
        except ValueError:
            if self.engine.profile.json_bodies:
                raise Refused(400, _invalid("level", "a valid integer"), "query.level") from None
            raise Refused(500, f"invalid literal for int() with base 10: {text!r}") from None
        if self.engine.profile.json_bodies and not 0 <= level <= 2:
            raise Refused(400, _invalid("level", "between 0 and 2"), "query.level")
        if not self.engine.profile.pauses_scheduler:
            mode = "abort"
        if mode not in get_args(Mode):
            raise Refused(400, _invalid("mode", "'abort', 'wait' or 'keep'"), "query.mode")
        return level, cast("Mode", mode)

    # -- scheduler and workers -----------------------------------------------------------------

    async def pause(self, request: web.Request) -> web.Response:
        mode = request.query.get("mode", "abort")
        if mode not in get_args(Mode):
            raise Refused(400, _invalid("mode", "'abort', 'wait' or 'keep'"), "query.mode")
        await self._crossing("pause", request, lambda: self.engine.pause(cast("Mode", mode)))
        return reply({"status": "paused"})

    async def resume(self, request: web.Request) -> web.Response:
        async def resume() -> None:
            self.engine.resume()

        await self._crossing("resume", request, resume)
        return reply({"status": "resumed"})

    async def is_paused(self, request: web.Request) -> web.Response:
        return reply({"is_paused": self.engine.paused != "no"})

    async def release_kv(self, request: web.Request) -> web.Response:
        if self.engine.paused == "no":
            raise Refused(500, "KV cache memory can only be released while the scheduler is paused")
        return reply({"status": "kv_cache_released"})

    async def collective_rpc(self, request: web.Request) -> web.Response:
        try:
            body = json.loads(await request.read())
        except ValueError as why:
            raise Refused(400, f"JSON decode error: {why}") from None
        method = body.get("method") if isinstance(body, dict) else None
        if not method:
            raise Refused(400, "Missing 'method' in request body")
        if method not in _METHODS:
            raise Refused(500, f"Call to collective_rpc method failed: no method {method!r}")
        if method == "reload_weights":
            await self._crossing("reload", request, self._reload)
        workers = self.engine.options.tensor_parallel
        return reply({"results": [None] * workers})

    async def _reload(self) -> None:
        if self.engine.faults.take("500", "reload"):
            raise PhysicsError("Model reloading with this load format is not implemented")
        if not self.engine.faults.take("lie", "reload"):
            await self.engine.reload()

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        self.engine.reset_prefix_cache()
        return self._answer({"success": True})

    async def empty(self, request: web.Request) -> web.Response:
        return web.Response()

    async def server_info(self, request: web.Request) -> web.Response:
        options = self.engine.options
        config: Body = {
            "model_config": {"model": options.model, "max_model_len": options.max_model_len},
            "cache_config": {
                "gpu_memory_utilization": options.footprint.utilisation,
                "kv_cache_memory_bytes": options.kv_bytes,
            },
            "parallel_config": {"tensor_parallel_size": options.tensor_parallel},
        }
        return reply({"vllm_config": config, "vllm_env": {}, "system_env": {}})

    # -- crossing ------------------------------------------------------------------------------

    async def _timed(
        self, operation: str, request: web.Request, work: Callable[[], Coroutine[Any, Any, Any]]
    ) -> Any:
        clock, kept = asyncio.get_running_loop().time, self.metrics.operations[operation]

        async def timed() -> Any:
            began = clock()
            kept.in_flight += 1
            try:
                return await work()
            finally:
                kept.in_flight -= 1
                kept.observe(clock() - began)

        return await self._crossing(operation, request, timed)

    async def _crossing(
        self, operation: str, request: web.Request, work: Callable[[], Coroutine[Any, Any, Any]]
    ) -> Any:
        """Do `work` in the engine, whatever becomes of the client. Raises Refused."""
        if self.engine.dead:
            raise Refused(500, DEAD)
        if self.engine.faults.take("reset", operation) and request.transport is not None:
            request.transport.abort()
            raise Refused(500, "connection reset")
        return await self.detach(self._cross(operation, work))

    async def _cross(self, operation: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        engine, faults = self.engine, self.engine.faults
        if faults.take("die", operation):
            engine.die("killed by a fault")
            raise Refused(500, DEAD)
        engine.control_pending += 1
        if faults.take("zombie", operation):
            engine.die("killed by a fault during a control call")
        await engine.while_hung()
        if faults.take("hang", operation):
            await engine.for_ever()
        if slow := faults.take("slow", operation):
            await engine.pass_time(slow.value)
        try:
            result = await work()
        except PhysicsError as why:
            result = Refused(500, f"Call to {operation} method failed: {why}")
        if late := faults.take("late", operation):
            await engine.pass_time(late.value)
        if engine.dead:  # never answered: this makes the zombie
            await engine.for_ever()
        engine.control_pending -= 1
        if isinstance(result, Refused):
            raise result
        return result

    def _answer(self, body: Body) -> web.Response:
        """JSON from 0.32 on, an empty 200 before."""
        return reply(body) if self.engine.profile.json_bodies else web.Response()


def _invalid(name: str, wanted: str) -> str:
    return f"Input should be {wanted}: parameter {name}"
