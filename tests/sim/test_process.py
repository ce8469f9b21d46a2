"""The simulator as a process: exit codes, signals, the socket file, the shared card."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from homegptd.sim.card import FileCard

pytestmark = pytest.mark.e2e


class Sim:
    """One simulator process and a small client for it."""

    def __init__(self, where: Path, *flags: str, speed: int = 100, name: str = "a") -> None:
        self.uds = where / f"{name}.sock"
        words = ["-m", "homegptd.sim", "serve", name, "--uds", str(self.uds), *flags]
        words += ["--enable-sleep-mode", "--sim-speed", str(speed)]
        env = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *words], env=env, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []

    def read_until(self, text: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"no {text!r} in {self.lines}")

    def call(
        self, verb: str, path: str, body: object = None, timeout: float = 5
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("sim", timeout=timeout)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout)
        try:
            connection.sock.connect(str(self.uds))
            headers = {"Content-Type": "application/json"}
            connection.request(verb, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            raw = answer.read()
            return answer.status, json.loads(raw) if raw else None
        finally:
            connection.close()

    def ended(self, timeout: float = 8) -> int:
        return self.process.wait(timeout)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def sims() -> Iterator[list[Sim]]:
    started: list[Sim] = []
    yield started
    for sim in started:
        sim.close()


READY = "Application startup complete"


def test_sigterm_ends_an_idle_server_with_0_and_leaves_the_socket_file(tmp_path, sims) -> None:
    sims.append(sim := Sim(tmp_path))
    sim.read_until(READY)
    assert sim.call("GET", "/health") == (200, None)
    sim.process.terminate()
    assert sim.ended() == 0
    assert sim.uds.exists()
    sims.append(second := Sim(tmp_path))
    second.read_until("Address already in use")
    assert second.ended() == 1


def test_an_unknown_flag_exits_2_and_known_ones_are_taken(tmp_path, sims) -> None:
    sims.append(bad := Sim(tmp_path, "--no-such-flag"))
    assert bad.ended() == 2
    known = "--max-num-batched-tokens 49152 --kv-cache-dtype fp8 --enable-chunked-prefill"
    known += " --enable-auto-tool-choice --tool-call-parser hermes --disable-fastapi-docs"
    sims.append(good := Sim(tmp_path, *known.split()))
    good.read_until(READY)


def test_a_port_is_refused_until_the_model_is_loaded(tmp_path, sims) -> None:
    sims.append(sim := Sim(tmp_path, "--sim-weights-gb", "4", speed=20))
    sim.read_until("Loading weights")
    with pytest.raises(ConnectionRefusedError):
        sim.call("GET", "/health")
    sim.read_until(READY)
    assert sim.call("GET", "/health")[0] == 200


def test_the_first_sigterm_of_a_load_is_swallowed_and_the_second_works(tmp_path, sims) -> None:
    for name, count in (("once", 1), ("twice", 2)):
        sims.append(sim := Sim(tmp_path, name=name, speed=20))
        sim.read_until("Loading weights")
        for _ in range(count):
            sim.process.terminate()
            if count == 2:
                sim.read_until("SIGTERM")
        if count == 1:
            sim.read_until(READY)
        else:
            assert sim.ended() == -signal.SIGINT


def test_a_dead_engine_ends_the_server_with_0(tmp_path, sims) -> None:
    sims.append(sim := Sim(tmp_path))
    sim.read_until(READY)
    sim.call("POST", "/sim/die")
    assert sim.ended() == 0


def test_a_zombie_closes_its_door_and_ignores_sigterm(tmp_path, sims) -> None:
    sims.append(sim := Sim(tmp_path, "--sim-fault", "zombie@sleep"))
    sim.read_until(READY)
    with pytest.raises(TimeoutError):
        sim.call("POST", "/sleep", timeout=0.5)
    with pytest.raises(ConnectionRefusedError):
        sim.call("GET", "/health")
    sim.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        sim.ended(0.5)


def test_kill_9_frees_the_card_as_a_real_one(tmp_path, sims) -> None:
    path = tmp_path / "card.json"
    making = [sys.executable, "-m", "homegptd.sim", "card", str(path), "--gpu-gb", "40"]
    subprocess.run(making, check=True)
    flags = ("--sim-card", str(path), "--gpu-memory-utilization", "0.8")
    sims.append(first := Sim(tmp_path, *flags))
    first.read_until(READY)
    sims.append(second := Sim(tmp_path, *flags, name="b"))
    second.read_until("less than desired GPU memory utilization")
    assert second.ended() == 1
    with FileCard(path).locked() as box:
        assert box.used_mib(0) == 32 * 1024
    first.process.kill()
    first.ended()
    with FileCard(path).locked() as box:
        assert box.used_mib(0) == 0


def test_the_host_out_of_memory_kills(tmp_path, sims) -> None:
    path = tmp_path / "card.json"
    making = [sys.executable, "-m", "homegptd.sim", "card", str(path), "--ram-gb", "16"]
    subprocess.run(making, check=True)
    sims.append(sim := Sim(tmp_path, "--sim-card", str(path)))
    sim.read_until(READY)
    with pytest.raises((OSError, http.client.HTTPException)):
        sim.call("POST", "/sleep")
    assert sim.ended() == -signal.SIGKILL


def test_a_drain_at_the_end_lets_answers_finish(tmp_path, sims) -> None:
    sims.append(sim := Sim(tmp_path, "--shutdown-timeout", "100"))
    sim.read_until(READY)
    connection = http.client.HTTPConnection("sim")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(sim.uds))
    ask = {"prompt": "x", "max_tokens": 30, "sim_tokens_per_s": 1, "stream": True}
    head = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(ask), head)
    answer = connection.getresponse()
    answer.readline()
    sim.process.terminate()
    text = answer.read().decode()
    connection.close()
    assert '"finish_reason":"length"' in text
    assert sim.ended() == 0
