"""The router beside nginx, in front of the same engine: small answers, and streams of events.

Three targets take turns in random order: the engine's socket itself ("direct"), nginx and the
daemon, both over TCP. "added" is what a target takes more than direct in the same round; medians of
rounds. The CPU of a proxy is the kernel's own account (schedstat). Requests over one connection and
64 streams share one core with everything else; for 256 streams a proxy has a core of its own.
Without nginx in the PATH its rows are missing.
"""

import asyncio
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic_ns, perf_counter

import uvloop

from bench.kit import (
    US,
    Http,
    Report,
    arguments,
    cpu_s,
    engine_socket,
    p50,
    patient_door,
    quantile,
    scratch_box,
)
from bench.upstream import EVENTS_PER_S, LENGTH
from tests.e2e.harness import Box, SimModel, free_port

ENGINE = f"['{sys.executable}', '-m', 'bench.upstream', '{{socket}}']"
ROOT = Path(__file__).parents[1]
END = b"0\r\n\r\n"
SENT = re.compile(rb'"t":(\d+)')
PATH = "/v1/chat/completions"
SMALL = {"model": "a", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi" * 50}]}
_NGINX = """
daemon off; master_process off; pid {root}/nginx.pid; error_log {root}/nginx.log error;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {root}; proxy_temp_path {root};
  fastcgi_temp_path {root}; uwsgi_temp_path {root}; scgi_temp_path {root};
  keepalive_requests 1000000;
  upstream engine {{ server unix:{socket}; keepalive 512; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Target:
    name: str
    at: int | Path
    pid: int | None
    """None: nothing stands between."""


@dataclass
class Streams:
    """What arrived of some streams."""

    delays_ns: list[int] = field(default_factory=list)
    complete: int = 0
    cpu_us: float = 0.0


class Listener(asyncio.Protocol):
    """One stream: notes how late each event is."""

    def __init__(self, request: bytes, found: Streams, done: asyncio.Semaphore) -> None:
        self._request, self._found, self._done = request, found, done
        self._line = b""  # as far as it has come
        self._last = b""
        self._said_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = monotonic_ns()
        lines, _, self._line = (self._line + data).rpartition(b"\n")
        self._found.delays_ns += [now - int(sent) for sent in SENT.findall(lines)]
        self._said_done = self._said_done or b"[DONE]" in lines
        self._last = (self._last + data)[-len(END) :]
        if self._last == END:
            self._found.complete += self._said_done
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done.release()


async def stream(target: Target, count: int, events: int) -> Streams:
    """`count` streams of `events` at once. One that is cut is missing in `complete`."""
    body = (
        b'{"model":"a","stream":true,"max_tokens":%d,"messages":[{"role":"user","content":"Hi"}]}'
    )
    body %= events
    request = post(body)
    loop, found, done = asyncio.get_running_loop(), Streams(), asyncio.Semaphore(0)
    before = cpu_s(target.pid) if target.pid else 0.0
    for _ in range(count):
        listener = Listener(request, found, done)
        if isinstance(target.at, Path):
            await loop.create_unix_connection(lambda it=listener: it, str(target.at))
        else:
            await loop.create_connection(lambda it=listener: it, "127.0.0.1", target.at)
    async with asyncio.timeout(60 + events / EVENTS_PER_S):
        for _ in range(count):
            await done.acquire()
    after = cpu_s(target.pid) if target.pid else 0.0
    found.cpu_us = (after - before) * US / (count * events)
    return found


def small(target: Target, count: int) -> tuple[list[float], float]:
    """Seconds of each request over one kept connection, and the proxy's CPU µs per request."""
    door, took = Http(target.at), []
    door.connect()
    request = post(json.dumps(SMALL).encode())
    for _ in range(20):
        exchange(door.sock, request)
    before = cpu_s(target.pid) if target.pid else 0.0
    for _ in range(count):
        began = perf_counter()
        exchange(door.sock, request)
        took.append(perf_counter() - began)
    after = cpu_s(target.pid) if target.pid else 0.0
    door.close()
    return took, (after - before) * US / count


def post(body: bytes) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def exchange(sock: socket.socket, request: bytes) -> None:
    """One request in one write, and its whole answer. http.client would take longer than nginx."""
    sock.sendall(request)
    said = b""
    while True:
        head, end, body = said.partition(b"\r\n\r\n")
        if end and len(body) >= int(LENGTH.search(head)[1]):
            break
        more = sock.recv(65536)
        if not more:
            raise ConnectionError("the answer was cut")
        said += more
    if b" 200 " not in head[:15]:
        raise ConnectionError(said.decode())


@contextmanager
def nginx(box: Box, engine: Path) -> Iterator[Target | None]:
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        yield None
        return
    port, conf = free_port(), box.root / "nginx.conf"
    conf.write_text(_NGINX.format(root=box.root, socket=engine, port=port))
    process = subprocess.Popen([program, "-p", box.root, "-c", conf], stderr=subprocess.DEVNULL)
    try:
        patient_door(port).close()
        yield Target("nginx", port, process.pid)
    finally:
        process.terminate()
        process.wait()


@dataclass
class Cell:
    """One load on one target, a figure for each round."""

    typical_us: list[float] = field(default_factory=list)
    """Median latency of an answer, or median delay of an event."""
    late_us: list[float] = field(default_factory=list)
    """90 of 100 are quicker."""
    cpu_us: list[float] = field(default_factory=list)
    lost: int = 0
    cut: int = 0


class Bench:
    def __init__(self, targets: list[Target], asked: Namespace, cores: list[int]) -> None:
        self.targets, self.asked, self.cores = targets, asked, cores
        self.loads = {"small POST": 0, "64 streams": 64, "256 streams": 256}
        self.cells = {(load, t.name): Cell() for load in self.loads for t in targets}

    def run(self, runner: asyncio.Runner) -> None:
        for _ in range(self.asked.rounds):
            for load, count in self.loads.items():
                self._pin(own_core=count == 256)
                for target in random.sample(self.targets, len(self.targets)):
                    cell = self.cells[load, target.name]
                    if count:
                        self._stream(cell, runner, target, count)
                    else:
                        took, cpu = small(target, self.asked.requests)
                        note(cell, [one * US for one in took], cpu)

    def _stream(self, cell: Cell, runner: asyncio.Runner, target: Target, count: int) -> None:
        events = self.asked.events
        found = runner.run(stream(target, count, events))
        note(cell, [delay / 1e3 for delay in found.delays_ns], found.cpu_us)
        cell.lost += count * events - len(found.delays_ns)
        cell.cut += count - found.complete

    def _pin(self, *, own_core: bool) -> None:
        """Everything on the last core, or the proxies on the first."""
        for target in self.targets:
            if target.pid:
                os.sched_setaffinity(target.pid, {self.cores[0 if own_core else -1]})

    def report(self) -> Report:
        report = Report(
            "relay",
            ("load, target", "p50 µs", "added p50 µs", "÷ nginx", "p90 µs", "CPU µs", "÷ nginx ",
             "lost", "cut"),
        )  # fmt: skip
        for (load, name), cell in self.cells.items():
            yardstick = self.cells.get((load, "nginx"))
            added = self._added(load, cell)
            report.add(
                f"{load}, {name}",
                median(cell.typical_us),
                median(added) if name != "direct" else "-",
                ratio(added, self._added(load, yardstick)) if name == "homegptd" else "-",
                median(cell.late_us),
                median(cell.cpu_us) if name != "direct" else "-",
                ratio(cell.cpu_us, yardstick and yardstick.cpu_us) if name == "homegptd" else "-",
                cell.lost,
                cell.cut,
            )
        return report

    def _added(self, load: str, cell: Cell | None) -> list[float]:
        direct = self.cells[load, "direct"].typical_us
        return [] if cell is None else [a - b for a, b in zip(cell.typical_us, direct, strict=True)]


def note(cell: Cell, took_us: list[float], cpu_us: float) -> None:
    cell.typical_us.append(p50(took_us))
    cell.late_us.append(quantile(took_us, 0.9))
    cell.cpu_us.append(cpu_us)


def ratio(ours: list[float], theirs: list[float] | None) -> str:
    """Median of the ratios inside the rounds, with the smallest and the largest."""
    if not theirs:
        return "-"
    found = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{median(found):.2f} ({found[0]:.2f}-{found[-1]:.2f})"


def main() -> None:
    asked = arguments(__doc__, rounds=3, events=100, requests=500)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})  # the engine, which the daemon starts, inherits it
    os.environ["PYTHONPATH"] = str(ROOT)
    with ExitStack() as stack:
        model = SimModel("a", "active", command=ENGINE)
        box = stack.enter_context(scratch_box(model, head="router: {on_deadline: wait}\n"))
        daemon = stack.enter_context(box.daemon())
        daemon.ready()
        engine = engine_socket(box, "a")
        other = stack.enter_context(nginx(box, engine))
        targets = [Target("direct", engine, None), *([other] if other else [])]
        targets.append(Target("homegptd", box.port, daemon.process.pid))
        bench = Bench(targets, asked, cores)
        with asyncio.Runner(loop_factory=uvloop.Loop) as runner:
            bench.run(runner)
    report = bench.report()
    report.notes.append(
        f"{asked.rounds} rounds; {asked.requests} requests; {asked.events} events a stream at"
        f" {EVENTS_PER_S} a second. CPU is for one request or one event."
    )
    report.show(as_json=asked.json)


if __name__ == "__main__":
    main()
