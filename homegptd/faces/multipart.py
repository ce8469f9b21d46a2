"""The model that a form names (multipart/form-data), before or after the file.

Parts are found by searching for the delimiter, so a file is crossed at memory speed and never
copied. What vLLM's parser (python-multipart under Starlette) would read otherwise is refused rather
than guessed: fields, headers and delimiters have one spelling here (RFC 7578).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from .bodies import Body, Text, edited
from .openai import NotUnderstood, is_yes

_MOST_PARTS = 1000
"""Starlette's own limit."""
_MOST_HEAD = 16 * 1024
_MOST_VALUE = 1024
_BOUNDARIES = re.compile(r";\s*boundary\s*=", re.IGNORECASE)
_BOUNDARY = re.compile(
    r';\s*boundary=(?:"([^"\\]{1,70})"|([^\s;,"]{1,70}))\s*(?:;|$)', re.IGNORECASE
)
_LEAD = re.compile(rb"[\r\n]{0,64}")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OPTION = re.compile(rb';[ \t]*([A-Za-z][A-Za-z*0-9]*)=("(?:[^"\\]|\\.)*"|[^\s;"]+)')
_DISPOSITION = re.compile(rb"form-data(?:%s)*;?" % _OPTION.pattern, re.IGNORECASE)
_CHARSET = re.compile(r"charset\s*=\s*\"?([^\s;\"]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Form:
    """What the router must know of a form, and where to change it."""

    model: str | None
    stream: bool
    first: int
    """Where the first delimiter begins."""
    last: int
    """Where the closing one does, its line break included."""
    value: tuple[int, int] | None
    """Where the text of the field `model` lies that counts, which is the last one."""
    delimiter: bytes


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    is_file: bool
    start: int
    end: int


def read(content_type: str, body: Text) -> Form:
    """The form in a body. Raises: NotUnderstood."""
    delimiter = _delimiter(content_type)
    lead = _LEAD.match(body)
    first = lead.end() if lead else 0
    if body[first : first + len(delimiter)] != delimiter:
        raise NotUnderstood("the form does not begin with its boundary")
    model: _Part | None = None
    stream, last = False, first
    for part in _parts(body, first, delimiter):
        last = part.end
        if part.name in ("model", "stream") and part.is_file:
            raise NotUnderstood(f'the field "{part.name}" must be a text, not a file')
        if part.name == "model":
            model = part
        elif part.name == "stream":
            stream = is_yes(_text(body, part))
    name = _text(body, model) if model else ""
    value = (model.start, model.end) if model else None
    return Form(name or None, stream, first, last, value, delimiter)


def with_model(body: Body, form: Form, model: str) -> Body:
    """The same form naming `model`."""
    if form.value is None:
        return _with_parts(body, form, {"model": model}, {})
    start, end = form.value
    return edited(body, (start, end, model.encode()))


def with_fields(
    body: Body, form: Form, defaults: Mapping[str, object], overrides: Mapping[str, object]
) -> Body:
    """The same form with more fields: `defaults` before the client's, `overrides` after them.

    The last of two equal fields counts. What is no text, number or truth value has no form here.
    """
    return _with_parts(body, form, _scalars(defaults), _scalars(overrides))


def _with_parts(
    body: Body, form: Form, before: Mapping[str, str], after: Mapping[str, str]
) -> Body:
    front = b"".join(_part(form, name, text) + b"\r\n" for name, text in before.items())
    back = b"".join(b"\r\n" + _part(form, name, text) for name, text in after.items())
    return edited(body, (form.first, form.first, front), (form.last, form.last, back))


def _part(form: Form, name: str, text: str) -> bytes:
    head = b'%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
    return head % (form.delimiter, name.encode()) + text.encode()


def _scalars(values: Mapping[str, object]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in values.items()
        if isinstance(value, str | int | float)
    }


def _delimiter(content_type: str) -> bytes:
    found = _BOUNDARY.search(content_type)
    if found is None or len(_BOUNDARIES.findall(content_type)) != 1:
        raise NotUnderstood("the content type must name one boundary")
    charset = _CHARSET.search(content_type)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8"):
        raise NotUnderstood(f'the form\'s charset is "{charset[1][:40]}", it must be utf-8')
    try:
        return b"--" + (found[1] or found[2]).encode("ascii")
    except UnicodeEncodeError:
        raise NotUnderstood("the boundary must be plain ASCII") from None


def _parts(body: Text, at: int, delimiter: bytes) -> Iterator[_Part]:
    """Every part up to the closing delimiter. Raises: NotUnderstood."""
    at += len(delimiter)
    for _ in range(_MOST_PARTS):
        if body[at : at + 2] == b"--":
            return
        if body[at : at + 2] != b"\r\n":
            raise NotUnderstood("a boundary of the form is not followed by a line break")
        start = body.find(b"\r\n\r\n", at, at + _MOST_HEAD)
        if start < 0:
            raise NotUnderstood("a part of the form has no end of its headers")
        name, is_file = _head(body[at + 2 : start])
        end = _end(body, start + 4, delimiter)
        yield _Part(name, is_file, start + 4, end)
        at = end + 2 + len(delimiter)
    if body[at : at + 2] != b"--":
        raise NotUnderstood(f"the form has more than {_MOST_PARTS} parts")


def _end(body: Text, at: int, delimiter: bytes) -> int:
    """Where the data that begins at `at` ends."""
    mark = b"\r\n" + delimiter
    end = body.find(mark, at)
    if end < 0:
        raise NotUnderstood("the form does not end with its boundary")
    return end


def _head(raw: bytes) -> tuple[str, bool]:
    """The field's name, and whether it is a file. Raises: NotUnderstood."""
    dispositions = []
    for line in raw.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name) or b"\n" in value or b"\r" in value:
            raise NotUnderstood("a part of the form has a header that is none")
        if name.lower() == b"content-disposition":
            dispositions.append(value.strip(b" \t"))
    if len(dispositions) != 1 or not _DISPOSITION.fullmatch(dispositions[0]):
        raise NotUnderstood("a part of the form has no Content-Disposition that can be read")
    options = [(key.lower(), value) for key, value in _OPTION.findall(dispositions[0])]
    names = [value.strip(b'"') for key, value in options if key.startswith(b"name")]
    if len(names) != 1 or b"\\" in names[0] or (b"name*") in dict(options):
        raise NotUnderstood("a part of the form must have one plain name")
    is_file = any(key.startswith(b"filename") for key, _ in options)
    return names[0].decode("utf-8", "replace"), is_file


def _text(body: Text, part: _Part) -> str:
    if part.end - part.start > _MOST_VALUE:
        raise NotUnderstood(f'the field "{part.name}" is longer than {_MOST_VALUE} bytes')
    try:
        return body[part.start : part.end].decode()
    except UnicodeDecodeError:
        raise NotUnderstood(f'the field "{part.name}" is not UTF-8') from None
