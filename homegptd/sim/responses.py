"""OpenAI's Responses API, with vLLM's store: in this process, never emptied, off by default."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
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
_STATUS = {"length": "incomplete"}
"""An answer that was aborted says it is complete (seen on 0.32): nothing in it tells."""
Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Responses:
    """Handlers for one engine."""

    def __init__(self, inference: Inference, spawn: Spawn) -> None:
        self.inference = inference
        self.intake = inference.intake
        self.stores = inference.options.store_responses
        self.kept: dict[str, Body] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
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
            raise Refused(400, _NO_STORE, "background")
        ask = self.inference.ask(body, self._prompt(body), body.get("max_output_tokens"), chat=True)
        ask.ident = str(body.get("request_id") or new_id("resp").replace("-", "_"))
        if body.get("background"):
            queued = self._keep(_response(ask, "queued"))
            self.tasks[ask.ident] = self._spawn(self._in_background(ask))
            return shapes.reply(queued)
        with self.intake.counted():
            if body.get("stream"):
                return await self._stream(request, ask)
            await self.inference.answer(ask)
        return shapes.reply(self._keep(_response(ask, _status(ask))))

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        return shapes.reply(self._found(request))

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

    async def _stream(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        number = 0

        async def tell(kind: str, **more: Any) -> None:
            nonlocal number
            await answer.write(
                shapes.named_event(kind, {**more, "sequence_number": number, "type": kind})
            )
            number += 1

        begun = _response(ask, "in_progress")
        place = {"output_index": 0}
        part = {**place, "item_id": f"msg_{ask.ident}", "content_index": 0}
        try:
            await tell("response.created", response=begun)
            await tell("response.in_progress", response=begun)
            async for delta in self.inference.tokens(ask):
                if len(ask.said) == 1:
                    item = {**_item(ask, "in_progress"), "content": []}
                    await tell("response.output_item.added", item=item, **place)
                    await tell("response.content_part.added", part=_part(""), **part)
                await tell("response.output_text.delta", delta=delta, logprobs=[], **part)
            await tell("response.output_text.done", text=ask.text, logprobs=[], **part)
            await tell("response.content_part.done", part=_part(ask.text), **part)
            await tell("response.output_item.done", item=_item(ask, "completed"), **place)
            await tell("response.completed", response=self._keep(_response(ask, _status(ask))))
        except Refused as why:
            await tell("error", message=str(why), code=str(why.status), param=None)
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
