"""Requests to models: which one a request names, and its way there.

Which paths there are is in `routes`; here each is read, waits for its model, and is relayed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from aiohttp import web

from homegptd.core.model import Awake, Draining, ModelId
from homegptd.core.refusals import Reason, Refusal
from homegptd.runtime.scheduler import Refused, Scheduler

from . import adjust, errors, multipart, openai, realtime
from .errors import Denied, Problem
from .models import Models
from .openai import NotUnderstood
from .relay import CLOSED, KEPT, Ask, Broken, Limits, relay
from .routes import Route, Where
from .stored import Stored
from .tasks import is_task
from .upstream import Address, Pool

log = logging.getLogger(__name__)


_PIECE_S = 60.0
"""Between two pieces of a request's body, in seconds."""
_PASSED_ON = ("Content-Type", "Accept", "X-Request-Id")
"""Everything else stays here, keys above all."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says about the router."""

    max_body_bytes: int = 64 << 20
    max_held_bytes: int = 256 << 20
    """Bodies of all requests that wait or are answered, together."""
    limits: Limits = field(default_factory=Limits)
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
    again: bool = True
    """Whether it may be sent a second time."""
    unasked: str = ""
    """Why it is no reason to bring its model up, where it is none."""
    grace_s: float = 0.0
    """How long it then waits for another reason."""


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
        self._held_bytes = 0

    async def answer(self, request: web.BaseRequest, route: Route) -> web.StreamResponse:
        """The whole life of one request. Errors are answers here."""
        try:
            if route.where is Where.SESSION:
                return await realtime.answer(request, self._line(route))
            await _client_reads(request)
            wanted = await self._read(request, route)
            with self._holding(len(wanted.ask.body)):
                return await self._serve_when_up(request, wanted)
        except Denied as denied:
            problem = denied.problem
        except Refused as refused:
            problem = errors.refused(refused.refusal)
        except Broken as broken:
            if broken.refusal.reason is not Reason.CUT:  # the machine has told of a cut itself
                log.warning("%s", broken.refusal.message)
            if broken.begun:
                return KEPT if broken.kept else CLOSED
            problem = errors.refused(broken.refusal)
        return errors.response(problem, route.shape)

    def _line(self, route: Route) -> realtime.Line:
        named = partial(self._model, route=route)
        return realtime.Line(
            self._scheduler, named, self._addresses, self._settings.realtime_idle_s
        )

    @contextmanager
    def _holding(self, size: int) -> Iterator[None]:
        """Keep a body until its request has ended. Raises: Denied where there are too many."""
        if self._held_bytes + size > self._settings.max_held_bytes and self._held_bytes:
            text = f"requests that wait hold {self._held_bytes >> 20} MiB already"
            raise Denied(errors.refused(Refusal(Reason.QUEUE_FULL, text, retry_after_s=5.0)))
        self._held_bytes += size
        try:
            yield
        finally:
            self._held_bytes -= size

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
                if not broken.again or sent > wanted.again or tries > 2:
                    raise
                log.info("%s; sending the request again", broken.refusal.message)
                settings = self._settings
                patience_s = settings.notice_s if broken.sent else settings.notice_death_s
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
            wanted.model, freezable=wanted.stream, may_switch=asks, replay=replay and asks
        )
        async with lease:
            return await relay(
                request,
                wanted.ask,
                lease=lease,
                pool=self.pool,
                address=self._addresses(wanted.model),
                limits=self._settings.limits,
            )

    # ------------------------------------------------------------ what a request says

    async def _read(self, request: web.BaseRequest, route: Route) -> _Request:
        """Raises: Denied."""
        try:
            if route.where is Where.STORED:
                return self._read_stored(request, route)
            if route.where is Where.FORM:
                return await self._read_form(request, route)
            return await self._read_json(request, route)
        except NotUnderstood as why:
            raise Denied(errors.bad_request(str(why), param=why.param)) from None

    async def _read_json(self, request: web.BaseRequest, route: Route) -> _Request:
        kind = request.content_type
        if kind != "application/json" and not kind.endswith("+json"):
            raise _wrong_kind(kind, "application/json")
        body = await read_body(request, self._settings.max_body_bytes)
        wish = openai.read(body)
        model = self._model(wish.model, route, previous=wish.previous)
        adjustment = self._models.adjustment(model)
        if adjustment:
            body = adjust.adjusted(body, adjustment)
        if wish.model is None or self._models.find(wish.model) is None:
            body = openai.with_model(body, model)
        ask = Ask(route.path, _passed_on(request), body, route.shape)
        if route.stores:
            ask = replace(ask, learn=partial(self._learn, model))
        stream = wish.stream and route.streams
        again = not route.once and not (route.stores and wish.stores)
        if not stream and not self._settings.tasks_switch and is_task(body):
            text = "it is a background task (router.background_tasks)"
            return _Request(model, stream, ask, again, text, self._settings.task_grace_s)
        return _Request(model, stream, ask, again, _unasked(route))

    async def _read_form(self, request: web.BaseRequest, route: Route) -> _Request:
        if request.content_type != "multipart/form-data":
            raise _wrong_kind(request.content_type, "multipart/form-data")
        body = await read_body(request, self._settings.max_body_bytes)
        form = multipart.read(request.headers["Content-Type"], body)
        model = self._model(form.model, route)
        adjustment = self._models.adjustment(model)
        if adjustment:
            body = multipart.with_fields(body, form, adjustment.defaults, adjustment.overrides)
            form = multipart.read(request.headers["Content-Type"], body)
        if form.model is None or self._models.find(form.model) is None:
            body = multipart.with_model(body, form, model)
        ask = Ask(route.path, _passed_on(request), body, route.shape)
        return _Request(model, form.stream, ask, not route.once, _unasked(route))

    def _read_stored(self, request: web.BaseRequest, route: Route) -> _Request:
        path = request.raw_path.partition("?")[0]
        ident = route.ident(path) or ""
        model = self._stored.find(ident, self._scheduler.state.engines)
        if model is None or self._models.find(model) is None:
            text = f'there is no response "{ident}": its engine has ended, or never gave it'
            raise Denied(Problem(404, "not_found", text, param="response_id"))
        query, stream = _stream_query(request) if route.method == "GET" else ("", False)
        ask = Ask(path + query, _passed_on(request), b"", route.shape, method=route.method)
        return _Request(model, stream, ask, not route.once, _unasked(route))

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


def _unasked(route: Route) -> str:
    return "" if route.wakes else f"{route.method} {route.path} wakes no model"


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


async def read_body(request: web.BaseRequest, limit: int) -> bytes:
    """The whole body. Raises: Denied (413) over `limit` bytes, before reading where it is known."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    transport = request.transport
    if request.headers.get("Expect", "").lower() == "100-continue" and transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    pieces: list[bytes] = []
    size = 0
    try:
        while piece := await _next_piece(request):
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            pieces.append(piece)
    except web.RequestPayloadError as error:
        raise Denied(errors.bad_request(f"the body cannot be read: {error}")) from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _next_piece(request: web.BaseRequest) -> bytes:
    """Raises: Denied (408) where the client stops in the middle of its body."""
    try:
        async with asyncio.timeout(_PIECE_S):
            return await request.content.readany()
    except TimeoutError:
        text = f"no more of the body came for {_PIECE_S:.0f} s"
        raise Denied(errors.bad_request(text, status=408)) from None


def _too_large(limit: int) -> Denied:
    return Denied(errors.of_reason("too-large", f"the body is larger than {limit} bytes"))


async def _client_reads(request: web.BaseRequest) -> None:
    """A client that sends request after request and reads no answer waits here, holding nothing."""
    if request.protocol.writing_paused:
        await request.writer.drain()


def _passed_on(request: web.BaseRequest) -> bytes:
    headers = request.headers
    lines = [f"{name}: {headers[name]}\r\n" for name in _PASSED_ON if name in headers]
    return "".join(lines).encode("utf-8", "surrogateescape")
