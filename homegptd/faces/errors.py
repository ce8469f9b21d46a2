"""What a client is told instead of an answer, in the form that its protocol expects.

Forms: OpenAI's error object, Anthropic's, and for streams the frame that makes every SDK raise.
`Retry-After` and `x-should-retry` are obeyed by the openai and anthropic SDKs; they retry 408, 409,
429 and 5xx by themselves, at most 60 s later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import msgspec
from aiohttp import web

from homegptd.core.refusals import Reason, Refusal
from homegptd.wire import codes

_LATEST_RETRY_S = 60
_RETRY_S: Mapping[str, float] = {
    "too-many-requests": 2, "queue-full": 5, "waited-too-long": 5, "shutting-down": 5,
}  # fmt: skip
"""When to come again where the refusal itself names no time."""
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Shape(Enum):
    """The protocol a client speaks."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Problem:
    """An error for the client."""

    status: int
    code: str
    message: str
    kind: str = "invalid_request_error"
    hint: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Denied(Exception):
    """Raised by handlers, turned into an answer in one place."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def bad_request(message: str, *, param: str | None = None, status: int = 400) -> Problem:
    """The client must send something else."""
    return Problem(status, "bad_request", message, param=param, headers=_NEVER)


def refused(refusal: Refusal, *, param: str | None = None) -> Problem:
    """The policy's no, as the client hears it."""
    word = refusal.reason.value
    if refusal.reason is Reason.UNKNOWN_MODEL and param is None:
        param = "model"
    return of_reason(
        word, refusal.message, hint=refusal.hint, param=param, after_s=refusal.retry_after_s
    )


def of_reason(
    word: str,
    message: str,
    *,
    hint: str | None = None,
    param: str | None = None,
    after_s: float | None = None,
) -> Problem:
    """A word of `wire.codes.TABLE` and what was wrong."""
    row = codes.row(word)
    return Problem(
        row.http,
        codes.openai_code(word),
        message,
        row.openai,
        hint,
        param,
        _retry(word, row.http, after_s),
    )


def said(status: int, content: bytes) -> Problem:
    """What vLLM answered where it could not answer with a status any more."""
    try:
        found = msgspec.json.decode(content[content.find(b"{") : content.rfind(b"}") + 1])
        told = found["error"]
        return Problem(
            status,
            str(told.get("code") or status),
            str(told["message"]),
            str(told.get("type") or "server_error"),
            param=told.get("param"),
        )
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return Problem(status, str(status), f"the engine answered {status}", "server_error")


_NEVER = {"x-should-retry": "false"}
_ENDS = codes.openai_code("shutting-down")


def _retry(word: str, status: int, after_s: float | None) -> Mapping[str, str]:
    seconds = _RETRY_S.get(word) if after_s is None else after_s
    if status in (429, 502, 503) and seconds is not None:
        wait = min(max(math.ceil(seconds), 1), _LATEST_RETRY_S)
        return {"Retry-After": str(wait), "x-should-retry": "true"}
    if status == 502:
        return {}
    return _NEVER


def text(problem: Problem) -> str:
    """The message with its hint."""
    return problem.message if problem.hint is None else f"{problem.message} ({problem.hint})"


def body(problem: Problem, shape: Shape) -> dict[str, object]:
    """The JSON object of an error answer."""
    told = text(problem)
    if shape is Shape.ANTHROPIC:
        kind = _ANTHROPIC.get(problem.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": told}}
    error = {"message": told, "type": problem.kind, "param": problem.param, "code": problem.code}
    return {"error": error}


def response(problem: Problem, shape: Shape = Shape.OPENAI) -> web.Response:
    """The error as a whole answer."""
    reply = web.json_response(body(problem, shape), status=problem.status, headers=problem.headers)
    if problem.code == _ENDS:
        reply.force_close()  # or the client sends its next request to nobody
    return reply


def frame(problem: Problem, shape: Shape) -> bytes:
    """The error as the last event of a stream: no `[DONE]` follows it.

    The SDKs raise on an `error` key in the data (OpenAI) and on `event: error` (Anthropic, and the
    stream of /v1/responses).
    """
    content = body(problem, shape)
    if shape is Shape.OPENAI:
        return b"data: " + json.dumps(content).encode() + b"\n\n"
    if shape is Shape.RESPONSES:
        told = {"code": problem.code, "message": problem.message, "param": problem.param}
        content = {"type": "error", **told, **content}
    return b"event: error\ndata: " + json.dumps(content).encode() + b"\n\n"
