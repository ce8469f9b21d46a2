"""Heads of messages: an engine's answer, and what stays the same from one message to the next."""

from __future__ import annotations

import re

from msgspec import Struct

LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]+)\r\n", re.IGNORECASE)
HOP_BY_HOP = frozenset(
    [b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"te", b"trailer",
     b"transfer-encoding", b"upgrade"]
)  # fmt: skip
_MOST_DIGITS = 7


class Head(Struct, frozen=True):
    """The head of an answer. `length` is None where the answer is chunked, or says nothing."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    chunked: bool
    length: int | None
    kind: bytes
    """The content type; empty if there is none."""


class Frame:
    """A head that has been read, whatever the length of the body that it announces.

    Clients and engines send the same one again and again over a connection.
    """

    __slots__ = ("_after", "_before", "_latest", "_rest", "_start")

    def __init__(self, head: bytes, length: re.Match[bytes]) -> None:
        """`length`: what `LENGTH` found in it, and will find nowhere else."""
        self._before, self._after = head[: length.start(1)], head[length.end(1) :]
        self._start, self._rest = len(self._before), len(self._after)
        self._latest = self._start + _MOST_DIGITS + 1

    def split(self, data: bytes) -> tuple[int, int] | None:
        """How many bytes the body is to have and where it starts, if data has this head."""
        start = self._start
        end = data.find(b"\r", start, self._latest)
        if end < 0 or not (data.startswith(self._before) and data.startswith(self._after, end)):
            return None
        digits = data[start:end]
        return (int(digits), end + self._rest) if digits.isdigit() else None


def framed(raw: bytes, head: Head) -> Frame | None:
    """That of a JSON answer which says nothing of the connection. A parser has read it, and would
    have refused a second length."""
    length = LENGTH.search(raw)
    if head.status != 200 or head.kind != b"application/json" or length is None:
        return None
    plain = HOP_BY_HOP.isdisjoint(name.lower() for name, _ in head.headers)
    return Frame(raw, length) if plain else None
