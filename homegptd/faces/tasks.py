"""Requests that nobody waits for: titles, tags, follow-up questions, completions while typing.

Open WebUI sends them beside each chat, on the chat's model, unstreamed, as one message of the user
that begins `### Task:` (its templates, 0.6 to 0.12). When the user has gone on to another model
meanwhile, a late one would switch back for nothing.
"""

from __future__ import annotations

import re

import msgspec

from .bodies import Body

_LARGEST = 1 << 20
_MARK = b"### Task:"
_PROMPT = re.compile(
    r"\s*### Task:\s*\n[^\n]*\b(?:titles?|tags|follow-up|autocompletion)\b", re.IGNORECASE
)


class _Message(msgspec.Struct):
    role: str
    content: object = None


class _Chat(msgspec.Struct):
    messages: list[_Message]


_decoder = msgspec.json.Decoder(_Chat)


def is_task(body: Body) -> bool:
    """Whether an unstreamed chat is one of them. Costs a byte search for every other one."""
    if not isinstance(body, bytes) or len(body) > _LARGEST or body.rfind(_MARK) < 0:
        return False
    try:
        messages = _decoder.decode(body).messages
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    if len(messages) != 1 or messages[0].role != "user":
        return False
    content = messages[0].content
    return isinstance(content, str) and _PROMPT.match(content) is not None
