"""Anthropic's endpoints as vLLM 0.32 has them: a chat in other words (its `entrypoints/anthropic`).

An answer that was aborted ends as any other does, with no reason: `stop_reason` is null, or
missing where nothing is streamed. An engine that dies over a stream is an `error` event about
chunks that could not be read.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

from aiohttp import web

from homegptd.sim import shapes
from homegptd.sim.inference import Ask, Inference
from homegptd.sim.shapes import Body, Refused
from homegptd.sim.text import pieces

_STOPS = {"length": "max_tokens", "tool_calls": "tool_use"}


class Messages:
    """Handlers for one engine."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.intake = inference.intake

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/messages", self.create),
            web.post("/v1/messages/count_tokens", self.count),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await self.intake.body(request)
            ask = self.inference.chat_ask(_chat(body))
            with self.intake.counted():
                if body.get("stream"):
                    return await self._stream(request, ask)
                async for _ in self.inference.tokens(ask):
                    pass
                return shapes.reply(_message(ask))
        except Refused as why:
            return shapes.reply(_error(why), status=why.status)

    async def count(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await self.intake.body(request)
            found = len(pieces(self.inference.chat_ask(_chat(body)).prompt))
        except Refused as why:
            return shapes.reply(_error(why), status=why.status)
        used = {"original_input_tokens": found}
        return shapes.reply({"input_tokens": found, "context_management": used})

    async def _stream(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        try:
            async for event in self._events(ask):
                await answer.write(_event(event))
        except Refused as why:
            unread = f"1 validation error for ChatCompletionStreamResponse: {why}"
            error = {"type": "internal_error", "message": unread}
            await answer.write(_event({"type": "error", "error": error}))
        await answer.write(_event({"type": "message_stop"}))
        await answer.write_eof()
        return answer

    async def _events(self, ask: Ask) -> AsyncGenerator[Body, None]:
        async for delta in self.inference.tokens(ask):
            if len(ask.said) == 1:
                begun = _head(ask) | {"stop_reason": None, "stop_sequence": None}
                usage = {"input_tokens": len(pieces(ask.prompt)), "output_tokens": 0}
                yield {"type": "message_start", "message": begun | {"usage": usage}}
                block = _tool(ask, {}) if ask.call else {"type": "text", "text": ""}
                yield {"type": "content_block_start", "content_block": block, "index": 0}
            part = {"type": "text_delta", "text": delta}
            if ask.call:
                part = {"type": "input_json_delta", "partial_json": ask.said[-1]}
            yield {"type": "content_block_delta", "delta": part, "index": 0}
        if ask.said:
            yield {"type": "content_block_stop", "index": 0}
            yield {"type": "message_delta", "delta": _stop(ask), "usage": _usage(ask)}


def _chat(body: Body) -> Body:
    """The same request to the chat endpoint. Raises Refused."""
    if not isinstance(body.get("messages"), list) or not isinstance(body.get("max_tokens"), int):
        raise Refused(400, "messages and max_tokens are required")
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    chat = body | {"messages": [*system, *body["messages"]], "stop": body.get("stop_sequences")}
    if body.get("tools"):
        chat["tools"] = [
            {"function": {"name": tool["name"], "parameters": tool.get("input_schema")}}
            for tool in body["tools"]
        ]
        chat["tool_choice"] = _choice(body.get("tool_choice") or {"type": "auto"})
    return chat


def _choice(choice: Body) -> object:
    if choice["type"] == "tool":
        return {"function": {"name": choice["name"]}}
    return {"any": "required"}.get(choice["type"], choice["type"])


def _message(ask: Ask) -> Body:
    content = {"type": "text", "text": ask.text}
    if ask.call:
        content = _tool(ask, json.loads("".join(ask.said)))
    stop = {key: value for key, value in _stop(ask).items() if value is not None}
    return _head(ask) | {"content": [content], "usage": _usage(ask)} | stop


def _head(ask: Ask) -> Body:
    return {
        "id": ask.ident,
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": ask.model,
    }


def _tool(ask: Ask, given: Body) -> Body:
    call = ask.call
    return {"type": "tool_use", "id": call.ident, "name": call.name, "input": given} if call else {}


def _stop(ask: Ask) -> Body:
    if ask.call and ask.finish == ask.call.finish:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if ask.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": ask.stop}
    reason = None if ask.finish == "abort" else _STOPS.get(ask.finish, "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(ask: Ask) -> Body:
    return {"input_tokens": len(pieces(ask.prompt)), "output_tokens": len(ask.said)}


def _error(why: Refused) -> Body:
    found = shapes.error_body(why.status, str(why))["error"]
    return {"type": "error", "error": {"type": found["type"], "message": found["message"]}}


def _event(body: Body) -> bytes:
    return f"event: {body['type']}\ndata: {shapes.dumps(body)}\n\n".encode()
