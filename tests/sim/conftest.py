"""A simulated server on a unix socket inside the test's loop, two hundred times too fast."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from homegptd.sim.card import Card
from homegptd.sim.faults import parse
from homegptd.sim.options import Options
from homegptd.sim.server import SimServer


@dataclass
class Rig:
    server: SimServer
    http: aiohttp.ClientSession

    async def get(self, path: str) -> Any:
        async with self.http.get(path) as answer:
            return await answer.json(content_type=None)

    async def post(self, path: str, body: object = None) -> tuple[int, Any]:
        async with self.http.post(path, json=body) as answer:
            text = await answer.read()
            return answer.status, await answer.json(content_type=None) if text else None

    async def say(self, tokens: int = 8, **more: object) -> str:
        body = {"model": "coder", "prompt": "hello", "max_tokens": tokens, **more}
        status, answer = await self.post("/v1/completions", body)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    async def fault(self, name: str, **more: object) -> None:
        status, answer = await self.post("/sim/fault", {"name": name, **more})
        assert status == 200, answer


Serve = Callable[..., AbstractAsyncContextManager[Rig]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    @asynccontextmanager
    async def serving(*faults: str, card: Card | None = None, **changes: Any) -> AsyncIterator[Rig]:
        told = {"served": ("coder", "code"), "speed": 200, "utilisation": 0.5, **changes}
        uds = tmp_path / f"{told['served'][0]}.sock"
        options = Options(uds=uds, faults=tuple(parse(f) for f in faults), **told)
        connector = aiohttp.UnixConnector(str(uds))
        async with (
            SimServer(options, card).running() as server,
            aiohttp.ClientSession("http://sim", connector=connector) as http,
        ):
            yield Rig(server, http)

    return serving
