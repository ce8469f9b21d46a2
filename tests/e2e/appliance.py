"""The appliance: a Debian 13 machine on which the built package was installed by apt.

A test's own process lives in the machine's network while it runs, so that its clients reach the
daemon's doors as anybody on the box does; the control socket is reached through /proc.
"""

import asyncio
import ctypes
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .lab import roots
from .lab.images import IMAGE, load_engine
from .lab.machine import REPO, Done, Machine, booted

CONFIG = "/etc/homegpt/config.yaml"
WEBUI = "localhost/open-webui:1"
PACKAGE = "/root/homegpt.deb"
PATIENCE_S = 20.0
_CLONE_NEWNET = 0x40000000


COMMON = {"sim-speed": 200, "sim-weights-gb": 8, "sim-residue-gb": 1}


@dataclass(frozen=True)
class Sim:
    """One model with a simulated engine in its container."""

    id: str
    startup: str = "sleep"
    args: dict[str, object] = field(default_factory=dict)
    engine: str = ""
    """More keys of its `engine:`, as YAML in flow style."""
    whole: str = ""
    """All of its `engine:` instead."""
    more: str = ""
    """More keys of its own, each a line."""

    def yaml(self) -> str:
        given = {**COMMON, **self.args}
        words = ", ".join(f"{name}: '{value}'" for name, value in given.items())
        more = f", {self.engine}" if self.engine else ""
        engine = self.whole or f"{{model: /models/{self.id}, args: {{{words}}}{more}}}"
        return (
            f"  - id: {self.id}\n"
            f"    gpu_memory_gb: 61\n"
            f"    weights_gb: 8\n"
            f"    residue_gb: 1.1\n"
            f"    startup_mode: {self.startup}\n"
            f"    engine: {engine}\n" + "".join(f"    {row}\n" for row in self.more.splitlines())
        )


CODER, WRITER = Sim("coder", "active"), Sim("writer")
SLOW = {"sim-tokens-per-s": 0.25}
"""50 tokens a second at the common speed: answers that last while something happens to them."""


def configuration(*models: Sim, head: str = "") -> str:
    """For one card of 80 GB, on which one model at a time fits awake."""
    switching = "switching: {available_ram_gb: 256, max_retries: 20, " \
        "health_check_interval_seconds: 1}\n"  # fmt: skip
    return (
        "gpus:\n  - {index: 0, memory_mib: 81920}\n"
        f"{'' if 'switching:' in head else switching}{head}"
        f"engine:\n  image: {IMAGE}\n"
        f"models:\n{''.join(model.yaml() for model in models)}"
    )


class Appliance:
    """The installed package on its machine, and how a person and a client meet it."""

    url = "http://127.0.0.1:9000"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.socket = machine.path("/run/homegpt/control.sock")
        self.mark = ""

    # ------------------------------------------------------------ a known state

    def reset(self) -> None:
        """As after the installation: configured, nothing started. About half a second."""
        machine = self.machine
        machine.reset()
        for folder in ("homegpt.service.d", "vllm-.service.d"):
            shutil.rmtree(machine.path(f"/etc/systemd/system/{folder}"), ignore_errors=True)
        machine.run("sh", "-c", "rm -rf /var/lib/homegpt/* /var/cache/homegpt/engines/*")
        machine.run("systemd-tmpfiles", "--create", "homegpt.conf")
        machine.systemctl("daemon-reload")
        self.configure(CODER, WRITER)
        self.mark = machine.mark()

    def configure(self, *models: Sim, head: str = "") -> None:
        self.write_config(configuration(*models, head=head))

    def write_config(self, text: str) -> None:
        self.machine.write(CONFIG, text, mode=0o644)

    # ------------------------------------------------------------ systemd

    def systemctl(self, *words: str, check: bool = True, timeout: float = 90) -> Done:
        return self.machine.run("systemctl", *words, check=check, timeout=timeout)

    def start(self) -> None:
        self.systemctl("start", "homegpt")

    def show(self, unit: str, name: str) -> str:
        return self.machine.show(unit, name).get(name, "")

    def daemon_pid(self) -> int:
        """As the host counts."""
        return self.machine.host_pid(int(self.show("homegpt", "MainPID")))

    def main_pids(self, *models: str) -> dict[str, int]:
        """Of the units' main processes, conmon's that is, as the machine counts."""
        return {model: int(self.show(f"vllm-{model}", "MainPID")) for model in models}

    def engine_pid(self, model: str) -> int:
        """Of the engine itself, as the host counts. catatonit is the first in the container."""
        words = ("podman", "inspect", "--format={{.State.Pid}}", f"vllm-{model}")
        first = self.machine.host_pid(int(self.machine.run(*words).out))
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return int(children[0]) if children else first

    def side_door(self, model: str, method: str, path: str, body: object = None) -> None:
        """The simulator's own endpoints, on the engine's socket."""
        conn = http.client.HTTPConnection("engine", timeout=5)
        conn.sock = socket.socket(socket.AF_UNIX)
        conn.sock.connect(str(self.machine.path(f"/run/homegpt/engines/{model}/engine.sock")))
        with closing(conn):
            conn.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            assert conn.getresponse().status == 200

    def order_fault(self, model: str, **fault: object) -> None:
        """What the engine shall do wrong from now on, see homegptd.sim.faults."""
        self.side_door(model, "POST", "/sim/fault", fault)

    def containers(self) -> set[str]:
        return set(self.machine.run("podman", "ps", "-a", "--format={{.Names}}").out.split())

    def story(self, *matches: str) -> list[str]:
        """What the daemon's unit told the journal in this test."""
        entries = self.machine.journal("-u", "homegpt", *matches, since=self.mark)
        return [entry["MESSAGE"] for entry in entries]

    # ------------------------------------------------------------ the daemon

    def ctl(self, *words: str, check: bool = True) -> Done:
        return self.machine.run("homegptctl", *words, check=check)

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.ctl("--json", "status").out)
        return told

    def phases(self) -> dict[str, str]:
        return {model["id"]: model["phase"] for model in self.status()["models"]}

    async def socket_answers(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(str(self.socket))
        except OSError:
            return False
        writer.close()
        return True

    def model(self, name: str) -> dict[str, Any]:
        return next(m for m in self.status()["models"] if m["id"] == name)


async def until(true: Callable[[], Awaitable[object]], patience_s: float = PATIENCE_S) -> None:
    """Until it is true. What happens in another machine is no event here: look again."""
    async with asyncio.timeout(patience_s):
        while not await true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def beside(call: Callable[..., Any], *args: object) -> Any:
    """A blocking call, while the test's clients go on."""
    return await asyncio.to_thread(call, *args)


@asynccontextmanager
async def meanwhile(call: Callable[[], Any]) -> AsyncIterator["asyncio.Task[Any]"]:
    """A blocking call that goes on beside the block, which ends no sooner than it."""
    async with asyncio.TaskGroup() as group:
        yield group.create_task(asyncio.to_thread(call))


# ------------------------------------------------------------ fixtures


@pytest.fixture(scope="session")
def installed() -> Iterator[Appliance]:
    """A clean Debian on which apt installed the built package from Debian's own mirrors."""
    if why := roots.why_not():
        if os.environ.get("HOMEGPT_REQUIRE_LAB") == "1":
            pytest.fail(f"HOMEGPT_REQUIRE_LAB=1, but the lab {why}")
        pytest.skip(why)
    package = _build()
    roots.prepare(roots.BASE)  # the engine's image is made of it
    with booted(roots.CLEAN, shared=real_folders()) as machine:
        began = time.monotonic()
        install(machine, package)
        load_engine(machine, WEBUI)
        print(f"\nappliance: installed by apt in {time.monotonic() - began:.1f} s")
        yield Appliance(machine)


@pytest.fixture
def appliance(installed: Appliance) -> Iterator[Appliance]:
    """Configured with coder (active) and writer (asleep), nothing started yet."""
    installed.reset()
    with _in_network_of(installed.machine):
        yield installed
    print("\n".join(installed.story()[-40:]))  # shown if the test failed


@pytest.fixture
def running(appliance: Appliance) -> Appliance:
    """As `appliance`, and READY."""
    appliance.start()
    return appliance


def real_folders() -> dict[Path, str]:
    """Where the machine finds the real vLLM, its Python and its model; empty if there is none."""
    python, model = (os.environ.get(f"HOMEGPT_REAL_{name}") for name in ("VLLM", "MODEL"))
    if not (python and model):
        return {}
    prefix = [python, "-c", "import sys; print(sys.base_prefix)"]
    base = subprocess.run(prefix, capture_output=True, text=True, check=True).stdout.strip()
    folders = (Path(python).parents[1], Path(base), Path(model))
    return {folder: f"/srv/real/{number}" for number, folder in enumerate(folders)}


def install(machine: Machine, package: Path) -> None:
    machine.put(package, PACKAGE)
    apt = {"DEBIAN_FRONTEND": "noninteractive"}
    machine.run("apt-get", "-qq", "update", online=True, timeout=120, env=apt)
    words = ("apt-get", "-qq", "-y", "--no-install-recommends", "install", PACKAGE)
    machine.run(*words, online=True, timeout=300, env=apt)


def _build() -> Path:
    done = subprocess.run(["make", "-s", "deb"], cwd=REPO, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"make deb: {(done.stdout + done.stderr).decode()[-3000:]}")
    return REPO / done.stdout.decode().split()[-1]


@contextmanager
def _in_network_of(machine: Machine) -> Iterator[None]:
    """This thread, and those it starts, in the machine's network: setns(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as home:
        with Path(f"/proc/{machine.leader}/ns/net").open() as there:
            _check(libc.setns(there.fileno(), _CLONE_NEWNET))
        try:
            yield
        finally:
            _check(libc.setns(home.fileno(), _CLONE_NEWNET))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), "setns")
