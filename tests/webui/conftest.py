"""A real Open WebUI in front of a box with simulated models, and Chromium in front of that.

HOMEGPT_WEBUI names the Python that `.ci/webui/install` builds; playwright runs there too, as a
program of its own (`browser.py`), since the tests' own environment has none.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from homegptd.config.parse import load
from homegptd.host.webui import environment
from tests.e2e.harness import Box, Running, SimModel, free_port

PYTHON = os.environ.get("HOMEGPT_WEBUI", "")
_ADMIN = {"email": "admin@example.org", "password": "not-a-secret", "name": "Admin"}
_READY_S = 400.0
_HERE = Path(__file__).parent


@dataclass
class Page:
    """The browser, one command a line each way."""

    process: "subprocess.Popen[str]"
    shots: Path

    def __call__(self, act: str, **more: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"act": act, **more}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the browser has ended"
        answer = json.loads(line)
        if "error" in answer:
            self.process.stdin.write(json.dumps({"act": "shot", "name": "failure"}) + "\n")
            self.process.stdin.flush()
            self.process.stdout.readline()
            raise AssertionError(f"{act} {more}: {answer['error']}\nsee {self.shots}/failure.png")
        return answer["result"]


@dataclass
class Desktop:
    """Everything between the user and the models."""

    box: Box
    daemon: Running
    page: Page

    def log(self) -> list[str]:
        return self.box.log().splitlines()

    def wakes(self) -> list[str]:
        """Which models were woken, in order, since the box was ready."""
        log = self.log()
        ready = next(i for i, line in enumerate(log) if " ready: " in line)
        return [line.split()[1] for line in log[ready:] if "is awake (woken" in line]


@pytest.fixture(scope="session")
def desktop() -> Iterator[Desktop]:
    root = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    shots = Path(os.environ.get("HOMEGPT_SHOTS", root))
    shots.mkdir(exist_ok=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        box = Box(root, speed=20.0)
        # sleeps and wakes of two seconds each; a writes 40 tokens a second, b fourteen
        slow = ("--sim-pcie-gbps", "0.5", "--sim-pin-gbps", "0.5")
        models = [
            SimModel("a", "active", weights_gb=20, flags=(*slow, "--sim-tokens-per-s", "2")),
            SimModel("b", weights_gb=20, flags=(*slow, "--sim-tokens-per-s", "0.7")),
        ]
        listen = f"http: {{listen: ['127.0.0.1:{box.port}']}}\n"
        box.write(*models, head=f"{listen}webui: {{enabled: true, port: {free_port()}}}\n")
        daemon = stack.enter_context(box.daemon())
        url, server = stack.enter_context(_served(box, root))
        daemon.ready(120.0)
        _until_up(url, server, root / "webui.log")
        page = stack.enter_context(browser("browser.py", url, _token(url), shots))
        yield Desktop(box, daemon, page)


@contextmanager
def _served(box: Box, root: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    config = load(box.config)
    told, port = environment(config, "127.0.0.1"), config.webui.port
    own = {
        "DATA_DIR": str(root / "webui"),
        "WEBUI_SECRET_KEY": "only here",
        **{f"WEBUI_ADMIN_{key.upper()}": value for key, value in _ADMIN.items()},
    }
    (root / "webui").mkdir()
    base = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
    with (root / "webui.log").open("wb") as log:
        program = Path(PYTHON).parent / "open-webui"
        server = subprocess.Popen(
            [program, "serve", "--host", "127.0.0.1", "--port", str(port)],
            env={**base, **told, **own}, stdout=log, stderr=log, cwd=root,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
        server.kill()
        server.wait()


@contextmanager
def browser(program: str, url: str, token: str, shots: Path) -> Iterator[Page]:
    process = subprocess.Popen(
        [PYTHON, _HERE / program, url, token, shots],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Page(process, shots)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _until_up(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"Open WebUI does not come up:\n{log.read_text()[-3000:]}")


def _token(url: str) -> str:
    body = json.dumps({k: _ADMIN[k] for k in ("email", "password")}).encode()
    request = urllib.request.Request(
        f"{url}/api/v1/auths/signin", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["token"])
