"""OpenAI's Responses API, with vLLM's store: in this process, never emptied, off by default."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from homegptd.sim import shapes
from homegptd.sim.inference import Ask, Inference
from homegptd.sim.intake import missing, new_id
from homegptd.sim.shapes import Body, Refused
from homegptd.sim.text import chat_prompt, pieces

_NO_STORE = (
    "This vLLM engine does not support `store=True` and therefore does not support the background "
    "mode. To enable these features, set the environment variable "
    "`VLLM_ENABLE_RESPONSES_API_STORE=1` when launching the vLLM server."
)
_NOT_STORED = "background can only be used when `store` is true (parameter=background)"
_STATUS = {"length": "incomplete"}
"""An answer that was aborted says it is complete (seen on 0.32): nothing in it tells."""
Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


@dataclass(slots=True)
class _Story:
    """The events of a stream in the background, for whoever listens, from wherever."""

    events: list[bytes] = field(default_factory=list)
    over: bool = False
    """Its last event was `response.completed`. Cancelled it never is, and listeners wait on."""
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def tell(self, event: bytes) -> None:
        async with self.news:
            self.events.append(event)
            self.over = event.startswith(b"event: response.completed")
            self.news.notify_all()

    async def heard(self, after: int) -> AsyncGenerator[bytes, None]:
        at = after
        while True:
            async with self.news:
                while not self.over and len(self.events) <= at:
                    await self.news.wait()
            for event in self.events[at:]:
                yield event
            at = len(self.events)
            if self.over:
                return


class Responses:
    """Handlers for one engine."""

    def __init__(self, inference: Inference, spawn: Spawn) -> None:
        self.inference = inference
        self.intake = inference.intake
        self.stores = inference.options.store_responses
        self.kept: dict[str, Body] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.stories: dict[str, _Story] = {}
        self._spawn = spawn

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/responses", self.create),
            web.get("/v1/responses/{id}", self.retrieve, allow_head=False),
            web.post("/v1/responses/{id}/cancel", self.cancel),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.body(request)
        if body.get("background") and not (self.stores and body.get("store", True)):
            told = _NO_STORE if body.get("store", True) else _NOT_STORED
            raise Refused(400, told, "background")
        ask = self.inference.ask(body, self._prompt(body), body.get("max_output_tokens"), chat=True)
        ask.ident = str(body.get("request_id") or new_id("resp").replace("-", "_"))
        if body.get("background"):
            return await self._begin(request, ask)
        with self.intake.counted():
            if body.get("stream"):
                return await _stream(request, self._events(ask))
            await self.inference.answer(ask)
        return shapes.reply(self._keep(_response(ask, _status(ask))))

    async def _begin(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        """It says "queued" until it ends, and goes on when the client has hung up."""
        queued = self._keep(_response(ask, "queued"))
        if not ask.body.get("stream"):
            self.tasks[ask.ident] = self._spawn(self._in_background(ask))
            return shapes.reply(queued)
        story = self.stories[ask.ident] = _Story()
        self.tasks[ask.ident] = self._spawn(self._told_in_background(ask, story))
        return await _stream(request, story.heard(0))

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        found = self._found(request)
        if request.query.get("stream") != "true":
            return shapes.reply(found)
        if found["id"] not in self.stories:
            return await _stream(request, None)
        after = int(request.query.get("starting_after", -1))
        return await _stream(request, self.stories[found["id"]].heard(after + 1))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        found = self._found(request)
        if found["status"] not in ("queued", "in_progress"):
            raise Refused(400, "Cannot cancel a synchronous response.", "response_id")
        found["status"] = "cancelled"
        self.tasks[found["id"]].cancel()
        return shapes.reply(found)

    # -- inside --------------------------------------------------------------------------------

    def _prompt(self, body: Body) -> str:
        given = body.get("input")
        if not isinstance(given, str | list):
            raise Refused(400, missing("input", given), "input")
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
        if not all(isinstance(m, dict) for m in messages):
            raise Refused(400, missing("input", given), "input")
        before: list[Body] = []
        if ident := body.get("previous_response_id"):
            before = [{"role": "assistant", "content": _text(self._kept(str(ident)))}]
        return chat_prompt([*before, *messages])

    def _kept(self, ident: str) -> Body:
        if ident not in self.kept:
            raise Refused(404, f"Response with id '{ident}' not found.", "response_id")
        return self.kept[ident]

    def _found(self, request: web.Request) -> Body:
        return self._kept(request.match_info["id"])

    def _keep(self, response: Body) -> Body:
        if self.stores:
            self.kept[response["id"]] = response
        return response

    async def _in_background(self, ask: Ask) -> None:
        with contextlib.suppress(Refused):
            await self.inference.answer(ask)
        if self.kept[ask.ident]["status"] != "cancelled":
            self._keep(_response(ask, _status(ask)))

    async def _told_in_background(self, ask: Ask, story: _Story) -> None:
        async for event in self._events(ask):
            await story.tell(event)

    async def _events(self, ask: Ask) -> AsyncGenerator[bytes, None]:
        number = -1

        def tell(kind: str, **more: Any) -> bytes:
            nonlocal number
            number += 1
            return shapes.named_event(kind, {**more, "sequence_number": number, "type": kind})

        begun = _response(ask, "in_progress")
        place = {"output_index": 0}
        part = {**place, "item_id": f"msg_{ask.ident}", "content_index": 0}
        try:
            yield tell("response.created", response=begun)
            yield tell("response.in_progress", response=begun)
            async for delta in self.inference.tokens(ask):
                if len(ask.said) == 1:
                    item = {**_item(ask, "in_progress"), "content": []}
                    yield tell("response.output_item.added", item=item, **place)
                    yield tell("response.content_part.added", part=_part(""), **part)
                yield tell("response.output_text.delta", delta=delta, logprobs=[], **part)
            yield tell("response.output_text.done", text=ask.text, logprobs=[], **part)
            yield tell("response.content_part.done", part=_part(ask.text), **part)
            yield tell("response.output_item.done", item=_item(ask, "completed"), **place)
            yield tell("response.completed", response=self._keep(_response(ask, _status(ask))))
        except Refused as why:
            yield tell("error", message=str(why), code=str(why.status), param=None)


async def _stream(
    request: web.Request, events: AsyncGenerator[bytes, None] | None
) -> web.StreamResponse:
    """None: vLLM finds that it has none when its head is out already, and breaks off."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    answer.enable_chunked_encoding()
    await answer.prepare(request)
    if events is None:
        if request.transport is not None:
            request.transport.close()
        return answer
    async with contextlib.aclosing(events):
        async for event in events:
            await answer.write(event)
    await answer.write_eof()
    return answer


def _status(ask: Ask) -> str:
    return _STATUS.get(ask.finish, "completed")


def _text(response: Body) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def _part(text: str) -> Body:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


def _item(ask: Ask, status: str) -> Body:
    told = {"id": f"msg_{ask.ident}", "type": "message", "role": "assistant", "status": status}
    return {**told, "content": [_part(ask.text)]}


def _response(ask: Ask, status: str) -> Body:
    ended = status in ("completed", "incomplete", "cancelled")
    used, said = len(pieces(ask.prompt)), len(ask.said)
    usage = {"input_tokens": used, "output_tokens": said, "total_tokens": used + said}
    return {
        "id": ask.ident,
        "created_at": ask.created,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "metadata": ask.body.get("metadata"),
        "model": ask.model,
        "object": "response",
        "output": [_item(ask, "completed")] if ended else [],
        "parallel_tool_calls": True,
        "background": bool(ask.body.get("background")),
        "previous_response_id": ask.body.get("previous_response_id"),
        "status": status,
        "tools": ask.body.get("tools") or [],
        "usage": usage if ended else None,
    }
