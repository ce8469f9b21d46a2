"""Switches, reloads, restarts and new models while clients are being answered."""

import asyncio
import time
from collections import Counter

import aiohttp
import pytest

from .appliance import CODER, SLOW, Appliance, Sim, beside, configuration, until
from .client import answer, call, chat, client, cmdline, requests_of, streamed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]

SLOW_CODER, SLOW_WRITER = Sim("coder", "active", SLOW), Sim("writer", "sleep", SLOW)
LONG = 100
"""Tokens of an answer of two seconds."""


@pytest.fixture
def busy(appliance: Appliance) -> Appliance:
    """Answers take their time, so that things happen under them."""
    appliance.configure(SLOW_CODER, SLOW_WRITER)
    appliance.start()
    return appliance


async def _over_http(box: Appliance) -> None:
    wish = {"model_id": "writer"}
    async with client(box) as session, session.post("/switch", json=wish) as response:
        assert response.status == 200, await response.text()


@pytest.mark.parametrize("way", ["command", "http"])
async def test_a_switch_lets_streams_end(busy: Appliance, way: str) -> None:
    begun = asyncio.Event()
    async with client(busy) as session, asyncio.TaskGroup() as group:
        stream = group.create_task(streamed(session, "coder", LONG, begun))
        await begun.wait()
        if way == "command":
            await beside(busy.ctl, "switch", "writer")
        else:
            await _over_http(busy)
        assert busy.phases() == {"coder": "asleep", "writer": "awake"}
    assert len(stream.result().split()) > LONG // 2


# ------------------------------------------------------------ reload


async def test_a_reload_adds_changes_and_removes_under_load(busy: Appliance) -> None:
    before = busy.main_pids("coder", "writer")
    begun = asyncio.Event()
    async with client(busy) as session, asyncio.TaskGroup() as group:
        stream = group.create_task(streamed(session, "coder", LONG, begun))
        await begun.wait()
        busy.configure(SLOW_CODER, Sim("poet"))
        await beside(busy.systemctl, "reload", "homegpt")
        await until(lambda: _phases_are(busy, {"coder": "awake", "poet": "asleep"}))
    assert stream.result()
    assert busy.main_pids("coder") == {"coder": before["coder"]}
    assert busy.containers() == {"vllm-coder", "vllm-poet"}
    busy.configure(SLOW_CODER, Sim("poet", args={"max-model-len": 4096}))
    await beside(busy.systemctl, "reload", "homegpt")
    async with client(busy) as session:
        assert await answer(session, "poet")
    assert "max-model-len\0004096" in cmdline(busy.engine_pid("poet")).decode()
    assert busy.main_pids("coder") == {"coder": before["coder"]}


async def _phases_are(box: Appliance, phases: dict[str, str]) -> bool:
    return {m["id"]: m["phase"] for m in (await call(box, "status"))["models"]} == phases


async def test_a_bad_file_is_not_reloaded_and_changes_nothing(running: Appliance) -> None:
    shown = "cat /etc/containers/systemd/homegpt/* /etc/polkit-1/rules.d/*"
    before = running.machine.run("sh", "-c", shown).out
    pids = running.main_pids("coder", "writer")
    running.write_config(configuration(CODER, Sim("writer", "sleeep")))
    done = running.systemctl("reload", "homegpt", check=False)
    assert done.code != 0
    assert any('found "sleeep"' in line for line in running.story())
    assert running.machine.run("sh", "-c", shown).out == before
    assert running.main_pids("coder", "writer") == pids
    async with client(running) as session:
        assert await answer(session, "writer")


# ------------------------------------------------------------ restart


class Crowd:
    """Clients as ordinary SDKs are: they ask again where they are told to, and only there."""

    def __init__(self, box: Appliance) -> None:
        self.box = box
        self.seen: Counter[str] = Counter()
        self.longest_s = 0.0
        self.over = False

    async def ask(self, model: str) -> None:
        """Until it is over, one request after the other, each on a connection of its own."""
        async with client(self.box, 60) as session:
            while not self.over:
                began = time.monotonic()
                await self._one(session, model)
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    async def _one(self, session: aiohttp.ClientSession, model: str) -> None:
        headers = {"Connection": "close"}
        body = chat(model, tokens=20)
        for _ in range(5):
            try:
                async with session.post(
                    "/v1/chat/completions", json=body, headers=headers
                ) as response:
                    told = await response.json()
                    if response.status == 200:
                        self.seen["answered"] += 1
                        assert told["choices"][0]["finish_reason"] == "length"
                        return
                    if response.status != 503 or "Retry-After" not in response.headers:
                        self.seen[f"lost: {response.status} {told}"] += 1
                        return
            except aiohttp.ClientConnectorError:
                self.seen["refused"] += 1
                return
            except (aiohttp.ClientError, ValueError) as error:
                self.seen[f"lost: {error!r}"] += 1
                return
            self.seen["told to retry"] += 1
            await asyncio.sleep(0.5)  # as an SDK would, at the least
        self.seen["lost: never answered"] += 1


async def test_a_restart_under_load_loses_nothing(busy: Appliance) -> None:
    before = busy.main_pids("coder", "writer")
    crowd, begun = Crowd(busy), asyncio.Event()
    async with client(busy) as session, asyncio.TaskGroup() as group:
        stream = group.create_task(streamed(session, "coder", LONG, begun))
        await begun.wait()
        for model in ("coder", "coder", "coder", "writer", "writer"):
            group.create_task(crowd.ask(model))
        await until(lambda: _waiting(busy, "writer"))
        began = time.monotonic()
        await beside(busy.systemctl, "restart", "homegpt")
        took = time.monotonic() - began
        await asyncio.sleep(1)  # some more load on the new one
        crowd.over = True
    assert stream.result()  # it ended in good order, before its daemon did
    lost = sum(n for what, n in crowd.seen.items() if what.startswith("lost"))
    print(f"appliance: restart under load: {crowd.seen['refused']} refused, {lost} lost, "
          f"{crowd.seen['told to retry']} told to retry, {crowd.seen['answered']} answered, "
          f"{took:.2f} s, longest wait {crowd.longest_s:.2f} s")  # fmt: skip
    assert (crowd.seen["refused"], lost) == (0, 0), crowd.seen
    assert crowd.seen["told to retry"]
    assert busy.main_pids("coder", "writer") == before


async def _waiting(box: Appliance, model: str) -> bool:
    return (await requests_of(box, model))["waiting"] > 0


def test_a_restart_adopts_within_a_second(running: Appliance) -> None:
    before = running.main_pids("coder", "writer")
    since = running.machine.mark()
    took = []
    for _ in range(3):
        began = time.monotonic()
        running.systemctl("restart", "homegpt")
        took.append(time.monotonic() - began)
    print("appliance: restart with adoption in", ", ".join(f"{s:.2f} s" for s in took))
    assert running.main_pids("coder", "writer") == before
    assert running.phases() == {"coder": "awake", "writer": "asleep"}
    told = [entry["MESSAGE"] for entry in running.machine.journal("-u", "homegpt", since=since)]
    assert not [line for line in told if "is starting" in line or "asleep at level 1 (" in line]
    assert min(took) < 1  # others may use the machine, too


# ------------------------------------------------------------ models come and go


def test_a_model_is_added_and_removed_by_one_command_each(running: Appliance) -> None:
    text = running.machine.read("/etc/homegpt/config.yaml")
    pids = running.main_pids("coder", "writer")
    words = ("--gpu-memory-gb", "20", "--arg", "sim-speed=200", "--yes")
    running.ctl("add", "/models/poet", *words)
    until_s = time.monotonic() + 60
    while running.phases().get("poet") not in {"asleep", "awake"} and time.monotonic() < until_s:
        pass
    assert running.phases()["poet"] in {"asleep", "awake"}
    running.ctl("remove", "poet", "--yes")
    assert "poet" not in running.phases()
    assert running.machine.read("/etc/homegpt/config.yaml") == text
    assert running.containers() == {"vllm-coder", "vllm-writer"}
    assert running.main_pids("coder", "writer") == pids


def test_the_journal_tells_one_models_story(running: Appliance) -> None:
    running.ctl("switch", "writer")
    told = running.story("MODEL_ID=writer")
    assert any(line.startswith("writer is awake") for line in told)
    assert not any(line.startswith("coder") for line in told)
    entries = running.machine.journal("-u", "homegpt", "MODEL_ID=writer", since=running.mark)
    assert all(entry["SYSLOG_IDENTIFIER"] == "homegptd" for entry in entries)
    assert "Application startup complete" in running.ctl("logs", "writer").out
