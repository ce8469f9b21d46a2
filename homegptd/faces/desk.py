"""What every face asks of the daemon, answered from snapshots: status, operations, plans, events.

Fits `Control` of the control socket and what the HTTP management needs.
"""

import asyncio
import os
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from homegptd import __version__
from homegptd.core import forecast, plans
from homegptd.core.durations import Span
from homegptd.core.model import Act, Awake, Gpu, ModelId, OperationId, SleepLevel
from homegptd.core.refusals import Reason
from homegptd.core.story import Line, summary
from homegptd.runtime.ports import MeterPort
from homegptd.runtime.scheduler import Scheduler
from homegptd.wire import control as wire

from . import places, views
from .accounts import Accounts
from .adjust import Adjustment
from .memory import report
from .methods import Caller, Refused
from .progress import Progress, foresee

_KEPT = 200
"""Ended operations that can still be looked at."""
_MOST = 100
"""Operations under way; more are refused."""
_BACKLOG = 1000
"""Events kept for a subscriber that is slow."""
_TOLD = 60
"""Events kept for who comes later."""

Logs = Callable[[ModelId, int], Awaitable[wire.LogsView]]
Reload = Callable[[], Awaitable[str]]
"""Reads the configuration again and applies it; returns what changed. Raises methods.Refused."""


class Desk:
    """One for the life of the daemon; `open` it while the scheduler runs."""

    def __init__(
        self,
        scheduler: Scheduler,
        names: views.Names,
        *,
        kinds: Mapping[ModelId, str] | None = None,
        adjustments: Mapping[ModelId, Adjustment] | None = None,
        by_id_only: frozenset[ModelId] = frozenset(),
        logs: Logs,
        reload: Reload,
        accounts: Accounts | None = None,
        meter: MeterPort | None = None,
    ) -> None:
        self._scheduler = scheduler
        self.names = names
        self.kinds = kinds or {}
        self.adjustments = adjustments or {}
        self.by_id_only = by_id_only
        """Models whose engine may know no alias."""
        self._logs = logs
        self._reload = reload
        self._accounts = accounts or Accounts()
        self._meter = meter
        self._operations: OrderedDict[int, Progress] = OrderedDict()
        self._news = asyncio.Event()
        self._readers: list[deque[wire.EventNotice]] = []
        self._told: deque[wire.EventNotice] = deque(maxlen=_TOLD)
        self._told_count = 0
        self.started_at = time.time()

    @contextmanager
    def open(self) -> Iterator["Desk"]:
        """Follow the story for the duration of the block."""
        with self._scheduler.watched(self._tell):
            yield self

    # ------------------------------------------------------------ looking

    def resolve(self, name: str) -> ModelId | None:
        """The model of that id or alias."""
        if name in self._scheduler.state.engines:
            return ModelId(name)
        return next((model for model, (_, also) in self.names.items() if name in also), None)

    def known(self) -> Collection[ModelId]:
        return self._scheduler.models

    def default(self) -> ModelId | None:
        return self._scheduler.state.policy.default

    def awake(self) -> list[ModelId]:
        """The models that serve at once, the one used last first."""
        engines = self._scheduler.state.engines
        up = [name for name, engine in engines.items() if isinstance(engine.phase, Awake)]
        return sorted(up, key=lambda name: engines[name].last_used, reverse=True)

    def models(self) -> list[wire.ModelView]:
        return views.models_view(self._scheduler.state, self.names, self._wall)

    async def status(self) -> wire.StatusView:
        state = self._scheduler.state
        phase = views.daemon_phase(state)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started_at": self.started_at,
            "now": time.time(),
            "ready": state.booted,
            "phase_of_daemon": phase,
            "summary": summary(state),
            "default": state.policy.default,
            "models": self.models(),
            "queue": views.queue_view(state, self._wall),
            "gpus": places.gpus_view(state),
            "host": places.host_view(state),
            "operations": [self._view(each.id) for each in state.operations],
            "accounts": views.accounts_view(self._accounts.snapshot()),
        }

    async def plan(self, model: str) -> wire.PlanView:
        state, known = self._scheduler.state, self._known(model)
        plan = plans.plan_switch(state, known)
        now = self._scheduler.loop.time()
        eta = forecast.eta(state, known, now, ordered=True) if plan.fits else None
        return {
            "model": plan.model,
            "fits": plan.fits,
            "steps": [
                {
                    "do": step.do,
                    "model": step.model,
                    "expected_s": _rounded(step.expected_s),
                    "why": step.why,
                }
                for step in plan.steps
            ],
            "expected_s": _rounded(plan.expected_s) if plan.fits else None,
            "eta": None if eta is None else _span(eta),
            "sum": list(plan.sums),
        }

    async def memory(self, model: str | None) -> wire.MemoryReport:
        chosen = [self._known(model)] if model is not None else None
        return await report(lambda: self._scheduler.state, self._meter, chosen)

    async def logs(self, model: str, *, lines: int) -> wire.LogsView:
        return await self._logs(self._known(model), lines)

    # ------------------------------------------------------------ verbs

    async def switch(
        self, caller: Caller, model: str, *, now: bool, force: bool
    ) -> wire.OperationView:
        return self.begin(Act.SWITCH, model, by=str(caller), cut=now, force=force)

    async def sleep(
        self, caller: Caller, model: str, *, level: wire.Level | None
    ) -> wire.OperationView:
        depth = None if level is None else SleepLevel(level)
        return self.begin(Act.SLEEP, model, by=str(caller), level=depth)

    async def wake(self, caller: Caller, model: str) -> wire.OperationView:
        return self.begin(Act.WAKE, model, by=str(caller))

    async def start(self, caller: Caller, model: str) -> wire.OperationView:
        return self.begin(Act.START, model, by=str(caller))

    async def stop(self, caller: Caller, model: str, *, now: bool) -> wire.OperationView:
        return self.begin(Act.STOP, model, by=str(caller), cut=now)

    async def prove(self, caller: Caller, model: str) -> wire.OperationView:
        return self.begin(Act.PROVE, model, by=str(caller))

    async def free(self, caller: Caller, gpu: int | None, *, now: bool) -> wire.OperationView:
        gpus = self._gpus(gpu)
        return self._begin(Act.FREE, ModelId(""), by=caller.name, cut=now, gpus=gpus)

    async def reclaim(self, caller: Caller, gpu: int | None) -> wire.OperationView:
        gpus = self._gpus(gpu)
        return self._begin(Act.RECLAIM, ModelId(""), by=str(caller), gpus=gpus)

    def _gpus(self, gpu: int | None) -> tuple[Gpu, ...]:
        """None: all. Raises: Refused("bad-request")."""
        known = self._scheduler.state.gpus
        if gpu is None:
            return ()
        if gpu not in known:
            there = ", ".join(map(str, known))
            raise Refused("bad-request", f"there is no GPU {gpu}; there are {there}")
        return (Gpu(gpu),)

    async def reload(self, caller: Caller) -> wire.OperationView:
        """Done when it returns: what the reload sets in motion is seen in `status`."""
        began = time.time()
        outcome = await self._reload()
        return {
            "id": 0,
            "kind": "reload",
            "model": None,
            "by": str(caller),
            "since": began,
            "state": "done",
            "outcome": outcome,
            "error": None,
            "steps": [],
            "elapsed_s": round(time.time() - began, 3),
            "expected_s": None,
        }

    def begin(
        self,
        act: Act,
        model: str,
        *,
        by: str,
        cut: bool = False,
        force: bool = False,
        level: SleepLevel | None = None,
    ) -> wire.OperationView:
        """Begin an operation; its first view. Raises: Refused("unknown-model")."""
        return self._begin(act, self._known(model), by=by, cut=cut, force=force, level=level)

    def _begin(
        self,
        act: Act,
        model: ModelId,
        *,
        by: str,
        cut: bool = False,
        force: bool = False,
        level: SleepLevel | None = None,
        gpus: tuple[Gpu, ...] = (),
    ) -> wire.OperationView:
        before = self._scheduler.state
        if len(before.operations) >= _MOST:
            raise Refused(Reason.QUEUE_FULL.value, f"{_MOST} operations are under way already")
        operation = self._scheduler.operate(
            act, model, by=by, cut=cut, force=force, level=level, gpus=gpus
        )
        progress = Progress(operation, foresee(before, operation))
        self._operations[operation.id] = progress
        self._forget_the_oldest()
        self._look(progress)
        return self._view(operation.id)

    # ------------------------------------------------------------ operations

    async def operation(self, operation_id: int) -> wire.OperationView:
        return self._view(operation_id)

    async def cancel(self, caller: Caller, operation_id: int) -> wire.OperationView:
        view = self._view(operation_id)
        if view["state"] != "running":
            text = f"operation {operation_id} has ended: {view['outcome']}"
            raise Refused(Reason.BUSY.value, text)
        self._scheduler.cancel(OperationId(operation_id))
        self._look(self._operations[operation_id])
        return self._view(operation_id)

    async def operation_updates(
        self, operation_id: int
    ) -> AsyncGenerator[wire.OperationView, None]:
        while True:
            news = self._news
            view = self._view(operation_id)
            yield view
            if view["state"] != "running":
                return
            await news.wait()

    def event_stream(self) -> AsyncGenerator[wire.EventNotice, None]:
        """Events from this call on; a reader that is slow loses the oldest."""
        backlog: deque[wire.EventNotice] = deque(maxlen=_BACKLOG)
        self._readers.append(backlog)
        return self._events(backlog)

    def story(self, after: int = 0) -> tuple[list[wire.EventNotice], int]:
        """The newest events since there were `after`, as far as they are kept; how many there are.

        For who looks now and then; `event_stream` loses less.
        """
        new = min(self._told_count - after, len(self._told))
        return list(self._told)[len(self._told) - new :], self._told_count

    async def _events(
        self, backlog: deque[wire.EventNotice]
    ) -> AsyncGenerator[wire.EventNotice, None]:
        try:
            while True:
                news = self._news
                while backlog:
                    yield backlog.popleft()
                await news.wait()
        finally:
            self._readers = [reader for reader in self._readers if reader is not backlog]

    # ------------------------------------------------------------ inside

    def _known(self, name: str) -> ModelId:
        model = self.resolve(name)
        if model is None:
            known = ", ".join(self._scheduler.state.engines)
            text = f'no model "{name}"'
            raise Refused(Reason.UNKNOWN_MODEL.value, text, hint=f"known are {known}")
        return model

    def _view(self, operation_id: int) -> wire.OperationView:
        progress = self._operations.get(operation_id)
        if progress is None:
            text = f"no operation {operation_id} (the last {_KEPT} are kept)"
            raise Refused("unknown-operation", text, hint="homegptctl status")
        now = self._scheduler.loop.time()
        return progress.view(now, self._wall(0.0))

    def _look(self, progress: Progress) -> None:
        now = self._scheduler.loop.time()
        progress.look(self._scheduler.state, now)
        ended = self._scheduler.ended(progress.operation.id)
        if ended is not None and progress.ended is None:
            progress.end(ended, now)

    def _forget_the_oldest(self) -> None:
        ended = [number for number, one in self._operations.items() if one.ended is not None]
        for number in ended[: max(len(ended) - _KEPT, 0)]:
            del self._operations[number]

    def _tell(self, lines: tuple[Line, ...]) -> None:
        self._accounts.note_frozen(self._scheduler.state)
        for progress in self._operations.values():
            if progress.ended is None:
                self._look(progress)
        for line in lines:
            notice = self._notice(line)
            self._told.append(notice)
            self._told_count += 1
            for backlog in self._readers:
                backlog.append(notice)
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _notice(self, line: Line) -> wire.EventNotice:
        return {
            "time": time.time(),
            "level": line.level,
            "kind": line.kind,
            "model": line.model,
            "message": line.text,
            "fields": dict(line.fields),
        }

    def _wall(self, instant: float) -> float:
        return instant + time.time() - self._scheduler.loop.time()


def _span(span: Span) -> wire.SpanView:
    return {
        "low_s": round(span.low_s, 2),
        "mid_s": round(span.mid_s, 2),
        "high_s": round(span.high_s, 2),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
