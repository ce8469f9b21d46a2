"""A mapping of the file, read key by key; what nobody asked for is unknown."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import yaml

from .nodes import join, line_of, pairs
from .values import Bad, Item, Reader, found, is_null, suggestion

T = TypeVar("T")
D = TypeVar("D")

_UNKNOWN_SHOWN = 20


class Table:
    """Typed access to a mapping. Bad values become problems and the default stands in."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self._entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        self._asked: dict[str, None] = {}
        self._broken = False
        self._sections: dict[str, Table] = {}
        item.document.spend(item.node)
        if isinstance(item.node, yaml.MappingNode):
            for key, value in pairs(item.node, item.path, item.document):
                self._entries[key.value] = (key, value)
        elif not is_null(item.node):
            item.problem(f"{found(item.node)}, must be a mapping")
            self._broken = True

    def __contains__(self, key: str) -> bool:
        """Whether the key is there with a value."""
        return key in self._entries and not is_null(self._entries[key][1])

    def get(self, key: str, read: Reader[T], default: D) -> T | D:
        """The value of an optional key; an empty one counts as not given."""
        self._asked[key] = None
        if key not in self:
            return default
        item = self.at(key)
        try:
            return read(item)
        except Bad as bad:
            item.problem(str(bad))
            return default

    def need(self, key: str, read: Reader[T], stand_in: D) -> T | D:
        """The value of a required key; `stand_in` must trip no later check."""
        if key not in self and not self._broken:
            self.problem(key, "is empty" if key in self._entries else "missing")
        return self.get(key, read, stand_in)

    def table(self, key: str) -> "Table | None":
        """A mapping inside this one, always the same object; None where it is not given."""
        self._asked[key] = None
        if key in self and key not in self._sections:
            self._sections[key] = Table(self.at(key))
        return self._sections.get(key)

    def section(self, key: str) -> "Table":
        """Like `table`, but an empty one where the key is not given."""
        mark = self.item.node.start_mark
        nothing = yaml.MappingNode("tag:yaml.org,2002:map", [], mark, mark)
        given = self.table(key)
        path = join(self.item.path, key)
        return given or Table(Item(nothing, path, self.item.document))

    def at(self, key: str) -> Item:
        """A key's value as an item; its key must be there."""
        return Item(self._entries[key][1], join(self.item.path, key), self.item.document)

    def line(self, key: str) -> int:
        """The line of a key, else of the mapping."""
        return line_of(self._entries[key][0]) if key in self._entries else self.item.line

    def problem(self, key: str, message: str) -> None:
        path = join(self.item.path, key) if key else self.item.path
        self.item.document.problems.add(self.line(key), path, message)

    def rest(self) -> Iterator[str]:
        """Keys that nobody asked for, in the order of the file."""
        return (key for key in self._entries if key not in self._asked)

    def ignore(self, prefix: str) -> None:
        """Let keys with this prefix hold what they like, such as anchors for later use."""
        for key in [key for key in self.rest() if key.startswith(prefix)]:
            self._asked[key] = None

    def finish(self, explain: Callable[[str], str | None] = lambda _: None) -> None:
        """Report unknown keys; `explain` may know where one belongs."""
        for count, key in enumerate(self.rest()):
            if count == _UNKNOWN_SHOWN:
                self.problem("", "and more unknown keys")
                return
            known = tuple(name for name in self._asked if not name.startswith("x-"))
            meant = suggestion(key, known)
            hint = f'did you mean "{meant}"?' if meant else f"known keys are {', '.join(known)}"
            self.problem(key, f"unknown key; {explain(key) or hint}")
