"""Whether vLLM cut an answer itself, seen in its bytes as they pass.

A search for a word finds suspects, and only those are read: what a client sent can come back inside
an answer (metadata and tools of a response, the input of a tool), with the same words in it.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

from .usage import MARK

ABORT = b'"abort"'
ERROR_EVENT = b'data: {"error"'
_ABORT = re.compile(rb'(?:finish|stop)_reason"\s*:\s*"abort"')
_CANCELLED = re.compile(rb'"status":"cancelled"')
"""How vLLM 0.32 translates it for /v1/responses. Without Harmony an aborted response says
"completed"; nothing in its bytes tells."""
_GOES_ON = b'"finish_reason":null'
_NO_REASON = b'"delta":{"stop_reason":null'
"""Of message_delta, the translation for /v1/messages; one not streamed has no reason at all."""
_EVENT = b"data: "
_NONE = Raw(b"")


class _Part(msgspec.Struct):
    finish_reason: Raw = _NONE
    stop_reason: Raw = _NONE
    status: Raw = _NONE

    @property
    def ended(self) -> bytes:
        return bytes(self.finish_reason) or bytes(self.stop_reason)


class _Answer(_Part):
    choices: list[_Part] | None = None
    delta: _Part | str | None = None
    response: _Part | None = None


_decoder = msgspec.json.Decoder(_Answer)


def going_on(data: bytes) -> bytes | None:
    """How an event ends that says no more than that its answer goes on, from there to the end.

    None if these bytes end in any other way. vLLM 0.32 yields each event by itself, with one
    choice, whose reason to end comes after all that was generated; what comes behind that is the
    same in event after event, or usage.
    """
    at = data.rfind(_GOES_ON)
    return data[at:] if at >= 0 and data.find(MARK, at) < 0 else None


def reads_more(path: str) -> bool:
    """Whether it takes more than a search for `ABORT` to see a cut in its answers."""
    return path in ("/v1/responses", "/v1/messages")


def cut_at(path: str, data: bytes, *, sse: bool, whole: bool) -> int:
    """Where it shows; -1: nowhere. `whole`: these bytes are all of an answer that is no stream."""
    # rfind costs a third of what `in` does for such short bytes (CPython 3.11)
    if data.rfind(ABORT) >= 0:
        for match in _ABORT.finditer(data):
            if _is_cut(_around(data, match.start(), sse=sse), path):
                return match.start()
    if path == "/v1/responses":
        for match in _CANCELLED.finditer(data):
            if _is_cut(_around(data, match.start(), sse=sse), path):
                return match.start()
    elif path == "/v1/messages":
        if sse:
            return data.find(_NO_REASON)
        if whole and b'"type":"message"' in data and b'"stop_reason":' not in data:
            return 0
    return -1


def _around(data: bytes, at: int, *, sse: bool) -> bytes:
    """The JSON in which it stands: of its event, or all there is."""
    if not sse:
        return data
    start, end = data.rfind(_EVENT, 0, at), data.find(b"\n", at)
    return data[start + len(_EVENT) if start >= 0 else 0 : end if end >= 0 else len(data)]


def _is_cut(text: bytes, path: str) -> bool:
    """Also where that cannot be read: half an answer is worse than one that is asked for again."""
    try:
        answer = _decoder.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return True
    parts = [answer, answer.response, answer.delta, *(answer.choices or ())]
    known = [part for part in parts if isinstance(part, _Part)]
    if any(part.ended == b'"abort"' for part in known):
        return True
    return path == "/v1/responses" and any(bytes(part.status) == b'"cancelled"' for part in known)
