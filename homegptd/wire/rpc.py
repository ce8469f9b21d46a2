"""JSON-RPC 2.0, one message a line: bytes in, values out (https://www.jsonrpc.org/specification)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn, TypeAlias

Id: TypeAlias = str | int | float | None
Params: TypeAlias = "dict[str, object] | list[object]"


class Code(IntEnum):
    """The specification's own error codes (§5.1); the reasons of homeGPT have theirs in `codes`."""

    PARSE_ERROR = -32700
    INVALID_REQUEST = -32600
    METHOD_NOT_FOUND = -32601
    INVALID_PARAMS = -32602
    INTERNAL_ERROR = -32603


@dataclass(frozen=True, slots=True)
class Call:
    """A request that wants an answer; its id may even be null (§4, discouraged but legal)."""

    id: Id
    method: str
    params: Params


@dataclass(frozen=True, slots=True)
class Notification:
    """A request without an id: it is never answered, not even when it is wrong."""

    method: str
    params: Params


@dataclass(frozen=True, slots=True)
class Reply:
    """A call that went well."""

    id: Id
    result: object


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that did not. `data` is {reason, hint} where homeGPT speaks."""

    id: Id
    code: int
    message: str
    data: object = None


class BadMessage(Exception):
    """What came is not JSON-RPC; `failure` is the answer that it deserves."""

    def __init__(self, code: Code, message: str, call_id: Id = None) -> None:
        super().__init__(message)
        self.failure = Failure(call_id, int(code), message)


Item: TypeAlias = Call | Notification | Reply | Failure
Batch: TypeAlias = tuple[Item | BadMessage, ...]


def parse(line: bytes) -> Item | Batch:
    """The message of one line, or the messages of a batch, bad ones among them in their places.

    Raises: BadMessage when there is nothing to answer but the line as a whole.
    """
    value = _json_value(line)
    if not isinstance(value, list):
        return _item(value)
    if not value:
        raise BadMessage(Code.INVALID_REQUEST, "Invalid Request: the batch is empty")
    return tuple(_item_or_bad(entry) for entry in value)


def encode(item: Item) -> bytes:
    """One message as a line.

    Raises: ValueError or TypeError for what JSON cannot say (NaN, an object of ours).
    """
    return _line(_shape(item))


def encode_batch(items: Iterable[Item]) -> bytes:
    """Several messages as one line; raises as `encode`."""
    return _line([_shape(item) for item in items])


def _json_value(line: bytes) -> object:
    """Raises: BadMessage for bad UTF-8, bad JSON, NaN, endless digits and bottomless nesting."""
    try:
        value: object = json.loads(line.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        # UnicodeDecodeError and JSONDecodeError are ValueErrors, too many digits is one as well
        raise BadMessage(Code.PARSE_ERROR, f"Parse error: {_cause(exc)}") from None
    return value


def _cause(exc: Exception) -> str:
    return "nested too deeply" if isinstance(exc, RecursionError) else str(exc)[:200]


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _item_or_bad(value: object) -> Item | BadMessage:
    try:
        return _item(value)
    except BadMessage as bad:
        return bad


def _item(value: object) -> Item:
    if not isinstance(value, dict):
        raise BadMessage(Code.INVALID_REQUEST, "Invalid Request: a message is an object")
    call_id = _id(value.get("id"))
    if value.get("jsonrpc") != "2.0":
        raise BadMessage(Code.INVALID_REQUEST, 'Invalid Request: "jsonrpc" must be "2.0"', call_id)
    if "method" in value:
        return _request(value, call_id)
    return _response(value, call_id)


def _id(value: object) -> Id:
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise BadMessage(Code.INVALID_REQUEST, "Invalid Request: an id is a string or a number")
    if isinstance(value, float) and not math.isfinite(value):  # 1e999: could not be sent back
        raise BadMessage(Code.INVALID_REQUEST, "Invalid Request: the id is too large a number")
    return value


def _request(value: dict[str, object], call_id: Id) -> Call | Notification:
    method, params = value["method"], value.get("params", {})
    if not isinstance(method, str):
        raise BadMessage(Code.INVALID_REQUEST, "Invalid Request: a method is a string", call_id)
    if not isinstance(params, dict | list):
        raise BadMessage(
            Code.INVALID_REQUEST, "Invalid Request: params are an object or an array", call_id
        )
    if "id" in value:
        return Call(call_id, method, params)
    return Notification(method, params)


def _response(value: dict[str, object], call_id: Id) -> Reply | Failure:
    match value:
        case {"result": result} if "error" not in value and "id" in value:
            return Reply(call_id, result)
        case {"error": {"code": int(code), "message": str(message), **rest}} if (
            "result" not in value and "id" in value
        ):
            return Failure(call_id, code, message, rest.get("data"))
        case _:
            raise BadMessage(Code.INVALID_REQUEST, "Invalid Request: no method", call_id)


def _shape(item: Item) -> dict[str, object]:
    match item:
        case Call(call_id, method, params):
            return {"jsonrpc": "2.0", "id": call_id, "method": method, "params": params}
        case Notification(method, params):
            return {"jsonrpc": "2.0", "method": method, "params": params}
        case Reply(call_id, result):
            return {"jsonrpc": "2.0", "id": call_id, "result": result}
        case Failure(call_id, code, message, data):
            error: dict[str, object] = {"code": code, "message": message}
            if data is not None:
                error["data"] = data
            return {"jsonrpc": "2.0", "id": call_id, "error": error}


def _line(value: object) -> bytes:
    """ASCII on purpose: escapes carry even a lone surrogate that came in as one."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"
