"""Requests to models: which one a request names, and its way there.

Which paths there are is in `routes`; here each is read, waits for its model, and is relayed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, cast

from aiohttp import web
from msgspec.structs import replace

from homegptd.core import outlook as outlooks
from homegptd.core.model import Awake, Draining, ModelId, State
from homegptd.core.refusals import Reason
from homegptd.runtime.lease import Lease, Refused
from homegptd.runtime.scheduler import Scheduler

from . import errors, realtime
from .accounts import Accounts, End, Record
from .ask import CLOSED, KEPT, Broken, Limits, tell
from .background import Background
from .bodies import Bodies
from .clients import Client, asking
from .early import Early, Pace, speaks
from .errors import Denied
from .express import Express
from .guard import Guard
from .intake import Intake, Wanted
from .models import Models
from .outlet import outlet
from .pool import Address, Pool
from .relay import relay
from .routes import Route, Where
from .stored import Stored

if TYPE_CHECKING:
    from .server import Connection

log = logging.getLogger(__name__)


_READ_TIMEOUT = "x-stainless-read-timeout"
"""The SDKs of OpenAI and Anthropic say in it how many seconds they wait for a byte."""
_JUST_BEFORE = 0.98
_FORESEEN_S = 0.9
"""How long a forecast is good for several clients, in seconds: about the pace of status events."""


EngineKeys: TypeAlias = Callable[[ModelId], str | None]
"""What an engine asks for itself (its own API key), by model; None: nothing."""


def no_key(model: ModelId) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says about the router."""

    max_body_bytes: int = 128 << 20
    bodies: Bodies = field(default_factory=Bodies)
    """Where they are held, and how many; shared by all doors."""
    limits: Callable[[ModelId], Limits] = lambda model: Limits()
    pace: Pace = field(default_factory=Pace)
    notice_s: float = 2.0
    notice_death_s: float = 15.0
    """How long to wait for news of an engine that broke off, or that cannot be reached at all."""
    tasks_switch: bool = False
    """Whether a title or a tag may cause a switch."""
    task_grace_s: float = 5.0
    """How long such a request waits for somebody else to bring its model up."""
    realtime_idle_s: float = 60.0


class Router:
    """Takes requests to their models."""

    def __init__(
        self,
        scheduler: Scheduler,
        models: Models,
        *,
        addresses: Callable[[ModelId], Address],
        engine_keys: EngineKeys = no_key,
        settings: Settings,
        stored: Stored | None = None,
        accounts: Accounts | None = None,
    ) -> None:
        self._scheduler, self._models = scheduler, models
        self._addresses = addresses
        self._engine_keys = engine_keys
        self._settings = settings
        self.accounts = accounts or Accounts()
        stored = stored or Stored()
        self._background = Background(
            scheduler,
            stored,
            self.accounts,
            addresses=addresses,
            engine_keys=engine_keys,
            limits=settings.limits,
        )
        self._intake = Intake(
            scheduler,
            models,
            stored,
            max_body_bytes=settings.max_body_bytes,
            tasks_switch=settings.tasks_switch,
            task_grace_s=settings.task_grace_s,
        )
        self.pool = Pool()
        settings.bodies.again_s = self._room_s
        self._foreseen: dict[ModelId, tuple[State, float, outlooks.Outlook]] = {}

    def express(self, guard: Guard) -> Express:
        """The short way beside this one."""
        settings = self._settings
        return Express(
            self._scheduler,
            self._models,
            guard=guard,
            addresses=self._addresses,
            engine_keys=self._engine_keys,
            limits=settings.limits,
            bodies=settings.bodies,
            max_body_bytes=settings.max_body_bytes,
            accounts=self.accounts,
            pool=self.pool,
        )

    def _room_s(self) -> float:
        return outlooks.room_s(self._scheduler.state, self._scheduler.loop.time())

    async def answer(self, request: web.BaseRequest, route: Route) -> web.StreamResponse:
        """The whole life of one request. Errors are answers here."""
        client = asking()
        record = Record(client.name)
        early: Early | None = None
        try:
            # what asks about a response is no second one: the response counts until it has ended
            with nullcontext() if route.where is Where.STORED else client.counted():
                if route.where is Where.SESSION:
                    return await realtime.answer(request, self._line(route))
                if request.protocol.writing_paused:
                    await request.writer.drain()  # a client that asks and asks and reads nothing
                with self._settings.bodies.hold() as hold:
                    wanted = await self._intake.read(request, route, hold)
                    record.model = wanted.model
                    early = self._early(request, route, wanted) if wanted.stream else None
                    wanted = replace(wanted, early=early)
                    if wanted.unasked:
                        return await self._serve_when_up(request, wanted, record)
                    return await self._serve(request, wanted, record)
        except Denied as denied:
            record.end, problem = End.REFUSED, denied.problem
        except Refused as refused:
            record.end, problem = End.REFUSED, self._models.told(errors.refused(refused.refusal))
        except Broken as broken:
            record.end = End.FAILED
            tell(broken)
            if broken.begun:
                return KEPT if broken.kept else CLOSED
            problem = broken.problem
        except Exception:
            if early is None or not early.given:
                raise
            log.exception("%s failed after its early head", route.path)
            record.end = End.FAILED
            problem = errors.of_reason("internal", "this is a defect; the log has the story")
        finally:
            if early is not None:
                early.disarm()
            self.accounts.close(record)
        if early is not None and early.given:
            return KEPT if early.fail(problem) else CLOSED
        return errors.response(problem, route.shape)

    def _line(self, route: Route) -> realtime.Line:
        named = partial(self._intake.named, route=route)
        return realtime.Line(
            self._scheduler,
            named,
            self._addresses,
            self._engine_keys,
            partial(self._until_noticed, patience_s=self._settings.notice_death_s),
            lambda refusal: self._models.told(errors.refused(refusal)),
            self._settings.realtime_idle_s,
        )

    async def _serve_when_up(
        self, request: web.BaseRequest, wanted: Wanted, record: Record
    ) -> web.StreamResponse:
        """What brings no model up waits a while, in case somebody else does."""
        if wanted.ended:
            record.end = End.ANSWERED
            return web.Response(body=wanted.ended, content_type="application/json")
        if wanted.under is not None:
            answer = await self._relayed(request, wanted, record, wanted.under)
            record.end = End.ANSWERED
            return answer
        news, loop = asyncio.Event(), self._scheduler.loop
        until = loop.time() + wanted.grace_s
        with self._scheduler.watched(lambda lines: news.set()):
            while True:
                try:
                    return await self._serve(request, wanted, record)
                except Refused as refused:
                    refusal = refused.refusal
                    if refusal.reason is not Reason.BUSY or loop.time() >= until:
                        told = f"{refusal.message}: {wanted.unasked}"
                        raise Refused(replace(refusal, message=told)) from None
                news.clear()
                try:
                    async with asyncio.timeout_at(until):
                        await news.wait()
                except TimeoutError:
                    continue

    async def _serve(
        self, request: web.BaseRequest, wanted: Wanted, record: Record
    ) -> web.StreamResponse:
        """Once, and once more where the engine was lost before the answer began.

        A try that an operator cut, or that did not even reach the engine, does not count; but there
        are three at most.
        """
        sent = tries = 0
        while True:
            try:
                if (broken := _already(request)) is not None:
                    raise broken
                lease, held = self._lease(request, wanted, record, replay=tries > 0)
                async with held:
                    waited_s = self._scheduler.loop.time() - lease.ticket.since
                    record.granted(lease.ticket.id, waited_s)
                    answer = await self._relayed(request, wanted, record, lease)
            except Broken as broken:
                tries += 1
                sent += broken.sent and broken.refusal.reason is not Reason.CUT
                if not broken.again or sent > 1 or tries > 2:
                    raise
                record.retried = record.retried or broken.sent
                log.info("%s; sending the request again", broken.refusal.message)
                settings = self._settings
                patience_s = settings.notice_s if broken.sent else settings.notice_death_s
            else:
                record.end = End.ANSWERED
                return answer
            if wanted.early is not None:
                wanted.early.arm()
            await self._until_noticed(wanted.model, patience_s)

    async def _until_noticed(self, model: ModelId, patience_s: float) -> None:
        """Until the scheduler knows too that this incarnation is lost.

        Else the next lease would be for the same dead engine: vLLM's server outlives its engine
        core by seconds. If nothing is noticed, the engine lives.
        """
        state = self._scheduler.state
        before = state.engines[model].incarnation if model in state.engines else None
        changed = asyncio.Event()
        with self._scheduler.watched(lambda lines: changed.set()):
            try:
                async with asyncio.timeout(patience_s):
                    while self._seems_up(model, before):
                        changed.clear()
                        await changed.wait()
            except TimeoutError:
                return

    def _seems_up(self, model: ModelId, incarnation: int | None) -> bool:
        engine = self._scheduler.state.engines.get(model)
        return (
            engine is not None
            and engine.incarnation == incarnation
            and isinstance(engine.phase, Awake | Draining)
        )

    def _lease(
        self, request: web.BaseRequest, wanted: Wanted, record: Record, *, replay: bool
    ) -> tuple[Lease, AbstractAsyncContextManager[object]]:
        """And what holds it: itself, or for a response in the background who outlives this."""
        asks, key = not wanted.unasked, asking()
        patience_s = self._patience_s(request, wanted)
        lease = self._scheduler.lease(
            wanted.model,
            freezable=wanted.stream or wanted.background is not None,
            may_switch=asks and key.may_switch,
            max_wait_s=key.max_wait_s if patience_s is None else _least(patience_s, key.max_wait_s),
            replay=replay and asks,
        )
        if wanted.early is not None and not self._is_awake(wanted.model):
            wanted.early.arm()
        if wanted.background is None:
            return lease, lease
        return lease, self._background.beyond(lease, wanted.background, record)

    def _relayed(
        self, request: web.BaseRequest, wanted: Wanted, record: Record, lease: Lease
    ) -> Coroutine[object, object, web.StreamResponse]:
        wanted.ask.engine_key = self._engine_keys(wanted.model)
        return relay(
            outlet(request, self._models),
            wanted.ask,
            lease=lease,
            upstream=self.pool.upstream(self._addresses(wanted.model)),
            limits=self._settings.limits(wanted.model),
            record=record,
            early=wanted.early,
        )

    def _patience_s(self, request: web.BaseRequest, wanted: Wanted) -> float | None:
        """How long the client itself waits, where it says so and nothing is told it meanwhile.

        An answer just before is worth more than a connection that it drops.
        """
        said = request.headers.get(_READ_TIMEOUT)
        if said is None or wanted.early is not None:
            return None
        try:
            seconds = float(said)
        except ValueError:
            return None
        if not seconds > 0.0:
            return None
        waited_s = self._scheduler.loop.time() - wanted.since
        return max(seconds * _JUST_BEFORE - waited_s, 0.0)

    def _is_awake(self, model: ModelId) -> bool:
        engine = self._scheduler.state.engines.get(model)
        return engine is not None and isinstance(engine.phase, Awake)

    def _early(self, request: web.BaseRequest, route: Route, wanted: Wanted) -> Early | None:
        if wanted.unasked or not speaks(route.path):
            return None
        return Early(
            request,
            route.path,
            wanted.model,
            route.shape,
            pace=self._settings.pace,
            outlook=self._outlook,
            loop=self._scheduler.loop,
        )

    def _outlook(self, model: ModelId, client: Client) -> outlooks.Outlook:
        outlook = self._foreseen_for(model)
        return replace(outlook, doing=self._models.shown(outlook.doing, client))

    def _foreseen_for(self, model: ModelId) -> outlooks.Outlook:
        """Worked out for all who wait for the model, anew every second and with each change."""
        state, now = self._scheduler.state, self._scheduler.loop.time()
        foreseen = self._foreseen.get(model)
        if foreseen is not None and foreseen[0] is state and now - foreseen[1] < _FORESEEN_S:
            return foreseen[2]
        outlook = outlooks.outlook(state, model, now)
        self._foreseen[model] = state, now, outlook
        return outlook


def _already(request: web.BaseRequest) -> Broken | None:
    """What came of this request on the short way; told once."""
    connection = cast("Connection", request.protocol)
    already, connection.already = connection.already, None
    return already


def _least(one: float, other: float | None) -> float:
    """The stricter of two limits, of which None is none."""
    return one if other is None else min(one, other)
