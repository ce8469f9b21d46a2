"""A small real `Control`: two models in memory, operations that go on when they are let."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from homegptd.faces.methods import Caller, Refused
from homegptd.wire import control as wire

FIGURE: wire.FigureView = {
    "kind": "awake", "gpu": 0, "mib": 58000, "margin_mib": 368, "source": "measured", "at": 1900.0,
}  # fmt: skip


class SmallBox:
    """`chat` is awake, `coder` (alias `code`) asleep; `go()` lets the next step end if `paced`."""

    def __init__(self, *, paced: bool = False) -> None:
        self.awake = {"chat": True, "coder": False}
        self.operations: dict[int, wire.OperationView] = {}
        self.calls: list[tuple[str, Caller]] = []
        self._changed = asyncio.Condition()
        self._subscribers: set[asyncio.Queue[wire.EventNotice]] = set()
        self._steps = asyncio.Semaphore(0)
        self._paced = paced
        self.fail_with: wire.FailureView | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self.log_text = ["one", "two", "three"]

    async def run(self, ready: asyncio.Event | None = None) -> None:
        """Own the operations until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            if ready:
                ready.set()
            await asyncio.Event().wait()

    def go(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._steps.release()

    def tell(self, message: str) -> None:
        event: wire.EventNotice = {
            "time": time.time(), "level": "info", "kind": "told", "model": None,
            "message": message, "fields": {},
        }  # fmt: skip
        for queue in self._subscribers:
            queue.put_nowait(event)

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    async def status(self) -> wire.StatusView:
        now = time.time()
        running = [op for op in self.operations.values() if op["state"] == "running"]
        return {
            "version": "0.1.0", "pid": 4242, "started_at": now - 3600, "now": now, "ready": True,
            "phase_of_daemon": "ready", "summary": "chat awake, 1 asleep", "default": "chat",
            "models": [self._model("chat", now), self._model("coder", now)],
            "queue": [{"model": "coder", "waiting": 2, "since": now - 5}],
            "gpus": [{"index": 0, "name": "Toy 80", "total_mib": 81920, "used_mib": 58368,
                      "reserved_mib": 4096, "foreign_mib": 0, "foreign": "", "free_mib": 19456,
                      "held": [], "freed_by": None}],
            "host": {"total_mib": 131072, "used_mib": 20000, "foreign_mib": 0, "foreign": "",
                     "free_mib": 111072, "held": []},
            "operations": running,
        }  # fmt: skip

    def _model(self, name: str, now: float) -> wire.ModelView:
        up = self.awake[name]
        return {
            "id": name, "name": name.title(), "aliases": ["code"] if name == "coder" else [],
            "status": "active" if up else "sleeping", "phase": "awake" if up else "asleep",
            "since": now - 184, "level": None if up else 1, "gpus": [0],
            "memory_mib": {"gpu": 58368 if up else 1200, "host": 0 if up else 18637},
            "figures": [FIGURE],
            "requests": {"running": 2 if up else 0, "waiting": 0 if up else 2, "frozen": 0},
            "until": now + 724 if up else None,
            "why": "idle, then sleeps" if up else "wakes on request",
            "default": name == "chat", "pinned": False, "error": None,
        }  # fmt: skip

    def _known(self, model: str) -> str:
        name = "coder" if model == "code" else model
        if name not in self.awake:
            hint = f"known are {', '.join(self.awake)}"
            raise Refused("unknown-model", f'there is no model "{model}"', hint=hint)
        return name

    def _begin(
        self, kind: str, caller: Caller, model: str | None, *steps: str
    ) -> wire.OperationView:
        self.calls.append((kind, caller))
        view: wire.OperationView = {
            "id": len(self.operations) + 17, "kind": kind, "model": model, "by": str(caller),
            "since": time.time(), "state": "running", "outcome": None, "error": None,
            "steps": [{"do": do, "model": model or "", "state": "waiting", "seconds": None,
                       "expected_s": 1.5} for do in steps],
            "elapsed_s": 0.0, "expected_s": 1.5 * len(steps),
        }  # fmt: skip
        self.operations[view["id"]] = view
        assert self._tasks is not None
        self._tasks.create_task(self._carry_out(view["id"]), name=f"operation {view['id']}")
        return view

    async def _carry_out(self, number: int) -> None:
        for index in range(len(self.operations[number]["steps"])):
            await self._step(number, index, "running")
            if self._paced:
                await self._steps.acquire()
            if self.operations[number]["state"] != "running":
                return
            await self._step(number, index, "done")
        failed = self.fail_with
        await self._change(
            number, state="failed" if failed else "done", error=failed,
            outcome=None if failed else f"{self.operations[number]['kind']} done",
        )  # fmt: skip

    async def _step(self, number: int, index: int, state: str) -> None:
        steps: list[Any] = [dict(step) for step in self.operations[number]["steps"]]
        steps[index] |= {"state": state, "seconds": 1.25 if state == "done" else 0.0}
        await self._change(number, steps=steps)

    async def _change(self, number: int, **values: Any) -> None:
        async with self._changed:
            changed: Any = self.operations[number] | values
            self.operations[number] = changed
            self._changed.notify_all()

    async def switch(
        self, caller: Caller, model: str, *, now: bool, force: bool
    ) -> wire.OperationView:
        name = self._known(model)
        return self._begin("switch", caller, name, "drain", "sleep", "wake")

    async def sleep(
        self, caller: Caller, model: str, *, level: wire.Level | None
    ) -> wire.OperationView:
        return self._begin("sleep", caller, self._known(model), f"sleep {level or 1}")

    async def wake(self, caller: Caller, model: str) -> wire.OperationView:
        if self._known(model) == "coder":
            hint = "homegptctl switch coder"
            raise Refused("does-not-fit", "57.0 + 57.0 GiB do not fit 80.0 GiB", hint=hint)
        return self._begin("wake", caller, model)

    async def start(self, caller: Caller, model: str) -> wire.OperationView:
        return self._begin("start", caller, self._known(model), "start")

    async def stop(self, caller: Caller, model: str, *, now: bool) -> wire.OperationView:
        return self._begin("stop", caller, self._known(model), "cut" if now else "drain", "stop")

    async def prove(self, caller: Caller, model: str) -> wire.OperationView:
        raise RuntimeError("a bug")

    async def free(self, caller: Caller, gpu: int | None, *, now: bool) -> wire.OperationView:
        return self._begin("free", caller, None, "sleep")

    async def reclaim(self, caller: Caller, gpu: int | None) -> wire.OperationView:
        return self._begin("reclaim", caller, None, "wake")

    async def reload(self, caller: Caller) -> wire.OperationView:
        return self._begin("reload", caller, None, "read")

    async def operation(self, operation_id: int) -> wire.OperationView:
        if operation_id not in self.operations:
            raise Refused("unknown-operation", f"there is no operation {operation_id}")
        return self.operations[operation_id]

    async def cancel(self, caller: Caller, operation_id: int) -> wire.OperationView:
        await self.operation(operation_id)
        await self._change(operation_id, state="cancelled", outcome="given up")
        return self.operations[operation_id]

    async def plan(self, model: str) -> wire.PlanView:
        return {
            "model": self._known(model), "fits": True, "expected_s": 4.5,
            "eta": {"low_s": 4.0, "mid_s": 4.5, "high_s": 6.0},
            "steps": [{"do": "sleep", "model": "chat", "expected_s": 1.5, "why": "makes room"},
                      {"do": "wake", "model": "coder", "expected_s": 3.0, "why": "asked for"}],
            "sum": ["GPU 0: 57.0 of 80.0 GiB after the switch"],
        }  # fmt: skip

    async def memory(self, model: str | None) -> wire.MemoryReport:
        chosen = ["chat", "coder"] if model is None else [self._known(model)]
        models: list[wire.MemoryModelView] = [
            {"id": name, "phase": "awake", "figures": [FIGURE], "measured_with": "0.32.0",
             "grown_mib": 0, "holds_gpu_mib": {"0": 58000}, "holds_host_mib": 4096}
            for name in chosen
        ]  # fmt: skip
        return {
            "now": 2000.0, "measures": True, "pressure": 0.0, "places": [], "models": models,
        }  # fmt: skip

    async def logs(self, model: str, *, lines: int) -> wire.LogsView:
        self._known(model)
        return {"lines": self.log_text[-lines:], "follow": ["echo", "and what came then"]}

    async def operation_updates(
        self, operation_id: int
    ) -> AsyncGenerator[wire.OperationView, None]:
        view = self.operations[operation_id]
        yield view
        while view["state"] == "running":
            async with self._changed:
                while self.operations[operation_id] is view:
                    await self._changed.wait()
            view = self.operations[operation_id]
            yield view

    def event_stream(self) -> AsyncGenerator[wire.EventNotice, None]:
        queue: asyncio.Queue[wire.EventNotice] = asyncio.Queue()
        self._subscribers.add(queue)
        return self._events(queue)

    async def _events(
        self, queue: asyncio.Queue[wire.EventNotice]
    ) -> AsyncGenerator[wire.EventNotice, None]:
        try:
            while True:
                yield await queue.get()
        finally:
            self._subscribers.discard(queue)
