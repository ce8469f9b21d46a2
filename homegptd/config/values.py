"""Readers: from a YAML node to a typed value, or `Bad` with what was found and what is allowed.

Scalars are read by the type that is wanted, from their text: where a name belongs, `no` is the
name "no"; where a number belongs, `"8000"` in quotes is a text and a mistake.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

import yaml

from .nodes import Document, line_of, shown

T = TypeVar("T")

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "yes", "on"})
_FALSE = frozenset({"false", "no", "off"})
WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,2})?")
_LONGEST_GUESS = 40


class Bad(Exception):
    """A value that cannot be read; the text says what was found and what is allowed."""


@dataclass(frozen=True, slots=True)
class Item:
    """A node, where it stands, and the document that collects its problems."""

    node: yaml.Node
    path: str
    document: Document

    @property
    def line(self) -> int:
        return line_of(self.node)

    def problem(self, message: str) -> None:
        self.document.problems.add(self.line, self.path, message)


Reader = Callable[[Item], T]


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value in _NULL


def found(node: yaml.Node) -> str:
    if is_null(node):
        return "found nothing"
    if isinstance(node, yaml.ScalarNode):
        return f'found the text "{shown(node.value)}"' if node.style else f"found {quoted(node)}"
    return "found a list" if isinstance(node, yaml.SequenceNode) else "found a mapping"


def quoted(node: yaml.ScalarNode) -> str:
    """Numbers stand bare in messages, words in quotes."""
    return shown(node.value) if NUMBER.fullmatch(node.value) else f'"{shown(node.value)}"'


def suggestion(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str | None:
    """The known word that was probably meant."""
    if len(word) > _LONGEST_GUESS:
        return None
    close = get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def _scalar(item: Item, wanted: str) -> yaml.ScalarNode:
    node = item.node
    item.document.spend(node)
    if not isinstance(node, yaml.ScalarNode) or is_null(node):
        raise Bad(f"{found(node)}, must be {wanted}")
    if not str(node.tag).startswith("tag:yaml.org,2002:"):
        raise Bad(f"the tag {shown(str(node.tag))} means nothing here")
    return node


def _plain(item: Item, wanted: str) -> str:
    node = _scalar(item, wanted)
    if node.style:
        hint = "; write it without quotes" if NUMBER.fullmatch(node.value) else ""
        raise Bad(f"{found(node)}, must be {wanted}{hint}")
    return str(node.value)


def text(item: Item) -> str:
    """One line of text, exactly as written: never a date, a number or a truth value."""
    value = str(_scalar(item, "a text").value)
    if not value.strip():
        raise Bad("must not be empty")
    if not value.isprintable():
        raise Bad("must be one line without control characters")
    return value


def matching(pattern: str, wanted: str) -> Reader[str]:
    """Text of which the whole matches `pattern`."""
    compiled = re.compile(pattern)

    def read(item: Item) -> str:
        value = text(item)
        if compiled.fullmatch(value):
            return value
        raise Bad(f'found "{shown(value)}", must be {wanted}')

    return read


def flag(item: Item) -> bool:
    word = _plain(item, "true or false").lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise Bad(f"{found(item.node)}, must be true or false")


def whole(low: int, high: int) -> Reader[int]:
    def read(item: Item) -> int:
        word = _plain(item, "a whole number")
        if not WHOLE.fullmatch(word):
            raise Bad(f"{found(item.node)}, must be a whole number")
        if not low <= (value := int(word)) <= high:
            raise Bad(f"found {value}, allowed are {low} to {high}")
        return value

    return read


def number(
    *, least: float | None = None, above: float | None = None, most: float = 1e9
) -> Reader[float]:
    """A number from `least`, or from beyond `above`, up to `most`."""

    def read(item: Item) -> float:
        word = _plain(item, "a number")
        if not NUMBER.fullmatch(word):
            raise Bad(f"{found(item.node)}, must be a number")
        value = float(word)
        if least is not None and value < least:
            raise Bad(f"found {word}, must be at least {least:g}")
        if above is not None and value <= above:
            raise Bad(f"found {word}, must be greater than {above:g}")
        if value > most:
            raise Bad(f"found {word}, must be at most {most:g}")
        return value

    return read


def choice(options: Mapping[str, T]) -> Reader[T]:
    def read(item: Item) -> T:
        wanted = "one of " + ", ".join(options)
        word = str(_scalar(item, wanted).value)
        if word in options:
            return options[word]
        meant = suggestion(word, options)
        hint = f'; did you mean "{meant}"?' if meant else ""
        raise Bad(f"{found(item.node)}, allowed are {', '.join(options)}{hint}")

    return read


def listing(read: Reader[T], *, most: int = 1000) -> Reader[tuple[T, ...]]:
    """A list; each bad item is reported where it stands, the good ones are kept."""

    def read_all(item: Item) -> tuple[T, ...]:
        item.document.spend(item.node)
        if not isinstance(item.node, yaml.SequenceNode):
            raise Bad(f"{found(item.node)}, must be a list")
        if len(item.node.value) > most:
            raise Bad(f"has {len(item.node.value)} items, allowed are {most}")
        values: list[T] = []
        for place, node in enumerate(item.node.value):
            child = Item(node, f"{item.path}[{place}]", item.document)
            try:
                values.append(read(child))
            except Bad as bad:
                child.problem(str(bad))
        return tuple(values)

    return read_all


def one_or_more(read: Reader[T]) -> Reader[tuple[T, ...]]:
    """A list, or a single value in place of a list of one."""

    def read_all(item: Item) -> tuple[T, ...]:
        if isinstance(item.node, yaml.ScalarNode):
            return (read(item),)
        return listing(read)(item)

    return read_all
