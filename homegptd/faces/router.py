"""Requests to models: which paths there are, which model a request names, and its way there.

The table is an allow-list of exact paths. What is not in it does not reach an engine, and what is
reaches it under the table's own spelling.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

from homegptd.core import forecast
from homegptd.core.model import Awake, Draining, ModelId, State
from homegptd.core.refusals import Reason
from homegptd.runtime.scheduler import Refused, Scheduler

from . import errors, openai
from .ask import CLOSED, KEPT, Ask, Broken, Limits
from .bodies import Bodies, Hold
from .early import Early, Pace, speaks
from .errors import Denied, Shape
from .models import Models
from .relay import relay
from .upstream import Address, Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """A path that takes the model from its JSON body. None of them has effects on the engine."""

    path: str
    shape: Shape = Shape.OPENAI
    kinds: frozenset[str] = frozenset({"generate"})
    """What a model must be for (`engine.kind`) to answer here. Asking another one would cost a
    switch and end in vLLM's bare 404."""


_POOLING = frozenset({"embed", "score"})
"""vLLM's pooling models: an embedder scores and reranks too (0.32)."""
ROUTES = (
    Route("/v1/chat/completions"),
    Route("/v1/completions"),
    Route("/v1/responses", Shape.RESPONSES),
    Route("/v1/messages", Shape.ANTHROPIC),
    Route("/v1/embeddings", kinds=_POOLING),
    Route("/v1/rerank", kinds=_POOLING),
    Route("/v2/rerank", kinds=_POOLING),
    Route("/rerank", kinds=_POOLING),
    Route("/v1/score", kinds=_POOLING),
    Route("/score", kinds=_POOLING),
    Route("/pooling", kinds=_POOLING),
    Route("/classify", kinds=_POOLING),
)
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

    max_body_bytes: int = 128 << 20
    bodies: Bodies = field(default_factory=Bodies)
    """Where they are held, and how many; shared by all doors."""
    limits: Callable[[ModelId], Limits] = lambda model: Limits()
    pace: Pace = field(default_factory=Pace)
    notice_s: float = 2.0
    notice_death_s: float = 15.0
    """How long to wait for news of an engine that broke off, or that cannot be reached at all."""


@dataclass(frozen=True, slots=True)
class _Request:
    """What a client asked, read and understood."""

    model: ModelId
    stream: bool
    ask: Ask
    since: float
    early: Early | None
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
    ) -> None:
        self._scheduler = scheduler
        self._models = models
        self._addresses = addresses
        self._settings = settings
        self.pool = Pool()
        settings.bodies.again_s = self._room_s
        self._foreseen: dict[ModelId, tuple[State, float, forecast.Outlook]] = {}

    def _room_s(self) -> float:
        return forecast.room_s(self._scheduler.state, self._scheduler.loop.time())

    async def answer(self, request: web.BaseRequest, route: Route) -> web.StreamResponse:
        """The whole life of one request. Errors are answers here."""
        try:
            await _client_reads(request)
            with self._settings.bodies.hold() as hold:
                wanted = await self._read(request, route, hold)
                if wanted.early is None:
                    return await self._serve(request, wanted)
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

    async def _serve_early(
        self, request: web.BaseRequest, wanted: _Request, early: Early
    ) -> web.StreamResponse:
        """As `_serve`; once the early head is out, errors are events of the stream."""
        try:
            return await self._serve(request, wanted)
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
        lease = self._scheduler.lease(
            wanted.model,
            freezable=wanted.stream,
            max_wait_s=self._patience_s(request, wanted),
            replay=replay,
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

    async def _read(self, request: web.BaseRequest, route: Route, hold: Hold) -> _Request:
        """Raises: Denied."""
        kind = request.content_type
        if kind != "application/json" and not kind.endswith("+json"):
            text = f'the content type is "{kind}", it must be application/json'
            raise Denied(errors.bad_request(text, status=415))
        body = await hold.receive(request, self._settings.max_body_bytes)
        try:
            wish = openai.read(body)
        except openai.NotUnderstood as why:
            raise Denied(errors.bad_request(str(why), param=why.param)) from None
        model = self._model(wish.model)
        self._must_do(model, route)
        if wish.model is None:
            body = openai.with_model(body, model)
        ask = Ask(route.path, _passed_on(request), body, route.shape)
        early = self._early(request, route, model) if wish.stream else None
        return _Request(model, wish.stream, ask, self._scheduler.loop.time(), early)

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

    def _must_do(self, model: ModelId, route: Route) -> None:
        """Raises: Denied. A model whose kind nobody knows is asked."""
        kind = self._models.kind(model)
        if kind is not None and kind not in route.kinds:
            text = f'"{model}" does not do {route.path}: its engine.kind is {kind}'
            raise Denied(errors.bad_request(text, param="model"))

    def _model(self, name: str | None) -> ModelId:
        if name is None:
            default = self._models.default()
            if default is None:
                text = 'the body names no "model", and there is no default'
                raise Denied(errors.bad_request(text, param="model"))
            return default
        model = self._models.find(name)
        if model is None:
            raise Denied(errors.refused(self._models.unknown(name)))
        return model


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
