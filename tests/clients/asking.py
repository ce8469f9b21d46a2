"""What the tests of all clients share: what to ask, and what the box knows of it."""

import json
import re
from typing import Any

import aiohttp

from tests.contract.subjects import until
from tests.e2e.client import call

from .conftest import Served

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "weather",
    "description": "Tells the weather of a city.",
    "parameters": CITY,
    "strict": True,  # vLLM then holds even random weights to the schema
}


def says(served: Served, model: str, text: str) -> bool:
    """Whether these are that model's words. A real one with random weights says anything."""
    return text.startswith(f"This is {model}:") if served.is_sim else len(text) > 0


async def nothing_runs(served: Served, model: str) -> None:
    """Until neither the daemon nor the engine itself has a request of that model."""

    async def nothing() -> bool:
        return not await _daemon_holds(served, model) and not await engine_runs(served, model)

    await until(nothing, deadline_s=10.0)


async def something_runs(served: Served, model: str) -> None:
    async def something() -> bool:
        return await engine_runs(served, model) > 0

    await until(something, deadline_s=10.0)


async def _daemon_holds(served: Served, model: str) -> bool:
    views = (await call(served.box, "status"))["models"]
    return any(any(v["requests"].values()) for v in views if v["id"] == model)


async def engine_runs(served: Served, model: str) -> float:
    """Requests inside the engine, by its own count, which vLLM publishes once a step."""
    path = str(next((served.box.root / "engines" / model).glob("*.sock")))
    connector = aiohttp.UnixConnector(path, force_close=True)
    async with (
        aiohttp.ClientSession("http://engine", connector=connector) as session,
        session.get("/metrics") as answer,
    ):
        text = await answer.text()
    gauge = r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$"
    return sum(float(n) for n in re.findall(gauge, text, re.MULTILINE))


async def awake(served: Served, model: str) -> None:
    """Make it so, the operator's way."""
    assert (await call(served.box, "switch", model=model))["state"] == "done"


async def phase(served: Served, model: str) -> str:
    views = (await call(served.box, "status"))["models"]
    return next(v["phase"] for v in views if v["id"] == model)


def frames(text: str) -> list[Any]:
    """The data of the events of a whole stream."""
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]
