"""Memory of the idle daemon after a bootstrap of four models, and which imports cost it.

RSS counts shared pages (the interpreter, the C library) in full, PSS in shares. MB are 10**6 bytes.
"""

import json
import subprocess
import sys
from pathlib import Path

from bench.kit import Http, Report, Rpc, arguments, memory_mb, rush, scratch_box
from tests.e2e.harness import SimModel

GOAL_MB = 65.0
MODULES = (
    "asyncio", "uvloop", "aiohttp.web", "msgspec", "httptools", "yaml", "sqlite3", "sdnotify",
    "homegptd.adapters.dbus", "homegptd.core.machine", "homegptd.runtime.scheduler",
    "homegptd.adapters.vllm", "homegptd.adapters.processes", "homegptd.faces.http",
    "homegptd.config.parse", "homegptd.app.demo", "homegptd.app.cli",
)  # fmt: skip
_PROBE = """
import sys, time, json
def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 1e6
rows = [("(python)", rss(), 0.0)]
for name in sys.argv[1:]:
    began = time.perf_counter()
    try:
        __import__(name)
    except ImportError:
        continue
    rows.append((name, rss(), time.perf_counter() - began))
print(json.dumps([rows, sorted({m.partition(".")[0] for m in sys.modules})]))
"""


def imports() -> tuple[list[tuple[str, float, float]], set[str]]:
    """Name, RSS in MB after it, seconds: one after the other, each pays for what is new with it."""
    argv = [sys.executable, "-c", _PROBE, *MODULES]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    rows, names = json.loads(done.stdout)
    return rows, set(names)


def main() -> None:
    asked = arguments(__doc__, chats=50)
    report = Report("memory", ("daemon", "RSS MB", "PSS MB", "private dirty MB"))
    models = (SimModel("a", "active", flags=rush()), *(SimModel(n, flags=rush()) for n in "bcd"))
    with scratch_box(*models) as box, box.daemon() as daemon:
        daemon.ready()
        pid = daemon.process.pid
        add(report, "idle after bootstrap, 4 models", pid)
        door, rpc = Http(box.port), Rpc(box.socket)
        for _ in range(asked.chats):
            door.ask("POST", "/v1/chat/completions", {
                "model": "a", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}],
            })  # fmt: skip
            rpc.call("status")
        add(report, f"after {asked.chats} chats and status calls", pid)
        for turn in range(10):
            rpc.call("switch", model="ba"[turn % 2])
        add(report, "after 10 switches", pid)
        threads = sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
        door.close()
        rpc.close()
    rows, loaded = imports()
    before = 0.0
    for name, rss, took in rows:
        report.notes.append(f"  {name:32} +{rss - before:5.1f} MB  {took * 1e3:6.1f} ms")
        before = rss
    heavy = sorted(loaded & {"pydantic", "podman", "prometheus_client", "requests", "numpy"})
    report.notes.insert(0, f"Imports, in this order (then {before:.1f} MB):")
    report.notes.append(f"Needless heavy packages loaded: {', '.join(heavy) or 'none'}."
                        f" Threads: {threads}.")  # fmt: skip
    report.notes.append(f"Goal: idle RSS at most {GOAL_MB:g} MB.")
    report.show(as_json=asked.json)


def add(report: Report, name: str, pid: int) -> None:
    found = memory_mb(pid)
    report.add(name, found["Rss"], found["Pss"], found["Private_Dirty"])


if __name__ == "__main__":
    main()
