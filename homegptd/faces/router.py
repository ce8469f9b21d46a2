"""Requests to models: which paths there are, which model a request names, and its way there.

The table is an allow-list of exact paths. What is not in it does not reach an engine, and what is
reaches it under the table's own spelling.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from aiohttp import HttpVersion11, web

from homegptd.core.model import Awake, Draining, ModelId
from homegptd.core.refusals import Reason, Refusal
from homegptd.runtime.scheduler import Refused, Scheduler

from . import errors, openai, usage
from .accounts import Accounts, End, Record
from .clients import asking
from .errors import Denied, Shape
from .models import Models
from .relay import CLOSED, KEPT, Ask, Broken, Limits, relay
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
_MAY_COUNT = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes that know `stream_options.include_usage`."""
_PIECE_S = 60.0
"""Between two pieces of a request's body, in seconds."""
_PASSED_ON = ("Content-Type", "Accept", "X-Request-Id")
"""Everything else stays here, keys above all."""


EngineKeys: TypeAlias = Callable[[ModelId], str | None]
"""What an engine asks for itself (its own API key), by model; None: nothing."""


def no_key(model: ModelId) -> str | None:
    return None


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


@dataclass(frozen=True, slots=True)
class _Request:
    """What a client asked, read and understood."""

    model: ModelId
    stream: bool
    ask: Ask


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
        accounts: Accounts | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._models = models
        self._addresses = addresses
        self._engine_keys = engine_keys
        self._settings = settings
        self.accounts = accounts or Accounts()
        self.pool = Pool()
        self._held_bytes = 0

    async def answer(self, request: web.BaseRequest, route: Route) -> web.StreamResponse:
        """The whole life of one request. Errors are answers here."""
        record = Record(asking().name)
        try:
            return await self._answer(request, route, record)
        finally:
            self.accounts.close(record)

    async def _answer(
        self, request: web.BaseRequest, route: Route, record: Record
    ) -> web.StreamResponse:
        try:
            with asking().counted():
                await _client_reads(request)
                wanted = _with_usage(request, await self._read(request, route))
                record.model = wanted.model
                with self._holding(len(wanted.ask.body)):
                    return await self._serve(request, wanted, record)
        except Denied as denied:
            record.end, problem = End.REFUSED, denied.problem
        except Refused as refused:
            record.end, problem = End.REFUSED, errors.refused(refused.refusal)
        except Broken as broken:
            record.end = End.FAILED
            if broken.refusal.reason is not Reason.CUT:  # the machine has told of a cut itself
                log.warning("%s", broken.refusal.message)
            if broken.begun:
                return KEPT if broken.kept else CLOSED
            problem = errors.refused(broken.refusal)
        return errors.response(problem, route.shape)

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

    async def _serve(
        self, request: web.BaseRequest, wanted: _Request, record: Record
    ) -> web.StreamResponse:
        """Once, and once more where the engine was lost before the answer began.

        A try that did not even reach the engine does not count, but is made only once more too.
        """
        sent = tries = 0
        while True:
            try:
                return await self._try(request, wanted, record, replay=tries > 0)
            except Broken as broken:
                tries += 1
                sent += broken.sent
                if not broken.again or sent > 1 or tries > 2:
                    raise
                record.retried = sent > 0
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
        self, request: web.BaseRequest, wanted: _Request, record: Record, *, replay: bool
    ) -> web.StreamResponse:
        client = asking()
        lease = self._scheduler.lease(
            wanted.model,
            freezable=wanted.stream,
            may_switch=client.may_switch,
            max_wait_s=client.max_wait_s,
            replay=replay,
        )
        async with lease:
            record.granted(lease.ticket.id, self._scheduler.loop.time() - lease.ticket.since)
            answer = await relay(
                request,
                self._with_its_key(wanted),
                lease=lease,
                pool=self.pool,
                address=self._addresses(wanted.model),
                limits=self._settings.limits,
                record=record,
            )
        record.end = End.ANSWERED
        return answer

    def _with_its_key(self, wanted: _Request) -> Ask:
        """The engine's own key, where it asks for one. The client's has stayed at the door."""
        key = self._engine_keys(wanted.model)
        if key is None:
            return wanted.ask
        line = b"Authorization: Bearer %s\r\n" % key.encode()
        return replace(wanted.ask, headers=wanted.ask.headers + line)

    async def _read(self, request: web.BaseRequest, route: Route) -> _Request:
        """Raises: Denied."""
        kind = request.content_type
        if kind != "application/json" and not kind.endswith("+json"):
            text = f'the content type is "{kind}", it must be application/json'
            raise Denied(errors.bad_request(text, status=415))
        body = await read_body(request, self._settings.max_body_bytes)
        try:
            wish = openai.read(body)
        except openai.NotUnderstood as why:
            raise Denied(errors.bad_request(str(why), param=why.param)) from None
        model = self._model(wish.model)
        self._must_do(model, route)
        if wish.model is None:
            body = openai.with_model(body, model)
        return _Request(model, wish.stream, Ask(route.path, _passed_on(request), body, route.shape))

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


def _with_usage(request: web.BaseRequest, wanted: _Request) -> _Request:
    """A stream says how many tokens it took only if it is asked. The relay takes that out again."""
    ask = wanted.ask
    if not wanted.stream or ask.path not in _MAY_COUNT or request.version < HttpVersion11:
        return wanted
    body = usage.asked_for(ask.body)
    if body is None:
        return wanted
    return replace(wanted, ask=replace(ask, body=body, strip_usage=True))


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
    if request.content.is_eof():  # all of it is here, as with most requests: nothing to wait for
        return request.content.read_nowait()
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
