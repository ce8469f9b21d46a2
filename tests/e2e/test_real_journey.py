"""One journey with two real vLLM servers under the daemon. Without a GPU sleep moves no memory; all
else (HTTP, scheduler, pausing, freezing, processes) is the real thing.
"""

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import pytest

from .client import answer, call, client, ctl, requests_of, streamed, until_running
from .harness import Box

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.real_vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not os.environ.get("HOMEGPT_REAL_VLLM"), reason="HOMEGPT_REAL_VLLM names no Python"
    ),
]

SERVE = Path(__file__).parents[2] / ".ci/real-vllm/serve"
LONG = 1900


def configure(box: Box, on_deadline: str) -> None:
    model_dir = os.environ["HOMEGPT_REAL_MODEL"]
    block = """
  - id: {id}
    gpu_memory_gb: 60
    weights_gb: 8
    startup_mode: {startup}
    engine:
      command: ['{serve}', '{{socket}}', '{id}', '{model}']
      env: {{HOMEGPT_REAL_VLLM: '{python}'}}
"""
    models = "".join(
        block.format(
            id=name, startup=startup, serve=SERVE, model=model_dir,
            python=os.environ["HOMEGPT_REAL_VLLM"],
        )
        for name, startup in (("a", "active"), ("b", "sleep"))
    )  # fmt: skip
    box.config.write_text(
        "gpus: [{index: 0, memory_mib: 81920}]\n"
        "switching: {available_ram_gb: 256}\n"
        f"router: {{drain_s: 0.2, on_deadline: {on_deadline}}}\n"
        f"models:{models}"
    )


async def test_a_day_with_two_real_servers(box: Box) -> None:
    configure(box, "wait")
    with box.daemon() as daemon:
        await asyncio.to_thread(daemon.ready, 300.0)
        assert (box.model("a")["phase"], box.model("b")["phase"]) == ("awake", "asleep")
        async with client(box, 300.0) as session:
            await each_by_name(session)
            whole = await streamed(session, "a", LONG)
            await waited_for(box, session, whole)
            configure(box, "auto")
            assert await ctl(box, "reload") == 0
            assert await ctl(box, "switch", "a") == 0
            assert await ctl(box, "prove", "a") == 0
            await frozen(box, session, whole)
            await killed(box, session)
        assert daemon.terminate() == 0


async def each_by_name(session: aiohttp.ClientSession) -> None:
    first = await answer(session, "a")
    assert await answer(session, "b")
    assert await answer(session, "a") == first


async def waited_for(box: Box, session: aiohttp.ClientSession, whole: str) -> None:
    """As configured at first, a stream that outlives the drain is waited for."""
    async with asyncio.TaskGroup() as group:
        long = group.create_task(streamed(session, "a", LONG))
        await until_running(box)
        switch = group.create_task(call(box, "switch", model="b"))
    assert (long.result(), switch.result()["state"]) == (whole, "done")
    assert "still running" in box.log()
    assert "frozen answer" not in box.log()


async def frozen(box: Box, session: aiohttp.ClientSession, whole: str) -> None:
    """Proved and allowed: it is frozen, another model answers, and it goes on to the same end."""
    async with asyncio.TaskGroup() as group:
        long = group.create_task(streamed(session, "a", LONG))
        await until_running(box)
        assert (await call(box, "switch", model="b"))["state"] == "done"
        assert (await requests_of(box, "a"))["frozen"] == 1
        assert await answer(session, "b")
    assert long.result() == whole


async def killed(box: Box, session: aiohttp.ClientSession) -> None:
    """kill -9 of the engine core: the server goes with it, and the next request brings it back."""
    assert await ctl(box, "switch", "a") == 0
    before = await answer(session, "a")
    os.kill(engine_core(box), signal.SIGKILL)
    assert await answer(session, "a") == before
    assert "a is starting (try 2)" in box.log()


def engine_core(box: Box) -> int:
    """The engine core of model a: a child of its server, which names the model's socket."""
    socket = str(box.root / "engines" / "a").encode()
    for path in Path("/proc").glob("[0-9]*"):
        if b"EngineCor" in _read(path / "comm") + _read(path / "cmdline"):
            parent = _read(path / "stat").rpartition(b")")[2].split()[1].decode()
            if socket in _read(Path("/proc", parent, "cmdline")):
                return int(path.name)
    raise AssertionError("no engine core of a runs")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
