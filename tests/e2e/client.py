"""What an ordinary client does: ask, stream, and believe only what is complete."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from .harness import Box


def chat(model: str, *, tokens: int = 20, stream: bool = False) -> dict[str, Any]:
    return {
        "model": model,
        "stream": stream,
        "max_tokens": tokens,
        "temperature": 0,
        "messages": [{"role": "user", "content": "tell me something"}],
    }


@asynccontextmanager
async def client(box: Box, patience_s: float = 30.0) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=patience_s)
    async with aiohttp.ClientSession(box.url, timeout=timeout) as session:
        yield session


async def answer(session: aiohttp.ClientSession, model: str, *, tokens: int = 20) -> str:
    async with session.post("/v1/chat/completions", json=chat(model, tokens=tokens)) as response:
        body = await response.json()
        assert response.status == 200, body
        assert body["model"] == model
        return body["choices"][0]["message"]["content"]


async def streamed(
    session: aiohttp.ClientSession, model: str, tokens: int, begun: asyncio.Event | None = None
) -> str:
    """The whole text of a stream that must end as one that is complete does.

    `begun` is set at its first token.
    """
    text, finish, done = "", None, False
    body = chat(model, tokens=tokens, stream=True)
    async with session.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            if line.strip() == b"data: [DONE]":
                done = True
            elif line.startswith(b"data: "):
                choice = json.loads(line[6:])["choices"][0]
                if begun is not None and choice["delta"].get("content"):
                    begun.set()
                    await asyncio.sleep(0)  # a stream that never pauses lets nobody else run
                text += choice["delta"].get("content") or ""
                finish = choice["finish_reason"] or finish
    assert (finish, done) == ("length", True)
    return text


async def ctl(box: Box, *words: str) -> int:
    return (await asyncio.to_thread(box.ctl, *words)).returncode


async def call(box: Box, method: str, **params: object) -> Any:
    """The result of one call on the control socket, without the cost of starting homegptctl."""
    reader, writer = await asyncio.open_unix_connection(str(box.socket))
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    writer.write(json.dumps(request).encode() + b"\n")
    while True:
        reply = json.loads(await reader.readline())
        if reply.get("id") == 1:
            writer.close()
            return reply["result"]


async def requests_of(box: Box, model: str) -> dict[str, int]:
    status = await call(box, "status")
    return next(m["requests"] for m in status["models"] if m["id"] == model)


async def until_running(box: Box) -> None:
    """Until some answer runs. Another process, so there is no event to wait for."""
    async with asyncio.timeout(10):
        while not any(m["requests"]["running"] for m in (await call(box, "status"))["models"]):
            pass


def pid_of(box: Box, model: str) -> int:
    for pid in box.engine_pids():
        if f"\0serve\0{model}\0".encode() in cmdline(pid):
            return pid
    raise AssertionError(f"no engine of {model} runs")


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
