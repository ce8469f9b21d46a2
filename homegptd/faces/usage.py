"""How many tokens an answer took, from its bytes as they pass: a search for one word, no parsing.

`"usage":` cannot stand inside a string of JSON, where the quote would be escaped. It comes near the
end of an answer, and in a stream of Anthropic's also at its begin.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .bodies import Body

MARK = b'"usage":'
_COUNT = re.compile(rb'"(prompt|input|completion|output)_tokens"\s*:\s*(\d{1,12})')
_WINDOW = 600
"""Bytes after the mark in which the counts stand; details of each count may be among them."""
_MOST_BODY = 1 << 20
"""A larger body is not copied for the sake of a count."""
_ASK = b'"stream_options":{"include_usage":true},'
_START = re.compile(rb"\s*\{\s*(?=\")")


class Tokens(NamedTuple):
    """None: the answer does not say."""

    read: int | None = None
    written: int | None = None


_NONE = Tokens()


def tokens(data: bytes, *, first: bool = False) -> Tokens:
    """What a piece of an answer says, at its last mark or its first."""
    at = data.find(MARK) if first else data.rfind(MARK)
    if at < 0:
        return _NONE
    read = written = None
    for kind, digits in _COUNT.findall(data[at : at + _WINDOW]):
        if kind in (b"prompt", b"input"):
            read = int(digits)
        else:
            written = int(digits)
    return Tokens(read, written)


def counts(first: bytes, last: bytes) -> Tokens:
    """What an answer says in its first piece with a mark and in its last one."""
    found = tokens(last)
    if found is _NONE or found.read is not None:
        return found
    return tokens(first, first=True)._replace(written=found.written)


def asked_for(body: Body) -> bytes | None:
    """The body of a streamed chat or completion that asks for usage as well.

    None where it says something of the kind itself, or is large.
    """
    if not isinstance(body, bytes) or len(body) > _MOST_BODY or b"stream_options" in body:
        return None
    start = _START.match(body)
    return None if start is None else b"{%s%s" % (_ASK, body[start.end() :])


def without(data: bytes) -> bytes:
    """A piece of a stream without the event that came because of `asked_for`.

    It is the one without choices, in a chunk of its own (uvicorn); anything else stays as it is.
    """
    at = data.rfind(MARK)
    start = data.rfind(b"data: {", 0, at)
    end = data.find(b"\n\n\r\n", at)
    if at < 0 or start < 2 or end < 0 or b'"choices":[]' not in data[start:end].replace(b" ", b""):
        return data
    line = data.rfind(b"\n", 0, start - 1) + 1  # that of the chunk's size
    if data[line:start] != b"%x\r\n" % (end + 2 - start):
        return data
    return data[:line] + data[end + 4 :]
