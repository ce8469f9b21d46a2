"""Bodies in vLLM's shapes: errors, completions, chat completions, their streamed chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

Body = dict[str, Any]

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class Refused(Exception):
    """The request is answered with this status and an error body in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


def error_body(status: int, message: str, param: str | None = None) -> Body:
    kind = _TYPES.get(status, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def dumps(value: object) -> str:
    """JSON as FastAPI writes it: no spaces, no escapes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def reply(
    value: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A JSON answer."""
    body = dumps(value).encode()
    kind = {"Content-Type": "application/json"}
    return web.Response(body=body, status=status, headers={**kind, **(headers or {})})


def refusal(why: Refused) -> web.Response:
    return reply(error_body(why.status, str(why), why.param), status=why.status)


def usage(prompt: int, completion: int) -> Body:
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None,
    }


def chat_body(ident: str, created: int, model: str, choices: list[Body], used: Body) -> Body:
    return {
        "id": ident,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": None,
        "usage": used,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }


def chat_choice(text: str, finish: str, stop: str | None, logprobs: Body | None) -> Body:
    message: Body = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning": None,
    }
    return {
        "index": 0,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish,
        "stop_reason": stop,
        "token_ids": None,
    }


def completion_body(ident: str, created: int, model: str, choices: list[Body], used: Body) -> Body:
    return {
        "id": ident,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": None,
        "usage": used,
        "kv_transfer_params": None,
    }


def completion_choice(
    index: int, text: str, finish: str, stop: str | None, logprobs: Body | None
) -> Body:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish,
        "stop_reason": stop,
        "token_ids": None,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
    }


def chat_chunk(ident: str, created: int, model: str, choice: Body) -> Body:
    """`choice` names its delta; the rest is filled up."""
    filled = {"index": 0, "logprobs": None, "finish_reason": None, **choice}
    return {
        "id": ident,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [filled],
    }


def completion_chunk(ident: str, created: int, model: str, choice: Body) -> Body:
    filled = {"index": 0, "logprobs": None, "finish_reason": None, "stop_reason": None, **choice}
    return {
        "id": ident,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [filled],
    }


def event(body: Body) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(body).encode() + b"\n\n"


def named_event(name: str, body: Body) -> bytes:
    """One server-sent event with its name, as /v1/messages and /v1/responses have them."""
    return b"event: " + name.encode() + b"\n" + event(body)


DONE = b"data: [DONE]\n\n"
