"""What each inference request passes first: its body, its model, room in the queue, counting."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from homegptd.sim.engine import Engine
from homegptd.sim.scheduler import Aborted, EngineDead
from homegptd.sim.shapes import DEAD, Body, Refused

_BUSY = (
    "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance."
)
_ids = itertools.count(1)


class Intake:
    """Checks in vLLM's order and words. `open` counts the requests being answered, for /load."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.options = engine.options
        self.open = 0
        self.draining = False

    async def body(self, request: web.Request) -> Body:
        """The JSON of a request that may be served. Raises Refused."""
        if request.content_type != "application/json":
            raise Refused(400, "Unsupported Media Type: Only 'application/json' is allowed")
        try:
            body = json.loads(await request.read())
        except ValueError as why:
            told = f"[{{'type': 'json_invalid', 'msg': 'JSON decode error: {why}'}}]"
            raise Refused(400, told) from None
        if not isinstance(body, dict):
            raise Refused(400, "Input should be a valid dictionary")
        self.admit(body)
        return body

    def admit(self, body: Body) -> None:
        """Raises Refused where it names another model, or the engine takes nothing."""
        self.model(body)
        if self.draining:
            raise Refused(500, "cannot schedule new futures after shutdown")
        if self.engine.dead:
            raise Refused(500, DEAD)
        if self.engine.queue_full():
            raise Refused(503, _BUSY)

    def model(self, body: Body) -> str:
        """The name the client used. Raises Refused with 404 for another model's."""
        model = body.get("model") or self.options.names[0]
        if model not in self.options.names:
            raise Refused(404, f"The model `{model}` does not exist.", "model")
        return str(model)

    async def compute(self, prompt: str) -> bool:
        """One forward pass; true when its result is sound. Raises Refused."""
        try:
            return await self.engine.compute(prompt)
        except (EngineDead, Aborted):
            raise Refused(500, DEAD) from None

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


def new_id(kind: str) -> str:
    return f"{kind}-{next(_ids):032x}"


def missing(name: str, value: object) -> str:
    """Pydantic's words for a field that is not there."""
    told = {"type": "missing", "loc": ("body", name), "msg": "Field required", "input": value}
    return str([told])


def texts(body: Body, name: str) -> list[str]:
    """A text, a list of texts, or token ids. Raises Refused."""
    value: Any = body.get(name)
    if isinstance(value, dict):
        value = [str(value)]
    if isinstance(value, list) and value and isinstance(value[0], int):
        value = [" ".join(str(v) for v in value)]
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found:
        raise Refused(400, missing(name, value), name)
    return [str(text) for text in found]
