"""Tool calls of the simulated models.

A forced call (`required`, or a tool by its name) is always made; with `auto` a tool is called when
the last message, the user's, names it. Arguments follow from the tool's schema alone.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

from homegptd.sim.options import Options
from homegptd.sim.shapes import Body, Refused
from homegptd.sim.text import pieces

_calls = itertools.count(1)
_VALUES: Body = {"string": "amber river", "integer": 7, "number": 1.5, "boolean": True, "array": []}


@dataclass(frozen=True, slots=True)
class Call:
    """A call that an answer consists of, token by token."""

    ident: str
    name: str
    said: tuple[str, ...]
    """Its arguments as JSON, in tokens."""
    finish: str
    """Why the answer ends; a call by name ends as a text does (vLLM 0.32)."""

    @property
    def whole(self) -> Body:
        return {"id": self.ident, "type": "function", "function": self._function(self.said)}

    def piece(self, number: int) -> Body:
        """The delta of one token; the first says what is called."""
        if number == 0:
            return {"index": 0, **self.whole, "function": self._function(self.said[:1])}
        return {"index": 0, "function": {"arguments": self.said[number]}}

    def _function(self, said: tuple[str, ...]) -> Body:
        return {"name": self.name, "arguments": "".join(said)}


def call_of(body: Body, options: Options) -> Call | None:
    """What a chat asks the model to call. Raises Refused, in vLLM's words, without the flags."""
    tools = {tool["function"]["name"]: tool["function"] for tool in body.get("tools") or []}
    choice = body.get("tool_choice", "auto" if tools else "none")
    if choice in (None, "none"):
        return None
    named = choice["function"]["name"] if isinstance(choice, dict) else None
    _must_parse(choice, named, options)
    if named is not None and named not in tools:
        raise Refused(400, f"tool_choice names {named}, which is not among the tools")
    if named is None:
        named = next(iter(tools), None) if choice == "required" else _asked_for(body, tools)
    if named is None:
        return None
    arguments = json.dumps(_arguments(tools[named].get("parameters") or {}))
    finish = "stop" if isinstance(choice, dict) else "tool_calls"
    return Call(f"call_{next(_calls):024x}", named, tuple(pieces(arguments)), finish)


def _must_parse(choice: object, named: str | None, options: Options) -> None:
    if options.tool_parser and (options.auto_tools or choice != "auto"):
        return
    if choice == "auto":
        told = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'
        raise Refused(400, f"{told} to be set")
    shown = f'"{choice}"' if named is None else f'function "{named}"'
    raise Refused(400, f"tool_choice={shown} requires --tool-call-parser to be set")


def _asked_for(body: Body, tools: Body) -> str | None:
    last = body["messages"][-1]
    text = str(last.get("content")) if last["role"] == "user" else ""
    return next((name for name in tools if name in text), None)


def _arguments(schema: Body) -> Body:
    properties = schema.get("properties") or {}
    wanted = schema.get("required") or list(properties)
    return {name: _value(properties.get(name) or {}) for name in wanted}


def _value(schema: Body) -> object:
    if choices := schema.get("enum"):
        return choices[0]
    return _VALUES.get(str(schema.get("type")), {})
