"""What a streaming client hears while there is no answer yet: an early head, then signs of life.

Many clients give up on a server that sends no head for 30 s or 5 min. So after a short grace a
stream that waits begins with status 200 and a first event that no parser minds; every few seconds a
comment follows, and Open WebUI, which opts in by a header, gets its own status line. None of it
enters a conversation. What the engine sends later continues the same stream; every error after the
head is an event of the protocol.

A comment ends in a single line feed: followed by a blank line some parsers took it for an event
(openai-go#621, openai-python#2722).
"""

from __future__ import annotations

import json
import math
import time
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import HttpVersion11, web

from homegptd.core.model import ModelId
from homegptd.core.outlook import Outlook

from . import errors
from .clients import Client, asking
from .errors import Problem, Shape

_COMMENT = b": homegpt\n"
_PING = b'event: ping\ndata: {"type": "ping"}\n\n'
_END = b"0\r\n\r\n"
_LINGER_S = 10.0
"""How long a client that reads slowly gets to read the end of a stream that failed."""


def _chat(model: str) -> bytes:
    """No role: the engine's own first chunk has it, and the openai SDK's accumulator would join the
    two to "assistantassistant"."""
    choice = {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": None}
    return _event(_chunk("chat.completion.chunk", "chatcmpl-homegpt", model, [choice]))


def _completion(model: str) -> bytes:
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
    return _event(_chunk("text_completion", "cmpl-homegpt", model, [choice]))


def _chunk(kind: str, ident: str, model: str, choices: list[object]) -> dict[str, object]:
    created = int(time.time())
    return {"id": ident, "object": kind, "created": created, "model": model, "choices": choices}


def _event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


_OPENINGS: Mapping[str, Callable[[str], bytes]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": lambda model: _COMMENT,  # its first event must be response.created
    "/v1/messages": lambda model: _PING,
}
"""The first event by path. Paths that are missing here wait in silence: their answer to a request
that says "stream" may be none."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When a client hears something, in seconds."""

    early_head_s: float = 1.5
    """After this long without an answer a stream begins."""
    comment_s: float = 5.0
    status_s: float = 1.0
    """Between two status events, while the model is on its way."""


class Early:
    """The client's side of one stream until, and whenever, the engine says nothing."""

    __slots__ = (
        "_began", "_chunked", "_client", "_loop", "_model", "_opening", "_outlook", "_pace",
        "_percent", "_request", "_shape", "_shows_status", "_spoke_at", "_status_open", "_timer",
        "given", "keep_alive",
    )  # fmt: skip

    def __init__(
        self,
        request: web.BaseRequest,
        path: str,
        model: ModelId,
        shape: Shape,
        *,
        pace: Pace,
        outlook: Callable[[ModelId, Client], Outlook],
        loop: AbstractEventLoop,
    ) -> None:
        """`path` is one of those that `speaks` knows."""
        self._request, self._model, self._shape = request, model, shape
        self._opening, self._pace, self._outlook = _OPENINGS[path], pace, outlook
        self._chunked = request.version >= HttpVersion11
        self._client = asking()
        self.keep_alive = request.keep_alive and self._chunked
        self.given = False
        """The head is out."""
        self._loop = loop
        self._began = self._spoke_at = loop.time()
        self._percent = 0
        self._shows_status: bool | None = None  # nobody has looked
        self._status_open = False
        self._timer: TimerHandle | None = None

    # ------------------------------------------------------------ while nobody answers

    def due(self) -> bool:
        """Whether it is time to speak for who notices a silence; armed it does so by itself."""
        after_s = self._pace.early_head_s if not self.given else self._pace.comment_s
        return self._timer is None and self._loop.time() - self._spoke_at >= after_s

    def arm(self) -> None:
        """From now on the request waits: begin after the grace, then go on saying so."""
        if self._timer is None:
            grace_s = self._began + self._pace.early_head_s - self._loop.time()
            pause_s = self._pause_s() if self.given else max(grace_s, 0.0)
            self._timer = self._loop.call_later(pause_s, self._ring)

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pause_s(self) -> float:
        return self._pace.status_s if self._for_webui() else self._pace.comment_s

    def _ring(self) -> None:
        self.speak()
        self._timer = self._loop.call_later(self._pause_s(), self._ring)

    def speak(self, *, answering: bool = False) -> None:
        """A sign of life. `answering`: the engine's own head and whole events are out."""
        self._spoke_at = self._loop.time()
        self.given = self.given or answering
        if self._request.protocol.writing_paused:
            return  # the client has enough to read
        outlook = self._outlook(self._model, self._client) if self._for_webui() else None
        if outlook is not None and not (answering and outlook.at <= self._loop.time()):
            words = self._status(self._progress(outlook))
        else:
            words = _PING if self._shape is Shape.ANTHROPIC else _COMMENT
        if not self.given:
            self.given = True
            opening = self._opening(self._model)
            self._write(self._head())
            words = opening if outlook is None else opening + words
        self._write(self._framed(words))

    def last_words(self, said: str) -> bytes:
        """The end of the status line, framed; nothing where there is none."""
        if not self._status_open:
            return b""
        waited_s = self._loop.time() - self._began
        return self._framed(self._status(f"{self._model} {said} after {waited_s:.0f} s", done=True))

    # ------------------------------------------------------------ the end

    def fail(self, problem: Problem) -> bool:
        """End the stream that was begun with an error. Whether the connection can be used again."""
        self.disarm()
        self._write(self.last_words("failed"))
        self._write(self._framed(errors.frame(problem, self._shape)))
        transport = self._request.transport
        if self._chunked:
            self._write(_END)
        if self.keep_alive and not self._request.protocol.writing_paused:
            return True
        if transport is not None:
            transport.close()
            self._loop.call_later(_LINGER_S, transport.abort)
        return False

    # ------------------------------------------------------------ bytes

    def _for_webui(self) -> bool:
        if self._shows_status is None:
            client = self._request.headers.get("X-HomeGPT-Client", "")
            self._shows_status = client == "open-webui" and self._opening is _chat
        return self._shows_status

    def _status(self, text: str, *, done: bool = False) -> bytes:
        """Open WebUI shows it as its own status line, and keeps it out of the conversation."""
        self._status_open = not done
        event = {"type": "status", "data": {"description": text, "done": done}}
        chunk = _chunk("chat.completion.chunk", "chatcmpl-homegpt", self._model, [])
        return _event(chunk | {"event": event})

    def _progress(self, outlook: Outlook) -> str:
        """For example `Waking qwen: 40 % (6 s left)`. The percentage never goes back."""
        now = self._loop.time()
        left_s, waited_s = outlook.at - now, now - self._began
        if left_s <= 0.0:
            return f"{outlook.doing} …"
        percent = math.floor(100 * waited_s / (waited_s + left_s))
        self._percent = max(self._percent, percent)
        return f"{outlook.doing}: {self._percent} % ({math.ceil(left_s)} s left)"

    def _head(self) -> bytes:
        """As vLLM's own, with a word for proxies that would hold the stream back."""
        lines = [
            b"HTTP/1.1 200 OK" if self._chunked else b"HTTP/1.0 200 OK",
            b"content-type: text/event-stream; charset=utf-8",
            b"cache-control: no-cache",
            b"x-accel-buffering: no",
        ]
        lines += [b"%s: %s" % (name.encode(), text.encode()) for name, text in self._client.headers]
        if self._chunked:
            lines.append(b"Transfer-Encoding: chunked")
        if not self.keep_alive:
            lines.append(b"Connection: close")
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self._chunked and data else data

    def _write(self, data: bytes) -> None:
        transport = self._request.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)


def speaks(path: str) -> bool:
    """Whether a stream at this path can begin before its engine does."""
    return path in _OPENINGS
