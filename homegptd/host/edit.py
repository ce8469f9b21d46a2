"""Adding a model to the text of a configuration, or taking one out, with all comments kept. The
same for the file of API keys.

The text is edited by lines; PyYAML's node tree says which ones.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

import yaml

from homegptd.config.nodes import Document, compose

from .commands import HostFault

Value = str | int | float | Sequence["Value"] | Mapping[str, "Value"]
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./@-]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null"}


def added(text: str, entry: Mapping[str, Value], *, section: str = "models") -> str:
    """The text with one more entry at the end of a section. Raises: HostFault."""
    models = _list(text, section)
    rows = text.splitlines()
    after = _end(models.value[-1], rows, models.start_mark.column)
    block = item(entry, models.start_mark.column)
    return "\n".join([*rows[: after + 1], "", *block, *rows[after + 1 :]]) + "\n"


def item(entry: Mapping[str, Value], column: int) -> list[str]:
    """The lines of one entry of a list."""
    indent = " " * column
    return [f"{indent}{'- ' if at == 0 else '  '}{row}" for at, row in enumerate(_rows(entry))]


def removed(text: str, ident: str) -> str:
    """The text without a model and the comments right above it. Raises: HostFault."""
    return without(text, ident) or _no_model(ident)


def without(text: str, ident: str, *, section: str = "models", by: str = "id") -> str | None:
    """The text without an entry and the comments right above it; None if it is not there.

    Raises: HostFault.
    """
    models = _list(text, section)
    rows = text.splitlines()
    item = next((one for one in models.value if _id(one, by) == ident), None)
    if item is None:
        return None
    first, last = item.start_mark.line, _end(item, rows, models.start_mark.column)
    while first and rows[first - 1].lstrip().startswith("#"):
        first -= 1
    if first and not rows[first - 1].strip():
        first -= 1
    return "\n".join([*rows[:first], *rows[last + 1 :]]) + "\n"


def _no_model(ident: str) -> NoReturn:
    raise HostFault(f'there is no model "{ident}" in models:', "homegptctl status")


def _list(text: str, section: str) -> yaml.SequenceNode:
    root = compose(text, Document(""))
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == section and isinstance(value, yaml.SequenceNode) and value.value:
            if not value.flow_style:
                return value
            break
    raise HostFault(f"cannot edit {section}: it is not a list of lines that begin with a dash")


def _id(item: yaml.Node, by: str) -> str | None:
    pairs = item.value if isinstance(item, yaml.MappingNode) else ()
    return next((value.value for key, value in pairs if key.value == by), None)


def _end(item: yaml.Node, rows: Sequence[str], column: int) -> int:
    """The last line of a model; comments below it that are indented like it are its own."""
    last = _last_row(item)
    for row in rows[last + 1 :]:
        words = row.lstrip()
        if not words.startswith("#") or len(row) - len(words) <= column:
            break
        last += 1
    return last


def _last_row(node: yaml.Node) -> int:
    """The last line with something of the node; its end mark lies behind comments and blanks."""
    if isinstance(node, yaml.ScalarNode) or getattr(node, "flow_style", False):
        end = node.end_mark
        return int(end.line if end.column or end.line == node.start_mark.line else end.line - 1)
    inner = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
    return max([int(node.start_mark.line), *map(_last_row, inner)])


def _rows(entry: Mapping[str, Value]) -> list[str]:
    rows: list[str] = []
    for key, value in entry.items():
        if isinstance(value, Mapping):
            rows += [f"{key}:", *(f"  {row}" for row in _rows(value))]
        else:
            rows.append(f"{key}: {scalar(value)}")
    return rows


def scalar(value: Value) -> str:
    """A value on one line, as a person would write it."""
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        raise TypeError("a mapping has lines of its own")
    if isinstance(value, Sequence):
        return f"[{', '.join(map(scalar, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
