"""From TypedDicts to JSON Schema, and from JSON to TypedDicts: types are written once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

Schema = dict[str, Any]
_SCALARS: dict[object, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Default:
    """In `Annotated[...]`: what an absent key means."""

    value: object


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a TypedDict. `doc` is empty where the name says it all."""

    name: str
    type: object
    required: bool
    doc: str
    default: Default | None


def fields(record: type) -> tuple[Field, ...]:
    """The keys of a TypedDict, in order."""
    hints = get_type_hints(record, include_extras=True)
    return tuple(_field(name, hint) for name, hint in hints.items())


def schema(hint: object, records: dict[str, type]) -> Schema:
    """The JSON Schema of a type; TypedDicts become references and are noted in `records`.

    Raises: TypeError for a type that has no shape in JSON.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if hint is object:
        return {}
    if is_typeddict(hint):
        return _reference(hint, records)
    if origin is Annotated:
        return schema(args[0], records) | _notes(args[1:])
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": schema(args[0], records)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema(args[1], records)}
    if origin in (Union, UnionType):
        return {"anyOf": [schema(arg, records) for arg in args]}
    raise TypeError(f"no JSON Schema for {hint!r}")


def record_schema(record: type, records: dict[str, type]) -> Schema:
    """The JSON Schema of a TypedDict itself; the types in it are noted in `records`."""
    keys = fields(record)
    body: Schema = {
        "type": "object",
        "description": (record.__doc__ or "").strip(),
        "properties": {key.name: schema(key.type, records) | _describe(key) for key in keys},
        "required": [key.name for key in keys if key.required],
        "additionalProperties": False,
    }
    return body


def problem(value: object, hint: object, at: str) -> str | None:
    """Why `value` is not of the type, in words that begin with `at`; None when it is."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return problem(value, args[0], at)
    if is_typeddict(hint):
        return _record_problem(value, hint, at)
    if origin is list:
        return _list_problem(value, args[0], at)
    if origin is dict:
        return None if isinstance(value, dict) else f"{at} must be an object, not {word(value)}"
    if _fits(value, hint):
        return None
    return f"{at} must be {expected(hint)}, not {word(value)}"


def expected(hint: object) -> str:
    """A type in words: `true or false`, `1 or 2`, `text`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return expected(args[0])
    if origin is Literal:
        return " or ".join(str(arg) for arg in args)
    if origin in (Union, UnionType):
        return " or ".join(expected(arg) for arg in args)
    words: dict[object, str] = {
        str: "text", int: "a whole number", float: "a number", bool: "true or false",
        NoneType: "null",
    }  # fmt: skip
    return words.get(hint, "an object")


def word(value: object) -> str:
    """A value in a few words, fit for a message."""
    match value:
        case dict():
            return "an object"
        case list():
            return "an array"
        case True | False | None:
            return {True: "true", False: "false", None: "null"}[value]
        case str():
            shown = value if len(value) <= 40 else f"{value[:40]}…"
            return f'"{ascii(shown)[1:-1]}"'
        case _:
            return str(value)[:40]


def _field(name: str, hint: object) -> Field:
    required = get_origin(hint) is not NotRequired
    if not required:
        hint = get_args(hint)[0]
    notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    doc = next((note for note in notes if isinstance(note, str)), "")
    default = next((note for note in notes if isinstance(note, Default)), None)
    return Field(name, hint, required, doc, default)


def _notes(notes: tuple[object, ...]) -> Schema:
    found: Schema = {}
    for note in notes:
        if isinstance(note, str):
            found["description"] = note
        elif isinstance(note, Default):
            found["default"] = note.value
    return found


def _describe(key: Field) -> Schema:
    return {"description": key.doc} if key.doc else {}


def _reference(record: Any, records: dict[str, type]) -> Schema:
    if record.__name__ not in records:
        records[record.__name__] = record
        record_schema(record, records)  # notes what lies deeper
    return {"$ref": f"#/components/schemas/{record.__name__}"}


def _fits(value: object, hint: object) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(problem(value, arg, "") is None for arg in args)
    if hint is object:
        return True
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    match value:
        case bool():
            return hint is bool
        case int():
            return hint in (int, float)
        case float():
            return hint is float and math.isfinite(value)
        case str():
            return hint is str and _is_text(value)
        case None:
            return hint is NoneType
        case _:
            return False


def _is_text(value: str) -> bool:
    r"""JSON may say `"\ud800"`, half a character, which no log and no terminal can take."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _record_problem(value: object, record: Any, at: str) -> str | None:
    if not isinstance(value, dict):
        return f"{at} must be an object, not {word(value)}"
    keys = {key.name: key for key in fields(record)}
    for name in value:
        if name not in keys:
            return f"{at}.{name} is unknown; known are {', '.join(keys) or 'none'}"
    for key in keys.values():
        if key.name in value:
            found = problem(value[key.name], key.type, f"{at}.{key.name}")
            if found:
                return found
        elif key.required:
            return f"{at}.{key.name} is missing"
    return None


def _list_problem(value: object, hint: object, at: str) -> str | None:
    if not isinstance(value, list):
        return f"{at} must be an array, not {word(value)}"
    found = (problem(entry, hint, f"{at}[{index}]") for index, entry in enumerate(value))
    return next((text for text in found if text), None)
