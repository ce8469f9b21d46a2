"""The realtime websocket (`/v1/realtime`): a session holds its model awake, so it must not idle.

vLLM (0.32) speaks first (`session.created`) and wants the model in a `session.update`; clients of
OpenAI put it into the query. So the router speaks first itself, reads until it knows the model,
wakes it, drops the engine's own greeting, and from then on passes texts both ways. A session ends
with an `error` event that says why: after `idle_s` of silence, in the next pause when another model
wants the place, at a cut, or with its engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from homegptd.core.model import Draining, ModelId
from homegptd.core.refusals import Reason, Refusal
from homegptd.runtime.lease import Lease, Refused
from homegptd.runtime.scheduler import Scheduler

from . import errors
from .clients import asking
from .errors import Denied, Problem
from .pool import Address

log = logging.getLogger(__name__)

LARGEST = 16 << 20
"""Bytes of one message; uvicorn's own limit."""
_PAUSE_S = 3.0
"""Of silence, in which a session makes room for a model that others wait for."""
_NAMED_S = 30.0
"""Until the client must have named the model."""
_EARLY = 1 << 20
"""Bytes of messages that may come before it does."""
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Line:
    """What a session needs of the router."""

    scheduler: Scheduler
    named: Callable[[str | None], ModelId]
    """The model of that name. Raises: Denied."""
    address: Callable[[ModelId], Address]
    engine_key: Callable[[ModelId], str | None]
    noticed: Callable[[ModelId], Awaitable[None]]
    """Until the scheduler knows too that an engine is lost, or a while."""
    told: Callable[[Refusal], Problem]
    """What the client hears."""
    idle_s: float


class _Over(Exception):
    """The session ends: `message` goes to the client as an event, where there is one to tell."""

    def __init__(self, message: str, code: str, close: int = WSCloseCode.TRY_AGAIN_LATER) -> None:
        super().__init__(message)
        self.message, self.code, self.close = message, code, close


async def answer(request: web.BaseRequest, line: Line) -> web.StreamResponse:
    """The whole life of one session. Raises: Denied, before the handshake."""
    given = request.query.get("model")
    model = line.named(given) if given else None
    client = web.WebSocketResponse(
        max_msg_size=LARGEST, timeout=_CLOSE_S, protocols=("realtime",), compress=False
    )
    if not client.can_prepare(request).ok:
        text = "this is a websocket: ask with Upgrade"
        headers = {"Upgrade": "websocket", "x-should-retry": "false"}
        raise Denied(Problem(426, "bad_request", text, headers=headers))
    await client.prepare(request)
    try:
        await _Session(client, line).run(model)
    except _Over as over:
        await _say(client, "error", error=over.message, code=over.code)
        await client.close(code=over.close, message=over.message.encode()[:120])
    except ConnectionError:
        await client.close(code=WSCloseCode.GOING_AWAY)
    except Exception:  # it is too late for an answer of HTTP
        log.exception("a realtime session failed")
        await client.close(code=WSCloseCode.INTERNAL_ERROR)
    return client


async def _say(client: web.WebSocketResponse, kind: str, **more: object) -> None:
    with suppress(ConnectionError):
        await client.send_str(msgspec.json.encode({"type": kind, **more}).decode())


class _Session:
    def __init__(self, client: web.WebSocketResponse, line: Line) -> None:
        self._client = client
        self._line = line
        self._loop = line.scheduler.loop
        self._model: ModelId | None = None
        self._heard_at = self._loop.time()
        self._patience: asyncio.Timeout | None = None

    async def run(self, model: ModelId | None) -> None:
        """Raises: _Over; ConnectionError where the client is gone."""
        name = f"sess-{uuid.uuid4().hex}"
        await _say(self._client, "session.created", id=name, created=int(time.time()))
        early: list[str] = []
        if model is None:
            model, early = await self._until_named()
        self._model = model
        first = msgspec.json.encode({"type": "session.update", "model": model}).decode()
        inbox: asyncio.Queue[str] = asyncio.Queue(maxsize=1)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read(inbox), name="realtime client")
            served = group.create_task(self._serve(model, [first, *early], inbox), name="realtime")
            await asyncio.wait((reader, served), return_when=asyncio.FIRST_COMPLETED)
            for task in (reader, served):
                task.cancel()
        for task in (reader, served):
            if not task.cancelled() and (over := task.result()) is not None:
                raise over

    # ------------------------------------------------------------ which model

    async def _until_named(self) -> tuple[ModelId, list[str]]:
        early: list[str] = []
        try:
            async with asyncio.timeout(_NAMED_S):
                while sum(map(len, early)) <= _EARLY:
                    text = await self._receive()
                    if text is None:
                        raise ConnectionResetError("the client is gone")
                    update = _update(text)
                    if update is None:
                        early.append(text)
                    elif update.get("model") is None:
                        await _say(
                            self._client, "error", error="Missing required field: model",
                            code="invalid_event",
                        )  # fmt: skip
                    else:
                        return self._named(update["model"]), early
                text = f"more than {_EARLY >> 20} MiB came before a session.update named a model"
        except TimeoutError:
            text = "no session.update named a model"
        raise _Over(text, "invalid_event", WSCloseCode.POLICY_VIOLATION)

    def _named(self, name: object) -> ModelId:
        if not isinstance(name, str):
            raise _Over('"model" must be a string', "invalid_event", WSCloseCode.POLICY_VIOLATION)
        try:
            return self._line.named(name)
        except Denied as denied:
            problem = denied.problem
            text = errors.text(problem)
            raise _Over(text, problem.code, WSCloseCode.POLICY_VIOLATION) from None

    def _checked(self, text: str) -> str:
        """A later `session.update` names the same model, or none."""
        update = _update(text)
        if update is None:
            return text
        if update.get("model") is not None and self._named(update["model"]) != self._model:
            told = f'this session is for "{self._model}": open another one'
            raise _Over(told, "model_not_found", WSCloseCode.POLICY_VIOLATION)
        return msgspec.json.encode({**update, "model": self._model}).decode()

    # ------------------------------------------------------------ client and engine

    async def _receive(self) -> str | None:
        """The client's next text; None at the end."""
        message = await self._client.receive()
        self._hear()
        if message.type is WSMsgType.TEXT:
            return str(message.data)
        if message.type is WSMsgType.BINARY:
            text = "messages are texts, with the sound in base64"
            raise _Over(text, "invalid_event", WSCloseCode.UNSUPPORTED_DATA)
        return None

    async def _read(self, inbox: asyncio.Queue[str]) -> _Over | None:
        """Until the client goes, one message ahead; more wait where its network makes them wait."""
        try:
            while (text := await self._receive()) is not None:
                await inbox.put(text)
        except _Over as over:
            return over
        return None

    async def _serve(self, model: ModelId, first: list[str], inbox: asyncio.Queue[str]) -> _Over:
        """How it ended. An engine that cannot be reached may have died: then once more."""
        key, text = asking(), ""
        for again in (False, True):
            lease = self._line.scheduler.lease(
                model,
                freezable=False,
                may_switch=key.may_switch,
                max_wait_s=key.max_wait_s,
                replay=again,
            )
            try:
                async with lease:
                    return await self._converse(lease, first, inbox)
            except Refused as refused:
                return self._over(refused.refusal)
            except aiohttp.WSServerHandshakeError as error:
                text = f'the engine of "{model}" answered {error.status} to /v1/realtime'
                return _Over(text, "engine_fault", WSCloseCode.POLICY_VIOLATION)
            except (OSError, aiohttp.ClientError) as error:
                why = getattr(error, "strerror", None) or type(error).__name__
                text = f'the engine of "{model}" cannot be reached ({why.lower()})'
            if not again:
                await self._line.noticed(model)
        return self._over(Refusal(Reason.ENGINE_FAULT, text))

    async def _converse(self, lease: Lease, first: list[str], inbox: asyncio.Queue[str]) -> _Over:
        at = self._line.address(lease.model)
        unix = isinstance(at, str)
        connector = aiohttp.UnixConnector(at) if isinstance(at, str) else aiohttp.TCPConnector()
        url = "http://engine" if unix else "http://{}:{}".format(*at)
        secret = self._line.engine_key(lease.model)
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        async with (
            aiohttp.ClientSession(connector=connector, headers=headers) as http,
            http.ws_connect(f"{url}/v1/realtime", max_msg_size=LARGEST, compress=0) as engine,
        ):
            for text in first:
                await engine.send_str(text)
            lease.served()
            with self._line.scheduler.watched(lambda lines: self._look()):
                return await self._both_ways(lease, engine, inbox)

    async def _both_ways(
        self,
        lease: Lease,
        engine: aiohttp.ClientWebSocketResponse,
        inbox: asyncio.Queue[str],
    ) -> _Over:
        async with asyncio.TaskGroup() as group:
            tasks = (
                group.create_task(self._from_client(engine, inbox), name="realtime to engine"),
                group.create_task(self._from_engine(engine), name="realtime to client"),
                group.create_task(self._silence(), name="realtime silence"),
            )
            await asyncio.wait((*tasks, lease.cut), return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
        if lease.cut.done():
            return self._over(lease.cut.result())
        return next(task.result() for task in tasks if not task.cancelled())

    async def _from_client(
        self, engine: aiohttp.ClientWebSocketResponse, inbox: asyncio.Queue[str]
    ) -> _Over:
        try:
            while True:
                await engine.send_str(self._checked(await inbox.get()))
        except _Over as over:
            return over
        except ConnectionError:
            return self._lost()

    async def _from_engine(self, engine: aiohttp.ClientWebSocketResponse) -> _Over:
        greeted = False
        async for message in engine:
            if message.type is not WSMsgType.TEXT:
                break
            self._hear()
            if not greeted and '"session.created"' in message.data[:200]:
                greeted = True
                continue
            with suppress(ConnectionError):
                await self._client.send_str(message.data)
        return self._lost()

    def _over(self, refusal: Refusal) -> _Over:
        problem = self._line.told(refusal)
        return _Over(errors.text(problem), problem.code)

    def _lost(self) -> _Over:
        text = f'the engine of "{self._model}" closed the session'
        return self._over(Refusal(Reason.ENGINE_FAULT, text))

    # ------------------------------------------------------------ silence

    def _hear(self) -> None:
        self._heard_at = self._loop.time()
        self._look()

    def _look(self) -> None:
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(self._heard_at + self._may_be_silent_s())

    def _may_be_silent_s(self) -> float:
        return min(_PAUSE_S, self._line.idle_s) if self._is_wanted() else self._line.idle_s

    def _is_wanted(self) -> bool:
        """Whether somebody waits for the place of this model."""
        engines = self._line.scheduler.state.engines
        engine = engines.get(self._model) if self._model is not None else None
        return engine is not None and isinstance(engine.phase, Draining)

    def _leaves_for(self) -> str:
        engine = self._line.scheduler.state.engines.get(self._model or ModelId(""))
        other = getattr(engine.phase, "wanted_by", None) if engine is not None else None
        return "is put to sleep" if other in (None, self._model) else "makes room for another model"

    async def _silence(self) -> _Over:
        """Until nobody has spoken for long enough."""
        try:
            async with asyncio.timeout(None) as self._patience:
                self._hear()
                await asyncio.Event().wait()
        except TimeoutError:
            pass
        if self._is_wanted():
            return _Over(f'"{self._model}" {self._leaves_for()}', "cut")
        text = f"nobody spoke for {self._line.idle_s:g} s"
        return _Over(text, "idle", WSCloseCode.GOING_AWAY)


def _update(text: str) -> dict[str, object] | None:
    """The event if it is a `session.update`."""
    if '"session.update"' not in text:
        return None
    try:
        event = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    return event if isinstance(event, dict) and event.get("type") == "session.update" else None
