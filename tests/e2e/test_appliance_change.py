"""Switches, reloads, restarts and new models while clients are being answered."""

import asyncio
import os
import select
import subprocess
import time
from collections import Counter
from typing import Any

import pytest
from aiohttp import ClientSession
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from .appliance import CODER, PACKAGE, SLOW, Appliance, Sim, beside, configuration, until
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


class Watched(DefaultAsyncHttpxClient):
    """The SDK's own HTTP client, which counts what it meets: the SDK tries again without a word."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__(trust_env=False)
        self._seen = seen

    async def send(self, *args: Any, **given: Any) -> Any:
        try:
            response = await super().send(*args, **given)
        except Exception as error:
            refused = type(error).__name__ == "ConnectError"
            self._seen["refused" if refused else f"lost: {error!r}"] += 1
            raise
        if response.status_code == 503 and "retry-after" in response.headers:
            self._seen["told to retry"] += 1
        elif response.status_code != 200:
            self._seen[f"lost: {response.status_code}"] += 1
        return response


class Crowd:
    """Clients with openai's own library as it comes: two retries, connections kept and used again.

    Refused, cut off or answered with an error that is no invitation to come again: lost.
    """

    def __init__(self, box: Appliance) -> None:
        self.box = box
        self.seen: Counter[str] = Counter()
        self.longest_s = 0.0
        self.over = False

    async def ask(self, model: str, *, keep: bool) -> None:
        """Until it is over, one request after the other; `keep`: all on the same connection."""
        headers = {} if keep else {"Connection": "close"}
        async with AsyncOpenAI(
            base_url=f"{self.box.url}/v1",
            api_key="none",
            default_headers=headers,
            http_client=Watched(self.seen),
        ) as sdk:
            while not self.over:
                began = time.monotonic()
                await self._one(sdk, model)
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    async def _one(self, sdk: AsyncOpenAI, model: str) -> None:
        asked: Any = chat(model, tokens=20)
        try:
            told = await sdk.chat.completions.create(**asked)
        except OpenAIError as error:
            self.seen[f"lost: {error!r}"] += 1
        else:
            self.seen["answered"] += 1
            assert told.choices[0].finish_reason == "length"

    def told(self, what: str, took_s: float) -> None:
        """The figures, on a line; and that nothing was refused or lost."""
        lost = sum(n for name, n in self.seen.items() if name.startswith("lost"))
        print(f"appliance: {what} under load: {self.seen['refused']} refused, {lost} lost, "
              f"{self.seen['told to retry']} told to retry, {self.seen['answered']} answered, "
              f"{took_s:.2f} s, longest wait {self.longest_s:.2f} s")  # fmt: skip
        assert (self.seen["refused"], lost) == (0, 0), self.seen


async def test_a_restart_under_load_loses_nothing(busy: Appliance) -> None:
    before = busy.main_pids("coder", "writer")
    crowd, begun = Crowd(busy), asyncio.Event()
    async with client(busy) as session, asyncio.TaskGroup() as group:
        stream = group.create_task(streamed(session, "coder", LONG, begun))
        await begun.wait()
        for number, model in enumerate(("coder", "coder", "coder", "writer", "writer")):
            group.create_task(crowd.ask(model, keep=number % 2 == 1))
        await until(lambda: _waiting(busy, "writer"))
        began = time.monotonic()
        await beside(busy.systemctl, "restart", "homegpt")
        took = time.monotonic() - began
        await asyncio.sleep(1)  # some more load on the new one
        crowd.over = True
    assert stream.result()  # it ended in good order, before its daemon did
    crowd.told("restart", took)
    assert crowd.seen["told to retry"]
    assert busy.main_pids("coder", "writer") == before


async def test_an_upgrade_reloads_no_model(running: Appliance) -> None:
    before, daemon = running.main_pids("coder", "writer"), running.daemon_pid()
    await beside(running.machine.run, "dpkg", "-i", PACKAGE)
    await until(lambda: beside(_is_another, running, daemon))
    async with client(running) as session:
        assert await answer(session, "coder")
    assert running.main_pids("coder", "writer") == before


def _is_another(box: Appliance, daemon: int) -> bool:
    """Whether another daemon than that runs, and is up."""
    shown = box.machine.show("homegpt", "MainPID", "ActiveState")
    if shown["ActiveState"] != "active" or shown["MainPID"] == "0":
        return False
    try:
        return box.machine.host_pid(int(shown["MainPID"])) != daemon
    except ProcessLookupError:
        return False


async def _waiting(box: Appliance, model: str) -> bool:
    return (await requests_of(box, model))["waiting"] > 0


def test_a_restart_adopts_within_a_second(running: Appliance) -> None:
    before = running.main_pids("coder", "writer")
    since = running.machine.mark()
    took = []
    for _ in range(4):
        began = time.monotonic()
        running.systemctl("restart", "homegpt")
        took.append((time.monotonic() - began, int(running.show("homegpt", "CPUUsageNSec")) / 1e9))
    told = ", ".join(f"{s:.2f} s ({cpu:.2f} s of CPU)" for s, cpu in took)
    print(f"appliance: restart with adoption in {told}")
    assert running.main_pids("coder", "writer") == before
    assert running.phases() == {"coder": "awake", "writer": "asleep"}
    told = [entry["MESSAGE"] for entry in running.machine.journal("-u", "homegpt", since=since)]
    assert not [line for line in told if "is starting" in line or "asleep at level 1 (" in line]
    # with others on the machine it takes as much longer as they take of it
    assert min(cpu for _, cpu in took) < 1


# ------------------------------------------------------------ models come and go


def test_a_model_is_added_and_removed_by_one_command_each(running: Appliance) -> None:
    text = running.machine.read("/etc/homegpt/config.yaml")
    pids = running.main_pids("coder", "writer")
    words = ("--gpu-memory-gb", "20", "--arg", "sim-speed=200", "--yes")
    told = running.ctl("add", "/models/poet", *words).out
    assert "poet is asleep" in told or "poet is loaded and asleep" in told
    assert running.phases()["poet"] == "asleep"
    running.ctl("remove", "poet", "--yes")
    assert "poet" not in running.phases()
    assert running.machine.read("/etc/homegpt/config.yaml") == text
    assert running.containers() == {"vllm-coder", "vllm-writer"}
    assert running.main_pids("coder", "writer") == pids
    as_root = ("runuser", "-u", "homegpt", "--", "systemd-run", "--unit=vllm-poet", "id")
    assert running.machine.run(*as_root, check=False).code != 0


def test_the_journal_tells_one_models_story(running: Appliance) -> None:
    running.ctl("switch", "writer")
    told = running.story("MODEL_ID=writer")
    assert any(line.startswith("writer is awake") for line in told)
    assert not any(line.startswith("coder") for line in told)
    entries = running.machine.journal("-u", "homegpt", "MODEL_ID=writer", since=running.mark)
    assert all(entry["SYSLOG_IDENTIFIER"] == "homegptd" for entry in entries)
    woke = next(entry for entry in entries if entry["MESSAGE"].startswith("writer is waking"))
    assert (woke["WAS"], woke["PHASE"]) == ("asleep", "waking")
    assert any(entry.get("OPERATION_ID") for entry in entries)


async def test_an_engines_log_is_shown_and_followed(running: Appliance) -> None:
    assert "Application startup complete" in running.ctl("logs", "writer").out
    with running.machine.popen("homegptctl", "logs", "writer", "-f", "-n", "0") as following:
        try:
            async with client(running) as session:
                await until(lambda: _says_more(following, session))
        finally:
            following.kill()


async def _says_more(following: "subprocess.Popen[bytes]", session: ClientSession) -> bool:
    """Whether the one who follows the log has new lines, after another request."""
    await answer(session, "writer")
    assert following.stdout is not None
    if not select.select([following.stdout], [], [], 0)[0]:
        return False
    return b"POST /v1/chat/completions" in os.read(following.stdout.fileno(), 1 << 16)
