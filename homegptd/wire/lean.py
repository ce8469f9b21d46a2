"""JSON for a command line in a hurry.

`import json` pulls in `re`, `enum` and friends: 7 ms where a bare interpreter needs 11 (Python
3.11). The scanner behind `json.loads` is the C class `_json.make_scanner`, which needs none of
them. It is CPython's own and private, so anything unexpected falls back to the ordinary module.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def call_line(call_id: int, method: str, params: Mapping[str, object] | None = None) -> bytes:
    """One JSON-RPC request as a line; without parameters no JSON module is needed."""
    tail = ""
    if params:
        from json import dumps

        tail = f',"params":{dumps(params)}'
    return f'{{"jsonrpc":"2.0","id":{call_id},"method":"{method}"{tail}}}\n'.encode()


def loads(text: str) -> object:
    """The value of a JSON text.

    Raises: ValueError when it is not JSON.
    """
    scan = _scanner()
    if scan is None:
        from json import loads as whole_json

        value: object = whole_json(text)
        return value
    text = text.strip()
    try:
        value, end = scan(text, 0)
    except StopIteration:
        raise ValueError("not JSON") from None
    if end != len(text):
        raise ValueError("something follows the JSON value")
    return value


class _Context:
    """What the C scanner reads its settings from; the same defaults as `json.JSONDecoder`."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    array_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo: dict[str, str] = {}  # noqa: RUF012 - part of the scanner's shape


def _scanner() -> Callable[[str, int], tuple[object, int]] | None:
    try:
        import _json

        scan: Callable[[str, int], tuple[object, int]] = _json.make_scanner(_Context())  # type: ignore[arg-type]
    except (ImportError, AttributeError, TypeError):
        return None
    return scan
