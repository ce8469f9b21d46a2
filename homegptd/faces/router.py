"""Requests to models: which one a request names, and its way there.

Which paths there are is in `routes`; here each is read, waits for its model, and is relayed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from aiohttp import web

from homegptd.core import forecast
from homegptd.core.model import Awake, Draining, ModelId, State
from homegptd.core.refusals import Reason
from homegptd.runtime.scheduler import Refused, Scheduler

from . import adjust, errors, multipart, openai, realtime
from .ask import CLOSED, KEPT, Ask, Broken, Limits
from .bodies import Bodies, Body, Hold, reading
from .early import Early, Pace, speaks
from .errors import Denied, Problem
from .models import Models
from .openai import NotUnderstood
from .relay import relay
from .routes import Route, Where
from .stored import Stored
from .tasks import is_task
from .upstream import Address, Pool

log = logging.getLogger(__name__)


_READ_TIMEOUT = "x-stainless-read-timeout"
"""The SDKs of OpenAI and Anthropic say in it how many seconds they wait for a byte."""
_JUST_BEFORE = 0.98
_FORESEEN_S = 0.9
"""How long a forecast is good for several clients, in seconds: about the pace of status events."""
_PASSED_ON = ("Content-Type", "Accept", "X-Request-Id")
"""Everything else stays here, keys above all."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says about the router."""

    max_body_bytes: int = 64 << 20
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


@dataclass(frozen=True, slots=True)
class _Request:
    """What a client asked, read and understood."""

    model: ModelId
    stream: bool
    ask: Ask
    since: float
    unasked: str = ""
    """Why it is no reason to bring its model up, where it is none."""
    grace_s: float = 0.0
    """How long it then waits for another reason."""
    early: Early | None = None
    """What speaks to the client while nothing answers; None: nothing does."""


class Router:
    """Takes requests to their models."""

    def __init__(
        self,
        scheduler: Scheduler,
        models: Models,
        *,
        addresses: Callable[[ModelId], Address],
        settings: Settings,
        stored: Stored | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._models = models
        self._addresses = addresses
        self._settings = settings
        self._stored = stored or Stored()
        self.pool = Pool()
        settings.bodies.again_s = self._room_s
        self._foreseen: dict[ModelId, tuple[State, float, forecast.Outlook]] = {}

    def _room_s(self) -> float:
        return forecast.room_s(self._scheduler.state, self._scheduler.loop.time())

    async def answer(self, request: web.BaseRequest, route: Route) -> web.StreamResponse:
        """The whole life of one request. Errors are answers here."""
        try:
            if route.where is Where.SESSION:
                return await realtime.answer(request, self._line(route))
            await _client_reads(request)
            with self._settings.bodies.hold() as hold:
                wanted = await self._read(request, route, hold)
                if wanted.early is None:
                    return await self._serve_when_up(request, wanted)
                return await self._serve_early(request, wanted, wanted.early)
        except Denied as denied:
            problem = denied.problem
        except Refused as refused:
            problem = errors.refused(refused.refusal)
        except Broken as broken:
            _tell(broken)
            if broken.begun:
                return KEPT if broken.kept else CLOSED
            problem = broken.problem
        return errors.response(problem, route.shape)

    def _line(self, route: Route) -> realtime.Line:
        named = partial(self._model, route=route)
        return realtime.Line(
            self._scheduler, named, self._addresses, self._settings.realtime_idle_s
        )

    async def _serve_early(
        self, request: web.BaseRequest, wanted: _Request, early: Early
    ) -> web.StreamResponse:
        """As `_serve`; once the early head is out, errors are events of the stream."""
        try:
            return await self._serve_when_up(request, wanted)
        except Refused as refused:
            if not early.given:
                raise
            problem = errors.refused(refused.refusal)
        except Broken as broken:
            if broken.begun or not early.given:
                raise
            _tell(broken)
            problem = broken.problem
        except Exception:
            if not early.given:
                raise
            log.exception("%s failed after its early head", wanted.ask.path)
            problem = errors.of_reason("internal", "this is a defect; the log has the story")
        finally:
            early.disarm()
        return KEPT if early.fail(problem) else CLOSED

    async def _serve_when_up(
        self, request: web.BaseRequest, wanted: _Request
    ) -> web.StreamResponse:
        """Where it may bring its model up, at once; else while somebody else does."""
        if not wanted.unasked:
            return await self._serve(request, wanted)
        news, loop = asyncio.Event(), self._scheduler.loop
        until = loop.time() + wanted.grace_s
        with self._scheduler.watched(lambda lines: news.set()):
            while True:
                try:
                    return await self._serve(request, wanted)
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

    async def _serve(self, request: web.BaseRequest, wanted: _Request) -> web.StreamResponse:
        """Once, and once more where the engine was lost before the answer began.

        A try that did not even reach the engine does not count, but is made only once more too.
        """
        sent = tries = 0
        while True:
            try:
                return await self._try(request, wanted, replay=tries > 0)
            except Broken as broken:
                tries += 1
                sent += broken.sent
                if not broken.again or sent > 1 or tries > 2:
                    raise
                log.info("%s; sending the request again", broken.refusal.message)
                settings = self._settings
                patience_s = settings.notice_s if broken.sent else settings.notice_death_s
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

    async def _try(
        self, request: web.BaseRequest, wanted: _Request, *, replay: bool
    ) -> web.StreamResponse:
        asks = not wanted.unasked
        lease = self._scheduler.lease(
            wanted.model,
            freezable=wanted.stream,
            may_switch=asks,
            max_wait_s=self._patience_s(request, wanted),
            replay=replay and asks,
        )
        if wanted.early is not None and not self._is_awake(wanted.model):
            wanted.early.arm()
        async with lease:
            return await relay(
                request,
                wanted.ask,
                lease=lease,
                pool=self.pool,
                address=self._addresses(wanted.model),
                limits=self._settings.limits(wanted.model),
                early=wanted.early,
            )

    def _patience_s(self, request: web.BaseRequest, wanted: _Request) -> float | None:
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

    def _early(self, request: web.BaseRequest, route: Route, model: ModelId) -> Early | None:
        if not speaks(route.path):
            return None
        return Early(
            request,
            route.path,
            model,
            route.shape,
            pace=self._settings.pace,
            outlook=lambda: self._outlook(model),
            loop=self._scheduler.loop,
        )

    def _outlook(self, model: ModelId) -> forecast.Outlook:
        """Worked out for all who wait for the model, anew every second and with each change."""
        state, now = self._scheduler.state, self._scheduler.loop.time()
        foreseen = self._foreseen.get(model)
        if foreseen is not None and foreseen[0] is state and now - foreseen[1] < _FORESEEN_S:
            return foreseen[2]
        outlook = forecast.outlook(state, model, now)
        self._foreseen[model] = state, now, outlook
        return outlook

    # ------------------------------------------------------------ what a request says

    async def _read(self, request: web.BaseRequest, route: Route, hold: Hold) -> _Request:
        """Raises: Denied."""
        try:
            if route.where is Where.STORED:
                return self._read_stored(request, route)
            if route.where is Where.FORM:
                return await self._read_form(request, route, hold)
            return await self._read_json(request, route, hold)
        except NotUnderstood as why:
            raise Denied(errors.bad_request(str(why), param=why.param)) from None

    async def _read_json(self, request: web.BaseRequest, route: Route, hold: Hold) -> _Request:
        kind = request.content_type
        if kind != "application/json" and not kind.endswith("+json"):
            raise _wrong_kind(kind, "application/json")
        body = await hold.receive(request, self._settings.max_body_bytes)
        wish = openai.read(body)
        model = self._model(wish.model, route, previous=wish.previous)
        adjustment = self._models.adjustment(model)
        if adjustment:
            with reading(body) as text:
                written = adjust.adjusted(bytes(text), adjustment)
            body = hold.rewritten(written)
        if wish.model is None or self._models.find(wish.model) is None:
            body = openai.with_model(body, model)
        task = not (wish.stream or self._settings.tasks_switch) and is_task(body)
        ask = Ask(route.path, _passed_on(request), body, route.shape)
        if route.stores:
            learn = partial(self._learn, model)
            ask = replace(ask, learn=learn, replayable=not wish.stores)
        wanted = replace(self._request(route, model, ask), stream=wish.stream and route.streams)
        if task:
            why = "it is a background task (router.background_tasks)"
            return replace(wanted, unasked=why, grace_s=self._settings.task_grace_s)
        return replace(wanted, early=self._early(request, route, model) if wanted.stream else None)

    async def _read_form(self, request: web.BaseRequest, route: Route, hold: Hold) -> _Request:
        if request.content_type != "multipart/form-data":
            raise _wrong_kind(request.content_type, "multipart/form-data")
        body = await hold.receive(request, self._settings.max_body_bytes)
        form = _form(request, body)
        model = self._model(form.model, route)
        adjustment = self._models.adjustment(model)
        if adjustment:
            body = multipart.with_fields(body, form, adjustment.defaults, adjustment.overrides)
            form = _form(request, body)
        if form.model is None or self._models.find(form.model) is None:
            body = multipart.with_model(body, form, model)
        ask = Ask(route.path, _passed_on(request), body, route.shape)
        return replace(self._request(route, model, ask), stream=form.stream)

    def _read_stored(self, request: web.BaseRequest, route: Route) -> _Request:
        path = request.raw_path.partition("?")[0]
        found = route.pattern.fullmatch(path) if route.pattern is not None else None
        ident = found[1] if found else ""
        model = self._stored.find(ident, self._scheduler.state.engines)
        if model is None or self._models.find(model) is None:
            text = f'there is no response "{ident}": its engine has ended, or never gave it'
            raise Denied(Problem(404, "not_found", text, param="response_id"))
        query, stream = _stream_query(request) if route.method == "GET" else ("", False)
        ask = Ask(path + query, _passed_on(request), b"", route.shape, method=route.method)
        return replace(self._request(route, model, ask), stream=stream)

    def _request(self, route: Route, model: ModelId, ask: Ask) -> _Request:
        unasked = "" if route.wakes else f"{route.method} {route.path} wakes no model"
        ask = replace(ask, replayable=False) if route.once else ask
        return _Request(model, False, ask, self._scheduler.loop.time(), unasked)

    def _learn(self, model: ModelId, data: bytes) -> None:
        self._stored.learn(data, model, self._scheduler.state.engines[model].incarnation)

    def _model(self, name: str | None, route: Route, *, previous: str | None = None) -> ModelId:
        """Which model is meant. Raises: Denied, also where it is not for this."""
        model = self._named(name, route, previous)
        kind = self._models.kind(model)
        if kind is not None and route.kinds is not None and kind not in route.kinds:
            text = f'"{model}" does not do {route.path}: its engine.kind is {kind}'
            raise Denied(errors.bad_request(text, param="model"))
        return model

    def _named(self, name: str | None, route: Route, previous: str | None) -> ModelId:
        if name is None and previous is not None:
            model = self._stored.find(previous, self._scheduler.state.engines)
            if model is not None and self._models.find(model) is not None:
                return model
        if name is None:
            default = self._models.default()
            if default is None:
                text = 'the body names no "model", and there is no default'
                raise Denied(errors.bad_request(text, param="model"))
            return default
        model = self._models.find(name) or self._models.virtual(name, route.kinds)
        if model is None:
            raise Denied(errors.refused(self._models.unknown(name)))
        return model


def _form(request: web.BaseRequest, body: Body) -> multipart.Form:
    with reading(body) as text:
        return multipart.read(request.headers["Content-Type"], text)


def _wrong_kind(kind: str, wanted: str) -> Denied:
    text = f'the content type is "{kind}", it must be {wanted}'
    return Denied(errors.bad_request(text, status=415))


def _stream_query(request: web.BaseRequest) -> tuple[str, bool]:
    """The two parameters that vLLM knows, as they travel on. Raises: Denied."""
    after = request.query.get("starting_after")
    if after is not None and not (after.isascii() and after.isdigit() and len(after) < 10):
        text = '"starting_after" must be the number of an event'
        raise Denied(errors.bad_request(text, param="starting_after"))
    stream = openai.is_yes(request.query.get("stream"))
    told = (f"starting_after={after}" if after else "", "stream=true" if stream else "")
    query = "&".join(each for each in told if each)
    return (f"?{query}" if query else ""), stream


def _tell(broken: Broken) -> None:
    """A cut the machine has told of itself, and what vLLM says of a request is the client's."""
    if broken.refusal.reason is not Reason.CUT and broken.problem.status >= 500:
        log.warning("%s", broken.refusal.message)


async def _client_reads(request: web.BaseRequest) -> None:
    """A client that sends request after request and reads no answer waits here, holding nothing."""
    if request.protocol.writing_paused:
        await request.writer.drain()


def _passed_on(request: web.BaseRequest) -> bytes:
    headers = request.headers
    lines = [f"{name}: {headers[name]}\r\n" for name in _PASSED_ON if name in headers]
    return "".join(lines).encode("utf-8", "surrogateescape")
