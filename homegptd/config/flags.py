"""Command line flags of an engine: read from YAML, defaults merged in, parallel sizes found."""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml

from .nodes import line_of, shown
from .table import Table
from .values import Bad, Item, found, is_null, text

MANAGED = {
    "uds": "homegptd sets where an engine listens",
    "host": "homegptd sets where an engine listens",
    "port": "homegptd sets where an engine listens",
    "model": "the key engine.model says what to load",
    "served-model-name": "homegptd sets it from id and aliases",
}
_SIZES = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
_SHORT = {
    "tp": "tensor-parallel-size",
    "pp": "pipeline-parallel-size",
    "dp": "data-parallel-size",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag with its values; `name` is its long form without dashes, "" for stray words."""

    name: str
    words: tuple[str, ...]
    """As vLLM gets them, the flag itself included."""

    @property
    def key(self) -> str:
        """What overrides what: `--no-x` and `--x` are one thing."""
        return self.name.removeprefix("no-")


def flags(item: Item) -> tuple[Flag, ...]:
    """`args:` as a mapping (`max-model-len: 8192`) or as a list (`--max-model-len 8192`)."""
    node = item.node
    if isinstance(node, yaml.MappingNode):
        read = _from_mapping(item)
    elif isinstance(node, yaml.SequenceNode):
        read = _from_list(item)
    else:
        raise Bad(f"{found(node)}, must be a mapping of flags or a list of words")
    for flag in read:
        if flag.name in MANAGED:
            item.problem(f"--{flag.name} does not belong here: {MANAGED[flag.name]}")
    return read


def merged(defaults: Sequence[Flag], own: Sequence[Flag]) -> tuple[str, ...]:
    """The words of both, the defaults first and without what a model says for itself."""
    named = {flag.key for flag in own if flag.name}
    kept = [flag for flag in defaults if flag.key not in named]
    return tuple(word for flag in (*kept, *own) for word in flag.words)


def gpus_needed(words: Iterable[str]) -> int | None:
    """How many GPUs the parallel sizes in an argv ask for; None if it names none.

    Raises `Bad` for a size that is not a number from 1 to 64.
    """
    sizes = {flag.name: flag for flag in _grouped(list(words)) if flag.name in _SIZES}
    if not sizes:
        return None
    needed = 1
    for flag in sizes.values():
        needed *= _size(flag)
    return needed


def _size(flag: Flag) -> int:
    _, _, joined = flag.words[0].partition("=")
    value = joined or (flag.words[1] if len(flag.words) > 1 else "")
    if re.fullmatch(r"[1-9][0-9]?", value) and int(value) <= 64:
        return int(value)
    raise Bad(f'found --{flag.name} "{shown(value)}", must be a whole number from 1 to 64')


def _from_mapping(item: Item) -> tuple[Flag, ...]:
    table = Table(item)
    read: list[Flag] = []
    for key in tuple(table.rest()):
        child = table.at(key)
        try:
            read.append(_entry(key, child))
        except Bad as bad:
            child.problem(str(bad))
    return tuple(read)


def _entry(key: str, item: Item) -> Flag:
    name = key.lstrip("-").replace("_", "-")
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
        raise Bad("is no name of a flag")
    node = item.node
    item.document.spend(node)
    if is_null(node):
        return Flag(name, (f"--{name}",))
    if isinstance(node, yaml.SequenceNode):
        return Flag(name, (f"--{name}", *(text(_child(item, at)) for at in node.value)))
    if isinstance(node, yaml.MappingNode):
        raise Bad("found a mapping, must be a value; put JSON in single quotes")
    if isinstance(node, yaml.ScalarNode) and not node.style and node.value in {"true", "false"}:
        name = name if node.value == "true" else f"no-{name}"
        return Flag(name, (f"--{name}",))
    return Flag(name, (f"--{name}", text(item)))


def _child(item: Item, node: yaml.Node) -> Item:
    return Item(node, item.path, item.document)


def _from_list(item: Item) -> tuple[Flag, ...]:
    words: list[str] = []
    for place, node in enumerate(item.node.value):
        child = Item(node, f"{item.path}[{place}]", item.document)
        try:
            words += _words(text(child))
        except Bad as bad:
            item.document.problems.add(line_of(node), child.path, str(bad))
    return _grouped(words)


def _words(entry: str) -> list[str]:
    """`--flag value` on one line is two words; a value alone stays whole, blanks and all."""
    if not entry.startswith("-"):
        return [entry]
    try:
        return shlex.split(entry)
    except ValueError as fault:
        raise Bad(f"cannot be split into words: {str(fault).lower()}") from None


def _grouped(words: Sequence[str]) -> tuple[Flag, ...]:
    groups: list[Flag] = []
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            groups.append(Flag(_name(word), (word,)))
        elif groups:
            groups[-1] = Flag(groups[-1].name, (*groups[-1].words, word))
        else:
            groups.append(Flag("", (word,)))
    return tuple(groups)


def _name(word: str) -> str:
    name = word.lstrip("-").partition("=")[0].replace("_", "-")
    return name if word.startswith("--") else _SHORT.get(name, name)
