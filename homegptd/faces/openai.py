"""What the router must know of a request's body: the model it names and whether it streams.

Small bodies go through msgspec. A big one (images travel inside) is scanned: strings are jumped
over with `bytes.find`, so 10 MB of base64 cost a third of a millisecond instead of the three that a
parser would keep the event loop standing. The scanner knows depth, since "model" also occurs inside
tool schemas, and gives up on a body of too many pieces, which msgspec then reads. It checks less
than a parser; the engine checks the rest.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Struct

from .bodies import Body, Text, edited, reading

_SMALL = 64 * 1024
_BUDGET = 1000
"""Strings and brackets the scanner looks at before it leaves the body to msgspec."""
_GAPS = 256 * 1024
"""Bytes between them that it crosses: long lists of numbers are msgspec's business too."""
_BACKSLASHES = 64
_LONGEST_KEY = 64
_PIECE = re.compile(rb'["{}\[\]]')
_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
_WORD = re.compile(rb"[^,}\] \t\r\n]+")
_MEMBER = re.compile(rb'[ \t\r\n]*"')
_LONGEST = 1024
"""Bytes of a value; what is longer is no name and no switch."""
_ODD = object()
_YES = frozenset({"1", "on", "t", "true", "y", "yes"})
_SPACE = b" \t\r\n"


class Wish(Struct, frozen=True):
    """What a body asks for. `model` is None where it names none."""

    model: str | None
    stream: bool
    stores: bool = False
    """Whether it wants the answer kept in the engine, or builds on one that is."""
    background: bool = False
    """Whether it may be made after the request was answered."""
    previous: str | None = None
    """The id of the answer it builds on."""


class NotUnderstood(Exception):
    """The body is not what the router can read; the text is for the client."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


_ABSENT = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    """Values are only looked at where they are short: nobody's memory is for a list as a model."""

    model: msgspec.Raw = _ABSENT
    stream: msgspec.Raw = _ABSENT
    background: msgspec.Raw = _ABSENT
    store: msgspec.Raw = _ABSENT
    previous_response_id: msgspec.Raw = _ABSENT


_KEYS = frozenset(field.encode() for field in _Body.__struct_fields__)
_decoder = msgspec.json.Decoder(_Body)
_any = msgspec.json.Decoder()


class _Named(msgspec.Struct):
    model: str
    stream: bool | None = None


_named = msgspec.json.Decoder(_Named)


def named_only(body: bytes) -> str | None:
    """The model of a small body that asks for no stream; None where it takes `read` to tell."""
    try:
        found = _named.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return None if found.stream else found.model


def read(body: Body) -> Wish:
    """The wish of a JSON body. Raises: NotUnderstood."""
    if isinstance(body, bytes):
        return _wish(_found(body))
    with body.text() as text:
        return _wish(_found(text))


def _found(text: Text) -> _Body:
    return (_scan(text) if len(text) > _SMALL else None) or _parse(text)


def with_model(body: Body, model: str) -> Body:
    """The same body naming `model`, whatever it named before; only for a body that was read.

    The name goes last, and the last of two equal keys counts, for vLLM as for the router.
    """
    with reading(body) as text:
        end = text.rfind(b"}")
        empty = _MEMBER.match(text, text.find(b"{") + 1) is None
    comma = b"" if empty else b","
    return edited(body, (end, end, b'%s"model":%s' % (comma, msgspec.json.encode(model))))


def _wish(found: _Body) -> Wish:
    model = _scalar(found.model)
    if model is not None and not isinstance(model, str):
        raise NotUnderstood(f'"model" must be a string of at most {_LONGEST} bytes', param="model")
    stream = found.stream is not _ABSENT and is_yes(_scalar(found.stream))
    if found.store is found.background is found.previous_response_id is _ABSENT:
        return Wish(model or None, stream)
    background, previous = bool(_scalar(found.background)), _scalar(found.previous_response_id)
    stores = _scalar(found.store) is True or background or previous is not None
    before = previous if isinstance(previous, str) else None
    return Wish(model or None, stream, stores, background, before)


def _scalar(raw: msgspec.Raw) -> object:
    """None where it is absent; `_ODD` where it is too long to be of use."""
    if raw is _ABSENT:
        return None
    text = bytes(memoryview(raw)[: _LONGEST + 1])
    try:
        return _ODD if len(text) > _LONGEST else _any.decode(text)
    except UnicodeDecodeError as error:
        raise NotUnderstood(f"the body is not UTF-8: {error.reason}") from None


def is_yes(value: object) -> bool:
    """What pydantic, and with it vLLM, takes for true."""
    return value.lower() in _YES if isinstance(value, str) else value in (True, 1)


def _parse(body: Text) -> _Body:
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError:
        raise NotUnderstood("the body must be a JSON object") from None
    except msgspec.DecodeError as error:
        raise NotUnderstood(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise NotUnderstood("the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise NotUnderstood(f"the body is not UTF-8: {error.reason}") from None


def _scan(body: Text) -> _Body | None:
    """None where the body is not plain enough."""
    found, depth, at, gaps = _Body(), 0, 0, 0
    if body[:64].lstrip(_SPACE)[:1] != b"{":
        return None
    for _ in range(_BUDGET):
        piece = _PIECE.search(body, at, at + _GAPS)
        if piece is None:
            return None
        gaps += piece.start() - at
        if gaps > _GAPS:
            return None
        at = piece.end()
        match piece.group():
            case b"{" | b"[":
                depth += 1
            case b"}" | b"]":
                depth -= 1
                if depth == 0:
                    return found
            case _:
                end = _string_end(body, at)
                if end < 0:
                    return None
                if depth == 1 and not _key(body, at, end, found):
                    return None
                at = end + 1
    return None


def _string_end(body: Text, at: int) -> int:
    """The index of the quote that ends the string which begins at `at`; -1 if none does."""
    for _ in range(_BUDGET):
        end = body.find(b'"', at)
        if end < 0:
            return -1
        tail = body[max(at, end - _BACKSLASHES) : end]
        slashes = len(tail) - len(tail.rstrip(b"\\"))
        if slashes == _BACKSLASHES:
            return -1
        if slashes % 2 == 0:
            return end
        at = end + 1
    return -1


def _key(body: Text, start: int, end: int, found: _Body) -> bool:
    """Note the value if this is a key we look for. False: this needs a parser."""
    if end - start > _LONGEST_KEY:
        return body.find(b"\\", start, end) < 0
    name = body[start:end]
    if name not in _KEYS:
        return b"\\" not in name
    colon = _COLON.match(body, end + 1)
    if colon is None:
        return True  # a value that happens to read so
    value = _value(body, colon.end())
    if value is None:
        return False
    raw = msgspec.Raw(value)
    try:
        _scalar(raw)
    except msgspec.DecodeError:
        return False
    setattr(found, name.decode(), raw)
    return True


def _value(body: Text, at: int) -> bytes | None:
    """The scalar that begins at `at`; None if there is none."""
    if body[at : at + 1] == b'"':
        end = _string_end(body, at + 1)
        return body[at : end + 1] if end >= 0 else None
    if body[at : at + 1] in (b"{", b"["):
        return None
    word = _WORD.match(body, at)
    return word.group() if word else None
