"""Anthropic's Messages API, as vLLM speaks it: whole, streamed, and counted.

An answer that was aborted ends as any other does, but for its reason: there is none.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from homegptd.sim import shapes
from homegptd.sim.inference import Ask, Inference
from homegptd.sim.intake import missing, new_id
from homegptd.sim.shapes import Body, Refused
from homegptd.sim.text import chat_prompt, pieces
from homegptd.sim.tools import Call, call_of

_STOPS = {"length": "max_tokens", "stop": "end_turn", "tool_calls": "tool_use"}
"""Of an answer that was aborted vLLM gives no reason."""


class Messages:
    """Handlers for one engine."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.intake = inference.intake

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/messages", self.messages),
            web.post("/v1/messages/count_tokens", self.count),
        ]

    async def messages(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await self.intake.body(request)
            ask = self.inference.ask(body, _prompt(body), _limit(body), chat=True)
            ask.ident = new_id("chatcmpl")
            ask.call = call_of(_as_chat(body), self.inference.options)
            with self.intake.counted():
                if body.get("stream"):
                    return await self._stream(request, ask)
                await self.inference.answer(ask)
        except Refused as why:
            return _refusal(why)
        content = {"type": "text", "text": ask.text}
        if ask.call:
            content = _use(ask.call, json.loads("".join(ask.said)))
        return shapes.reply(_message(ask, [content], _stop(ask)))

    async def count(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await self.intake.body(request)
            return shapes.reply({"input_tokens": len(pieces(_prompt(body)))})
        except Refused as why:
            return _refusal(why)

    async def _stream(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        tell = _Teller(answer)
        try:
            async for delta in self.inference.tokens(ask):
                if len(ask.said) == 1:
                    await tell("message_start", message=_message(ask, [], None))
                    block = _use(ask.call, {}) if ask.call else {"type": "text", "text": ""}
                    await tell("content_block_start", index=0, content_block=block)
                piece = {"type": "text_delta", "text": delta}
                if ask.call:
                    piece = {"type": "input_json_delta", "partial_json": ask.said[-1]}
                await tell("content_block_delta", index=0, delta=piece)
        except Refused as why:
            await tell("error", error={"type": "internal_error", "message": str(why)})
        else:
            await tell("content_block_stop", index=0)
            ended = {"stop_reason": _stop(ask), "stop_sequence": ask.stop}
            await tell("message_delta", delta=ended, usage=_usage(ask))
            await tell("message_stop")
        await answer.write_eof()
        return answer


class _Teller:
    """Writes events whose name is their type."""

    def __init__(self, answer: web.StreamResponse) -> None:
        self.answer = answer

    async def __call__(self, kind: str, **more: Any) -> None:
        await self.answer.write(shapes.named_event(kind, {"type": kind, **more}))


def _prompt(body: Body) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, missing("messages", messages), "messages")
    if not body.get("model"):
        raise Refused(400, missing("model", None), "model")
    system = body.get("system")
    first = [{"role": "system", "content": system}] if system else []
    return chat_prompt([*first, *messages])


def _as_chat(body: Body) -> Body:
    """The tools in OpenAI's words."""
    if not body.get("tools"):
        return {}
    tools = [{"name": t["name"], "parameters": t.get("input_schema")} for t in body["tools"]]
    choice = body.get("tool_choice") or {"type": "auto"}
    named = {"function": {"name": choice.get("name")}}
    kinds = {"tool": named, "any": "required"}
    return {
        "messages": body["messages"],
        "tools": [{"type": "function", "function": tool} for tool in tools],
        "tool_choice": kinds.get(choice["type"], choice["type"]),
    }


def _use(call: Call, given: Body) -> Body:
    return {"type": "tool_use", "id": call.ident, "name": call.name, "input": given}


def _stop(ask: Ask) -> str | None:
    return "tool_use" if ask.call and ask.finish == ask.call.finish else _STOPS.get(ask.finish)


def _limit(body: Body) -> object:
    if "max_tokens" not in body:
        raise Refused(400, missing("max_tokens", None), "max_tokens")
    return body["max_tokens"]


def _usage(ask: Ask) -> Body:
    return {"input_tokens": len(pieces(ask.prompt)), "output_tokens": len(ask.said)}


def _message(ask: Ask, content: list[Body], stop: str | None) -> Body:
    told: Body = {"id": ask.ident, "type": "message", "role": "assistant", "content": content}
    told["model"] = ask.model
    if stop is not None:
        told["stop_reason"] = stop
    return told | {"usage": _usage(ask)}


def _refusal(why: Refused) -> web.Response:
    told = shapes.error_body(why.status, str(why))["error"]
    error = {"type": told["type"], "message": told["message"]}
    return shapes.reply({"type": "error", "error": error}, status=why.status)
