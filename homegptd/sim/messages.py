"""Anthropic's Messages API, as vLLM speaks it: whole, streamed, and counted."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from homegptd.sim import shapes
from homegptd.sim.inference import Ask, Inference
from homegptd.sim.intake import missing, new_id
from homegptd.sim.shapes import Body, Refused
from homegptd.sim.text import chat_prompt, pieces

_STOPS = {"length": "max_tokens", "stop": "end_turn"}
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
            with self.intake.counted():
                if body.get("stream"):
                    return await self._stream(request, ask)
                await self.inference.answer(ask)
        except Refused as why:
            return _refusal(why)
        content = [{"type": "text", "text": ask.text}]
        return shapes.reply(_message(ask, content, _STOPS.get(ask.finish)))

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
                    block = {"type": "text", "text": ""}
                    await tell("content_block_start", index=0, content_block=block)
                piece = {"type": "text_delta", "text": delta}
                await tell("content_block_delta", index=0, delta=piece)
        except Refused as why:
            await tell("error", error={"type": "internal_error", "message": str(why)})
        else:
            await tell("content_block_stop", index=0)
            ended = {"stop_reason": _STOPS.get(ask.finish), "stop_sequence": ask.stop}
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
