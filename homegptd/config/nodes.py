"""YAML text to PyYAML's node tree, within limits that no file for people reaches.

Nodes, not `safe_load`: that keeps the last of two equal keys without a word, reads `22:22` as 1342
and `no` as false, and forgets on which line anything stood.
"""

import yaml

from .problems import Enough, Problems

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_EFFORT = 2_000_000
"""Characters and nodes read, counting again what anchors repeat."""
MERGE_TAG = "tag:yaml.org,2002:merge"

Pair = tuple[yaml.Node, yaml.Node]


class _TooDeep(yaml.YAMLError):
    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line


class _Loader(yaml.SafeLoader):
    """Composes without recursing until Python gives up."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TooDeep(self.line + 1)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class Document:
    """One file while it is being read: its name, its problems, the effort spent on it."""

    def __init__(self, file: str) -> None:
        self.problems = Problems(file)
        self._effort = 0

    def spend(self, node: yaml.Node) -> None:
        """Count the reading of a node, so that a few anchors cannot stand for a terabyte."""
        self._effort += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._effort > MAX_EFFORT:
            self.problems.add(line_of(node), "", "anchors repeat too much: write the file plainly")
            raise Enough


def line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def compose(text: str, document: Document) -> yaml.Node | None:
    """The root of the one document; None if there is none, or with a problem if it is no YAML."""
    problems = document.problems
    try:
        return _composed(text)
    except _TooDeep as fault:
        problems.add(fault.line, "", f"nested more than {MAX_DEPTH} levels deep")
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        problems.add(mark.line + 1 if mark else 1, "", _syntax(fault))
    except yaml.reader.ReaderError as fault:
        line = text.count("\n", 0, fault.position) + 1
        problems.add(line, "", f"character U+{_code(fault.character):04X} is not allowed in YAML")
    except (ValueError, OverflowError):
        # PyYAML lets these through for escapes like "\UFFFFFFFF" and endless version numbers.
        problems.add(1, "", "not valid YAML: a number or an escape is out of range")
    return None


def _composed(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _syntax(fault: yaml.MarkedYAMLError) -> str:
    words = " ".join(part for part in (fault.context, fault.problem) if part)
    hint = "; indent with spaces, not with tabs" if r"'\t'" in words else ""
    return f"not valid YAML: {words}{hint}"


def _code(character: object) -> int:
    return character if isinstance(character, int) else ord(str(character)[:1] or "\0")


def pairs(node: yaml.MappingNode, path: str, document: Document) -> list[Pair]:
    """The entries of a mapping, then those that `<<` merges into it where they are not its own."""
    own: dict[str, Pair] = {}
    merged: list[Pair] = []
    for key, value in node.value:
        document.spend(key)
        if key.tag == MERGE_TAG:
            merged += _merged(value, path, document)
        elif not isinstance(key, yaml.ScalarNode):
            document.problems.add(line_of(key), path, "a key must be a plain word")
        elif (first := own.get(key.value)) is not None:
            given = f"given twice (first on line {line_of(first[0])})"
            document.problems.add(line_of(key), join(path, key.value), given)
        else:
            own[key.value] = (key, value)
    for key, value in merged:
        own.setdefault(key.value, (key, value))
    return list(own.values())


def _merged(value: yaml.Node, path: str, document: Document) -> list[Pair]:
    sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
    found: list[Pair] = []
    for source in sources:
        document.spend(source)
        if not isinstance(source, yaml.MappingNode):
            document.problems.add(line_of(source), join(path, "<<"), "can only merge mappings")
        elif any(key.tag == MERGE_TAG for key, _ in source.value):
            # One level is what people use; more would need a guard against merging in circles.
            document.problems.add(
                line_of(source),
                join(path, "<<"),
                "merges a mapping that itself merges: name both here, as a list",
            )
        else:
            found += pairs(source, path, document)
    return found


def join(path: str, key: str) -> str:
    return f"{path}.{shown(key)}" if path else shown(key)


def shown(text: str, limit: int = 60) -> str:
    """Foreign text fit for one line of a message."""
    plain = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return plain if len(text) <= limit else f"{plain[: limit - 1]}…"
