"""A daemon that measures: figures, strangers on the card, leaks, and sleeps that are none."""

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from .harness import Box, Running, SimModel

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]


@contextmanager
def measuring(box: Box) -> Iterator[Running]:
    with box.daemon("--card-file", str(box.card)) as running:
        running.ready(30.0)
        yield running


def memory(box: Box, model: str) -> dict[str, Any]:
    done = box.ctl("--json", "memory", model)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["models"][0]


def figures(box: Box, model: str) -> dict[str, tuple[int, str]]:
    return {one["kind"]: (one["mib"], one["source"]) for one in memory(box, model)["figures"]}


def card(box: Box, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "homegptd.sim", "card", box.card, *words], check=True)


def order_fault(box: Box, model: str, **fault: object) -> None:
    """What the engine shall do wrong from now on, see homegptd.sim.faults."""
    conn = http.client.HTTPConnection("engine", timeout=5)
    with socket.socket(socket.AF_UNIX) as sock, closing(conn):
        sock.connect(str(box.root / "engines" / model / "engine.sock"))
        conn.sock = sock
        conn.request("POST", "/sim/fault", json.dumps(fault), {"Content-Type": "application/json"})
        with conn.getresponse() as answer:
            assert answer.status == 200, answer.read()


def switched(box: Box, model: str) -> None:
    done = box.ctl("switch", model)
    assert done.returncode == 0, done.stderr


CODER, WRITER = SimModel("coder", startup="active"), SimModel("writer", weights_gb=30.0)


def test_what_is_measured_counts_and_survives_kill_9(box: Box) -> None:
    box.write(CODER, WRITER)
    with measuring(box) as running:
        running.sweep = False
        known = figures(box, "writer")
        assert known["awake"] == (60 * 1024, "measured")  # 61 were given
        assert known["residue"] == (1024, "measured")
        assert known["pinned"] == (30 * 1024 // 384 * 512, "measured")  # rounded up by blocks
        assert known["host"] == (4096, "measured")
        assert box.model("writer")["memory_mib"]["gpu"] == 1024 + 128
        running.kill()
    with measuring(box):
        assert figures(box, "writer") == known
    box.write(CODER, SimModel("writer", weights_gb=20.0))  # other flags
    with box.daemon("--card-file", str(box.card)) as running:
        running.status_line("bootstrap")
        assert figures(box, "writer")["awake"] == (61 * 1024, "configured")


def test_trusted_figures_stand(box: Box) -> None:
    box.write(CODER, head="trust: configured\n")
    with measuring(box):
        known = figures(box, "coder")
        assert known["awake"] == (61 * 1024, "configured")
        assert known["host"] == (4096, "measured")  # nobody gave it


def test_a_stranger_on_the_card_is_named_and_nothing_runs_out_of_memory(box: Box) -> None:
    box.write(SimModel("coder"), WRITER)
    with measuring(box):
        card(box, "--hold", "game=30")
        done = box.ctl("switch", "writer")
        assert done.returncode == 4, done.stderr
        assert "held by game 30.0 GB" in done.stderr
        assert "needs 60.6 GB on gpu0; 80.0 total - 1.1 residue of coder" in done.stderr
        assert box.model("writer")["phase"] == "asleep"
        assert "game" in box.ctl("memory").stdout
        card(box, "--release", "game")
        freed = box.ctl("switch", "writer")
        while freed.returncode == 4:  # until somebody has looked twice
            freed = box.ctl("switch", "writer")
        assert freed.returncode == 0, freed.stderr
        assert "out of memory" not in box.log()


def test_a_leak_starts_the_engine_anew_with_the_reason(box: Box) -> None:
    box.write(CODER, WRITER)
    with measuring(box):
        before = box.engine_pids()
        order_fault(box, "writer", name="leak", value=400)
        for _ in range(2):
            switched(box, "writer")
            switched(box, "coder")
        assert "it is started anew: what it keeps asleep on gpu0 grew from 1.0 to 1.8 GB" in (
            box.log()
        )
        switched(box, "writer")
        assert len(box.engine_pids() - before) == 1
        assert figures(box, "writer")["residue"][0] < 1100


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"name": "half", "on": "sleep", "times": 1}, "vLLM says that it sleeps, but only 19.0 of"),
        ({"name": "lie", "on": "sleep", "times": 1}, "answered 200 to /sleep and is awake"),
        ({"name": "oom", "on": "wake", "times": 4}, "out of memory"),
    ],
)
def test_what_cannot_be_verified_is_a_fault_and_the_engine_starts_anew(
    box: Box, fault: dict[str, Any], reason: str
) -> None:
    box.write(CODER, SimModel("writer", weights_gb=40.0))
    with measuring(box):
        before = box.engine_pids()
        switched(box, "writer")
        order_fault(box, "writer", **fault)
        box.ctl("switch", "coder")
        box.ctl("switch", "writer")
        switched(box, "writer")
        assert reason in box.log()
        assert len(box.engine_pids() - before) == 1


def test_the_doctor_measures_what_a_sleep_frees(box: Box) -> None:
    box.write(SimModel("a", "active"), SimModel("b"))
    with measuring(box):
        told = json.loads(box.ctl("--json", "doctor", "--gpu", "--yes").stdout)
    rows = {(row["model"], row["level"]): row for row in told["gpu"]}
    assert rows["driver", None]["verdict"] == rows["books", None]["verdict"] == "ok"
    for model in ("a", "b"):
        row = rows[model, 1]
        assert row["verdict"] == "ok", row
        assert row["freed_mib"] == row["awake_mib"] - row["kept_mib"] > 0
        assert row["pinned_mib"] > 0
