"""What goes into requests: JSON values written as YAML."""

from collections.abc import Mapping
from types import MappingProxyType

import yaml

from .schema import RequestConfig
from .table import Table
from .values import NUMBER, WHOLE, Bad, Item, is_null

_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_OURS = ("model", "stream")


def request(table: Table) -> RequestConfig:
    """The section `request` of a model."""
    section = table.section("request")
    read = RequestConfig(
        defaults=section.get("defaults", members, MappingProxyType({})),
        overrides=section.get("overrides", members, MappingProxyType({})),
    )
    section.finish()
    return read


def members(item: Item) -> Mapping[str, object]:
    """The top level of a request's body, or some of it."""
    if not isinstance(item.node, yaml.MappingNode):
        raise Bad("must be a mapping of a request's parameters to values")
    table, values = Table(item), {}
    for key in tuple(table.rest()):
        if key in _OURS:
            table.problem(key, "is the client's to say")
        values[key] = value(table.at(key))
    return MappingProxyType(values)


def value(item: Item) -> object:
    """As JSON would have it: numbers, true, false and null where they stand without quotes."""
    node = item.node
    item.document.spend(node)
    if isinstance(node, yaml.SequenceNode):
        inside = (Item(each, item.path, item.document) for each in node.value)
        return [value(each) for each in inside]
    if isinstance(node, yaml.MappingNode):
        table = Table(item)
        return {key: value(table.at(key)) for key in tuple(table.rest())}
    if not isinstance(node, yaml.ScalarNode):
        raise Bad("must be a value")
    text = str(node.value)
    if node.style:
        return text
    if is_null(node):
        return None
    if text in _WORDS:
        return _WORDS[text]
    if WHOLE.fullmatch(text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else text
