"""Requests that can be read in one way only: a POST as nearly every client sends it.

Nothing is judged here. What is not plain to the last byte goes to aiohttp's parser as it came, and
is answered or refused there. So there is little to get wrong: one pattern for the whole head, each
field once, none that says how the message is read but one Content-Length.
"""

from __future__ import annotations

import re

from multidict import CIMultiDict, CIMultiDictProxy

from .heads import LENGTH, Frame

LARGEST_HEAD = 8000
"""Bytes; aiohttp takes as many for a single line."""
_FIELD = r"[A-Za-z0-9-]+: [!-~](?:[ -~]*[!-~])?\r\n"
_HEAD = re.compile(rf"POST (/[A-Za-z0-9_/.-]*) HTTP/1\.1\r\n((?:{_FIELD})+)\r\n")
_PAIRS = re.compile(r"([^:]+): ([^\r]+)\r\n")
_MOST_FIELDS = 100
"""aiohttp takes 128."""
_KEPT = {"connection": "keep-alive"}
"""Says what is so anyway."""
_SPECIAL = frozenset(
    ("connection", "content-encoding", "expect", "keep-alive", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade")
)  # fmt: skip
"""What may change how a message is read, or what becomes of its connection."""


class Head(Frame):
    """That of a request."""

    __slots__ = ("headers", "path")

    def __init__(
        self, path: str, headers: CIMultiDictProxy[str], head: bytes, length: re.Match[bytes]
    ) -> None:
        super().__init__(head, length)
        self.path, self.headers = path, headers


def read(data: bytes) -> Head | None:
    """The plain head with which data begins."""
    end = data.find(b"\r\n\r\n", 0, LARGEST_HEAD) + 4
    length = LENGTH.search(data, 0, end) if end > 4 else None
    if length is None:
        return None
    try:
        found = _HEAD.fullmatch(data[:end].decode("ascii"))
    except UnicodeDecodeError:
        return None
    if found is None:
        return None
    path, fields = found.groups()
    pairs = _PAIRS.findall(fields)
    by_name = {name.lower(): value for name, value in pairs}
    special = _SPECIAL.intersection(by_name)
    if len(by_name) < len(pairs) or any(by_name[each] != _KEPT.get(each) for each in special):
        return None
    if "host" not in by_name or len(pairs) > _MOST_FIELDS:
        return None
    headers = CIMultiDictProxy(CIMultiDict(pairs))
    return Head(path, headers, data[:end], length)
