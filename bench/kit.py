"""What the measurements share: a box with simulated engines, callers, quantiles, and the report.

Run a measurement from the repository's root: `python -m bench.switch [--json]`.
"""

import argparse
import json
import os
import platform
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from time import clock_gettime, sleep
from typing import Any

from tests.e2e.harness import BIN, Box, SimModel

PACKAGES = ("aiohttp", "uvloop", "httptools", "msgspec")
MS = 1e3
US = 1e6


def ground() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": f"Python {platform.python_version()}",
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
        "load": os.getloadavg()[0],
    }


@dataclass
class Report:
    """A table, what it was measured on, and what has to be said with it."""

    bench: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ground: dict[str, Any] = field(default_factory=ground)

    def add(self, *cells: Any) -> None:
        self.rows.append(cells)

    def show(self, *, as_json: bool) -> None:
        self.ground["load_at_end"] = os.getloadavg()[0]
        if as_json:
            print(json.dumps(asdict(self), ensure_ascii=False))
            return
        head = f"{self.bench}: {self.ground['python']}, {self.ground['cpus']} CPUs"
        print(f"\n{head}, load {self.ground['load']:.1f} to {self.ground['load_at_end']:.1f}\n")
        table = [self.columns, *([_text(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            print("  ".join([row[0].ljust(widths[0]), *cells]))
        print("".join(f"\n{note}" for note in self.notes))


def arguments(about: str | None, **numbers: int) -> argparse.Namespace:
    """`--json`, and one option for each number with its default."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed: nearest rank, nothing made up in between."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def p50(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def spread(values: Sequence[float], times: float = 1.0) -> str:
    """Median and the middle half: `7.1 (6.9-7.6)`."""
    low, mid, high = (quantile(values, share) * times for share in (0.25, 0.5, 0.75))
    return f"{_text(mid)} ({_text(low)}-{_text(high)})"


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- the box


@contextmanager
def scratch_box(
    *models: SimModel, speed: float = 2000.0, head: str = "", programs: Path = BIN
) -> Iterator[Box]:
    """A directory with a configuration of these models; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="homegpt-bench-") as root:
        box = Box(Path(root), speed=speed, programs=programs)
        box.write(*models, head=head)
        yield box


def rush(*extra: str) -> tuple[str, ...]:
    """Flags of a simulated engine whose own work takes next to no time."""
    return ("--sim-tokens-per-s", "1000000", "--sim-imports-s", "0", "--sim-compile-s", "0", *extra)


class Rpc:
    """The control socket without any client of ours: one connection, one line a message."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb")
        self._id = 0

    def call(self, method: str, **params: object) -> Any:
        self._id += 1
        call = {"jsonrpc": "2.0", "id": self._id, "method": method, "params": params}
        self._sock.sendall(json.dumps(call).encode() + b"\n")
        for line in self._lines:
            message = json.loads(line)
            if message.get("id") == self._id:
                return message["result"]
        raise ConnectionError("the daemon hung up")

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


class Http(HTTPConnection):
    """A kept connection, over TCP or to a Unix socket's path."""

    def __init__(self, at: int | Path) -> None:
        super().__init__("127.0.0.1", at if isinstance(at, int) else 80, timeout=60)
        self._at = at

    def connect(self) -> None:
        if isinstance(self._at, int):
            super().connect()
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._at))

    def ask(self, method: str, path: str, body: object = None) -> bytes:
        """The body of a 200."""
        sent = None if body is None else json.dumps(body).encode()
        self.request(method, path, sent, {"Content-Type": "application/json"})
        response = self.getresponse()
        said = response.read()
        if response.status != 200:
            raise ConnectionError(f"{method} {path}: {response.status} {said[:300]!r}")
        return said


def patient_door(port: int) -> Http:
    """Connected as soon as somebody listens; a look each millisecond."""
    while True:
        door = Http(port)
        with suppress(ConnectionRefusedError):
            door.connect()
            return door
        sleep(0.001)


def engine_socket(box: Box, model: str) -> Path:
    return box.root / "engines" / model / "engine.sock"


# --- processes


def memory_mb(pid: int) -> dict[str, float]:
    """Rss, Pss, Private_Dirty … of a process, in MB (10**6)."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kb, *_ = line.split()
        found[name.rstrip(":")] = int(kb) * 1024 / 1e6
    return found


def cpu_s(pid: int) -> float:
    """Seconds on a CPU so far, over all threads it has and had (clock_getcpuclockid(3), ns)."""
    return clock_gettime(~pid << 3 | 2)
