"""What a request says: its model and its wishes, and the body as it is sent on."""

from __future__ import annotations

from functools import partial

from aiohttp import HttpVersion11, web
from msgspec import Struct
from msgspec.structs import replace
from multidict import CIMultiDictProxy

from homegptd.core.model import ModelId
from homegptd.runtime.lease import Lease
from homegptd.runtime.scheduler import Scheduler

from . import adjust, errors, multipart, openai, usage
from .ask import Ask
from .background import Begun
from .bodies import Body, Hold, reading
from .early import Early
from .errors import Denied, Problem
from .models import Models
from .openai import NotUnderstood
from .routes import Route, Where
from .stored import Stored
from .tasks import is_task

_PASSED_ON = ("Content-Type", "Accept", "X-Request-Id")
"""Everything else stays here, keys above all."""
_MAY_COUNT = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes that know `stream_options.include_usage`."""


class Wanted(Struct, frozen=True):
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
    background: Begun | None = None
    """Where its response may go on when it has been answered."""
    under: Lease | None = None
    """The lease of the response in the background that it is about."""
    ended: bytes = b""
    """How that ended, which is the answer."""


class Intake:
    """Reads requests for models."""

    def __init__(
        self,
        scheduler: Scheduler,
        models: Models,
        stored: Stored,
        *,
        max_body_bytes: int,
        tasks_switch: bool,
        task_grace_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._models = models
        self._stored = stored
        self._max_body_bytes = max_body_bytes
        self._tasks_switch = tasks_switch
        self._task_grace_s = task_grace_s

    async def read(self, request: web.BaseRequest, route: Route, hold: Hold) -> Wanted:
        """Raises: Denied."""
        try:
            if route.where is Where.STORED:
                return self._read_stored(request, route)
            if route.where is Where.FORM:
                return await self._read_form(request, route, hold)
            return await self._read_json(request, route, hold)
        except NotUnderstood as why:
            raise Denied(errors.bad_request(str(why), param=why.param)) from None

    async def _read_json(self, request: web.BaseRequest, route: Route, hold: Hold) -> Wanted:
        kind = request.content_type
        if kind != "application/json" and not kind.endswith("+json"):
            raise _wrong_kind(kind, "application/json")
        body = await hold.receive(request, self._max_body_bytes)
        wish = openai.read(body)
        model = self.named(wish.model, route, previous=wish.previous)
        adjustment = self._models.adjustment(model)
        if adjustment:
            with reading(body) as text:
                written = adjust.adjusted(bytes(text), adjustment)
            body = hold.rewritten(written)
        if not self._models.is_known_to(model, wish.model):
            body = openai.with_model(body, model)
        task = not (wish.stream or self._tasks_switch) and is_task(body)
        ask, begun = Ask(route.path, passed_on(request.headers), body, route.shape), None
        if route.stores:
            begun = Begun() if wish.background else None
            learn = partial(self._learn, model, begun)
            ask = replace(ask, learn=learn, replayable=not wish.stores)
        wanted = self._request(route, model, ask, stream=wish.stream and route.streams)
        if begun is not None:
            wanted = replace(wanted, background=begun)
        if task:
            why = "it is a background task (router.background_tasks)"
            return replace(wanted, unasked=why, grace_s=self._task_grace_s)
        return _with_usage(request, wanted)

    async def _read_form(self, request: web.BaseRequest, route: Route, hold: Hold) -> Wanted:
        if request.content_type != "multipart/form-data":
            raise _wrong_kind(request.content_type, "multipart/form-data")
        body = await hold.receive(request, self._max_body_bytes)
        form = _form(request, body)
        model = self.named(form.model, route)
        adjustment = self._models.adjustment(model)
        if adjustment:
            body = multipart.with_fields(body, form, adjustment.defaults, adjustment.overrides)
            form = _form(request, body)
        if not self._models.is_known_to(model, form.model):
            body = multipart.with_model(body, form, model)
        ask = Ask(route.path, passed_on(request.headers), body, route.shape)
        return self._request(route, model, ask, stream=form.stream)

    def _read_stored(self, request: web.BaseRequest, route: Route) -> Wanted:
        path = request.raw_path.partition("?")[0]
        ident = route.ident(path) or ""
        looks = route.method == "GET"
        query, stream = _stream_query(request) if looks else ("", False)
        model, ended = (self._stored.ended(ident) if looks and not stream else None) or (None, b"")
        model = model or self._stored.find(ident, self._scheduler.state.engines)
        if model is None or self._models.find(model) is None:
            text = f'there is no response "{ident}": its engine has ended, or never gave it'
            raise Denied(Problem(404, "not_found", text, param="response_id"))
        ask = Ask(path + query, passed_on(request.headers), b"", route.shape, method=route.method)
        under = self._stored.running.get((model, ident))
        wanted = self._request(route, model, ask, stream=stream)
        return replace(wanted, under=under, ended=ended)

    def _request(self, route: Route, model: ModelId, ask: Ask, *, stream: bool) -> Wanted:
        unasked = "" if route.wakes else f"{route.method} {route.path} wakes no model"
        ask = replace(ask, replayable=False) if route.once else ask
        return Wanted(model, stream, ask, self._scheduler.loop.time(), unasked)

    def _learn(self, model: ModelId, begun: Begun | None, data: bytes) -> None:
        ident = self._stored.learn(data, model, self._scheduler.state.engines)
        if begun is not None and ident is not None:
            begun.tell(ident)

    def named(self, name: str | None, route: Route, *, previous: str | None = None) -> ModelId:
        """Which model is meant. Raises: Denied, also where it is not for this."""
        model = self._meant(name, route, previous)
        kind = self._models.kind(model)
        if kind is not None and route.kinds is not None and kind not in route.kinds:
            text = f'"{model}" does not do {route.path}: its engine.kind is {kind}'
            raise Denied(errors.bad_request(text, param="model"))
        return model

    def _meant(self, name: str | None, route: Route, previous: str | None) -> ModelId:
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


def _with_usage(request: web.BaseRequest, wanted: Wanted) -> Wanted:
    """A stream says how many tokens it took only if it is asked. The relay takes that out again."""
    ask = wanted.ask
    if not wanted.stream or ask.path not in _MAY_COUNT or request.version < HttpVersion11:
        return wanted
    body = usage.asked_for(ask.body)
    if body is None:
        return wanted
    return replace(wanted, ask=replace(ask, body=body, strip_usage=True))


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


def passed_on(headers: CIMultiDictProxy[str]) -> bytes:
    """The lines that the engine gets."""
    lines = [f"{name}: {headers[name]}\r\n" for name in _PASSED_ON if name in headers]
    return "".join(lines).encode("utf-8", "surrogateescape")
