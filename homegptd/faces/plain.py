"""Requests that can be read in one way only: a POST as nearly every client sends it.

Nothing is judged here. What is not plain to the last byte goes to aiohttp's parser as it came, and
is answered or refused there. So there is little to get wrong: one pattern for the whole head, each
field once, none that says how the message is read but one Content-Length.
"""

from __future__ import annotations

import re

from multidict import CIMultiDict, CIMultiDictProxy

LARGEST_HEAD = 8000
"""Bytes; aiohttp takes as many for a single line."""
_FIELD = r"[A-Za-z0-9-]+: [!-~](?:[ -~]*[!-~])?\r\n"
_HEAD = re.compile(rf"POST (/[A-Za-z0-9_/.-]*) HTTP/1\.1\r\n((?:{_FIELD})+)\r\n")
_PAIRS = re.compile(r"([^:]+): ([^\r]+)\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]+)\r\n", re.IGNORECASE)
_MOST_DIGITS = 7
_MOST_FIELDS = 100
"""aiohttp takes 128."""
_KEPT = {"connection": "keep-alive"}
"""Says what is so anyway."""
_SPECIAL = frozenset(
    ("connection", "content-encoding", "expect", "keep-alive", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade")
)  # fmt: skip
"""What may change how a message is read, or what becomes of its connection."""


class Head:
    """A plain head, whatever the length of the body that it announces.

    Clients send the same one again and again over a connection, so it is looked at once.
    """

    __slots__ = ("_after", "_before", "headers", "path")

    def __init__(
        self, path: str, headers: CIMultiDictProxy[str], before: bytes, after: bytes
    ) -> None:
        self.path, self.headers = path, headers
        self._before, self._after = before, after  # all of it but the digits of the length

    def split(self, data: bytes) -> tuple[int, bytes] | None:
        """How many bytes the body is to have and what is there of it, if data has this head."""
        if not data.startswith(self._before):
            return None
        start = len(self._before)
        end = data.find(b"\r", start, start + _MOST_DIGITS + 1)
        if end < 0 or not data.startswith(self._after, end):
            return None
        digits = data[start:end]
        return (int(digits), data[end + len(self._after) :]) if digits.isdigit() else None


def read(data: bytes) -> Head | None:
    """The plain head with which data begins."""
    end = data.find(b"\r\n\r\n", 0, LARGEST_HEAD) + 4
    length = _LENGTH.search(data, 0, end) if end > 4 else None
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
    return Head(path, headers, data[: length.start(1)], data[length.end(1) : end])
