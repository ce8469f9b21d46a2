"""The real `homegptd` as a process, with simulated engines: started, watched and ended by tests.

What the daemon tells systemd (sd_notify) is how tests wait for it; nothing here polls or sleeps.
"""

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

BIN = Path(sys.executable).parent
PATIENCE_S = 15.0


@dataclass
class SimModel:
    """One model of a test's configuration."""

    id: str
    startup: str = "sleep"
    weights_gb: float = 8.0
    awake_gb: float = 60.0
    flags: tuple[str, ...] = ()
    extra: str = ""
    engine: str = ""
    """More keys of its `engine:`, as YAML in flow style."""
    command: str | None = None

    def yaml(self, card: Path, speed: float) -> str:
        argv = [
            sys.executable, "-m", "homegptd.sim", "serve", self.id, "--uds", "{socket}",
            "--served-model-name", self.id, "--enable-sleep-mode",
            "--gpu-memory-utilization", f"{self.awake_gb / 80:.3f}",
            "--sim-card", str(card), "--sim-weights-gb", f"{self.weights_gb:g}",
            "--sim-residue-gb", "1", "--sim-speed", f"{speed:g}", *self.flags,
        ]  # fmt: skip
        command = self.command or "[" + ", ".join(f"'{word}'" for word in argv) + "]"
        more = f", {self.engine}" if self.engine else ""
        return (
            f"  - id: {self.id}\n"
            f"    gpu_memory_gb: {self.awake_gb + 1}\n"
            f"    weights_gb: {self.weights_gb}\n"
            f"    residue_gb: 1.1\n"
            f"    startup_mode: {self.startup}\n"
            f"    engine: {{command: {command}{more}}}\n{self.extra}"
        )


@dataclass
class Box:
    """A directory for one daemon: its configuration, card, sockets and state."""

    root: Path
    speed: float = 200.0
    port: int = 0
    programs: Path = BIN
    """Where homegptd and homegptctl are."""

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.card = self.root / "card.json"
        self.config = self.root / "config.yaml"
        self.socket = self.root / "control.sock"
        self.state = self.root / "state"
        subprocess.run(
            [sys.executable, "-m", "homegptd.sim", "card", str(self.card), "--ram-gb", "256"],
            check=True,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def write(self, *models: SimModel, head: str = "") -> None:
        gpus = "gpus:\n  - {index: 0, memory_mib: 81920}\n"
        ram = "" if "switching" in head else "switching: {available_ram_gb: 256}\n"
        blocks = "".join(model.yaml(self.card, self.speed) for model in models)
        self.config.write_text(f"{gpus}{ram}{head}models:\n{blocks}")

    def arguments(self) -> list[str]:
        return [
            "--config", str(self.config), "--listen", f"127.0.0.1:{self.port}",
            "--socket", str(self.socket), "--state-dir", str(self.state),
        ]  # fmt: skip

    def run(
        self, *extra: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the daemon to its end: for those that are to refuse."""
        return subprocess.run(
            [self.programs / "homegptd", *self.arguments(), *extra],
            env={**os.environ, **(env or {})},
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.programs / "homegptctl", "--socket", self.socket, *words],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    @contextmanager
    def reading_ctl(self, *words: str) -> Iterator[IO[str]]:
        """What a verb that does not end prints; it is ended with the block, however that ends."""
        words = (str(self.programs / "homegptctl"), "--socket", str(self.socket), *words)
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
            finally:
                process.terminate()

    def status(self) -> dict[str, Any]:
        done = self.ctl("--json", "status")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def model(self, name: str) -> dict[str, Any]:
        return next(m for m in self.status()["models"] if m["id"] == name)

    def engine_pids(self) -> set[int]:
        """Processes of this box's engines, from the kernel: whoever names its card."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(str(self.card)) in words and b"serve" in words:
                found.add(int(path.parent.name))
        return found

    @contextmanager
    def daemon(self, *extra: str, env: dict[str, str] | None = None) -> Iterator["Running"]:
        """A daemon for the duration of the block; afterwards nothing of it may be left."""
        with (
            notify_socket(self.root / "notify.sock") as (notify, path),
            (self.root / "daemon.log").open("ab") as log,
        ):
            process = subprocess.Popen(
                [self.programs / "homegptd", *self.arguments(), *extra], stderr=log, stdout=log,
                env={**os.environ, "NOTIFY_SOCKET": path, **(env or {})},
            )  # fmt: skip
            running = Running(self, process, notify)
            try:
                yield running
            except BaseException:
                print(self.log())
                raise
            finally:
                if process.poll() is None:
                    process.terminate()
                    try:
                        process.wait(PATIENCE_S)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                for pid in self.engine_pids() if running.sweep else ():
                    os.kill(pid, signal.SIGKILL)

    def log(self) -> str:
        return (self.root / "daemon.log").read_text()


@dataclass
class Running:
    """A daemon that runs, and what it told systemd so far."""

    box: Box
    process: "subprocess.Popen[bytes]"
    notify: socket.socket
    told: list[str] = field(default_factory=list)
    sweep: bool = True
    """Whether engines that are left at the end are killed; False to hand them on."""

    def wait_for(
        self, seen: Callable[[str], bool], what: str, patience_s: float = PATIENCE_S
    ) -> str:
        """The first message from now on that `seen` says yes to."""
        while True:
            message = self._next_message(patience_s)
            if message is None:
                raise AssertionError(f"never told {what}; log:\n{self.box.log()}")
            self.told.append(message)
            if seen(message):
                return message

    def _next_message(self, patience_s: float) -> str | None:
        """None if the time is up, or the daemon has ended and said all it had to say."""
        ended = os.pidfd_open(self.process.pid) if self.process.returncode is None else None
        try:
            sources = [self.notify, *([] if ended is None else [ended])]
            readable, _, _ = select.select(sources, [], [], patience_s if ended else 0)
        finally:
            if ended is not None:
                os.close(ended)
        return self.notify.recv(65536).decode() if self.notify in readable else None

    def ready(self, patience_s: float = PATIENCE_S) -> str:
        return self.wait_for(lambda message: "READY=1" in message, "READY=1", patience_s)

    def status_line(self, part: str) -> str:
        return self.wait_for(lambda message: part in message, f"a status with {part!r}")

    def terminate(self) -> int:
        """SIGTERM, and its exit code."""
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def notify_socket(path: Path) -> Iterator[tuple[socket.socket, str]]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        yield sock, str(path)


def free_port() -> int:
    """Below those that the kernel gives to whoever asks for any: none of the clients and servers
    that run beside takes it before the daemon does."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(given.read_text().split()[0]) if given.exists() else 32768
    while True:
        port = random.randrange(min(10000, first - 1), first)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
