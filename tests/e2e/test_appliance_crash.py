"""What dies on the box, killed for real, and what the daemon makes of it."""

import os
import signal
import time

import pytest

from .appliance import CODER, WRITER, Appliance, Sim, beside, meanwhile, until
from .client import answer, call, client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
KNOWS_S = 0.5
"""Within this the daemon shall know of an engine's end."""


async def _phase(box: Appliance, model: str) -> str:
    told = await call(box, "status")
    return next(m["phase"] for m in told["models"] if m["id"] == model)


async def _again(box: Appliance, model: str = "coder") -> None:
    async with client(box) as session:
        assert await answer(session, model)


async def test_a_killed_engine_is_known_at_once_and_comes_back(running: Appliance) -> None:
    pid = running.engine_pid("coder")
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: _left_awake(running))
    took = time.monotonic() - began
    print(f"appliance: the daemon knew of a SIGKILL after {took * 1000:.0f} ms")
    assert took < KNOWS_S
    await _again(running)
    assert running.engine_pid("coder") != pid
    assert any("killed by SIGKILL" in line for line in running.story())


async def _left_awake(box: Appliance) -> bool:
    return await _phase(box, "coder") != "awake"


async def test_an_engine_killed_under_an_answer_comes_back(running: Appliance) -> None:
    """The answer had no byte yet or is a stream: it ends, and the next one is whole."""
    async with client(running) as session:
        text = await answer(session, "coder")
        os.kill(running.engine_pid("coder"), signal.SIGKILL)
        assert await answer(session, "coder") == text


async def test_a_killed_container_comes_back(running: Appliance) -> None:
    await beside(running.machine.run, "podman", "kill", "vllm-coder")
    await until(lambda: _left_awake(running))
    await _again(running)


async def test_a_killed_sleeper_comes_back_without_displacing_anybody(running: Appliance) -> None:
    os.kill(running.engine_pid("writer"), signal.SIGKILL)
    await _again(running, "writer")
    await _again(running, "coder")


async def test_a_killed_daemon_is_back_and_reloads_nothing(running: Appliance) -> None:
    before = running.main_pids("coder", "writer")
    os.kill(running.daemon_pid(), signal.SIGKILL)
    async with client(running) as session:  # its socket is kept: nobody is refused
        assert await answer(session, "coder")
    assert running.main_pids("coder", "writer") == before
    assert running.show("homegpt", "NRestarts") == "1"
    assert running.phases() == {"coder": "awake", "writer": "asleep"}


async def test_a_daemon_killed_amid_the_bootstrap_goes_on_with_it(appliance: Appliance) -> None:
    slow = Sim("writer", "sleep", {"sim-imports-s": 600})
    appliance.configure(CODER, slow)
    appliance.systemctl("start", "--no-block", "homegpt")
    await until(lambda: _is_starting(appliance, "writer"))
    before = appliance.main_pids("coder")
    os.kill(appliance.daemon_pid(), signal.SIGKILL)
    await until(lambda: beside(_ready, appliance))
    assert appliance.main_pids("coder") == before
    assert appliance.phases() == {"coder": "awake", "writer": "asleep"}


async def _is_starting(box: Appliance, model: str) -> bool:
    if not await box.socket_answers():
        return False
    return await _phase(box, model) == "starting"


def _ready(box: Appliance) -> bool:
    return box.show("homegpt", "StatusText").startswith("ready: coder awake, 1 asleep")


async def test_podmans_helper_killed_amid_a_start_is_got_over(appliance: Appliance) -> None:
    appliance.configure(Sim("coder", "active", {"sim-imports-s": 600}), WRITER)
    async with meanwhile(appliance.start):
        await until(lambda: beside(_conmon, appliance))
        os.kill(_conmon(appliance), signal.SIGKILL)
    assert appliance.phases()["writer"] == "asleep"
    assert any("killed by SIGKILL" in line for line in appliance.story())
    await until(lambda: _is_up(appliance, "coder"))
    await _again(appliance)


async def _is_up(box: Appliance, model: str) -> bool:
    return await _phase(box, model) in {"awake", "asleep"}


def _conmon(box: Appliance) -> int:
    """The host's pid of coder's conmon; 0 while there is none."""
    pid = box.main_pids("coder")["coder"]
    return box.machine.host_pid(pid) if pid else 0


async def test_a_zombie_engine_is_ended_and_its_gpu_goes_to_the_next(running: Appliance) -> None:
    before = running.main_pids("coder")
    running.order_fault("coder", name="zombie", on="sleep")
    async with client(running, 60) as session:
        assert await answer(session, "writer")
        assert await answer(session, "coder")
    assert running.main_pids("coder") != before


async def test_an_engine_that_exits_with_0_has_crashed(running: Appliance) -> None:
    """As a vLLM does whose engine core was killed: its unit is then `inactive`, not failed."""
    before = running.main_pids("coder")
    running.side_door("coder", "POST", "/sim/die")
    await until(lambda: beside(_ended, running))
    await _again(running)
    assert running.main_pids("coder") != before


def _ended(box: Appliance) -> bool:
    return any("exited with code 0" in line for line in box.story())
