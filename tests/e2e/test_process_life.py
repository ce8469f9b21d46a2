"""The daemon as a process, with simulated engines: its life, its ends, and bad input."""

import itertools
import json
import os
import select
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from .harness import Box, SimModel, free_port

pytestmark = pytest.mark.e2e


def test_bootstrap_in_order_then_ready_and_a_clean_end(box: Box) -> None:
    box.write(SimModel("a", "active"), SimModel("b"), SimModel("c", "disabled"))
    with box.daemon() as daemon:
        daemon.ready()
        phases = {m["id"]: (m["phase"], m["status"]) for m in box.status()["models"]}
        assert phases == {
            "a": ("awake", "active"), "b": ("asleep", "sleeping"), "c": ("down", "disabled"),
        }  # fmt: skip
        log = box.log()
        assert log.index("a is starting") < log.index("a is asleep") < log.index("b is starting")
        assert log.index("b is asleep") < log.index("a is awake") < log.index(" ready: ")
        assert any("EXTEND_TIMEOUT_USEC=" in message for message in daemon.told)
        assert daemon.terminate() == 0
        daemon.wait_for(lambda message: "STOPPING=1" in message, "STOPPING=1")
        assert not box.engine_pids()
        assert not box.socket.exists()


def test_every_problem_of_a_configuration_is_told_at_once(box: Box) -> None:
    box.config.write_text("models:\n  - id: a\n    gpu_memory_gb: lots\n  - idd: b\nroutr: 3\n")
    done = box.run()
    assert done.returncode == 78
    assert f"{box.config}:3: models[a].gpu_memory_gb" in done.stderr
    assert ":4: models[1]" in done.stderr
    assert ":5: routr" in done.stderr


@pytest.mark.parametrize("make", ["missing", "directory", "binary"])
def test_a_configuration_that_cannot_be_read(box: Box, make: str) -> None:
    if make == "directory":
        box.config.mkdir()
    if make == "binary":
        box.config.write_bytes(b"\xff\xfe\x00models")
    done = box.run()
    assert done.returncode == 78
    assert str(box.config) in done.stderr


def test_a_port_in_use_is_named_and_nothing_is_started(box: Box) -> None:
    box.write(SimModel("a", "active"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", box.port))
        taken.listen()
        done = box.run()
    assert done.returncode == 69
    assert f"cannot listen on 127.0.0.1:{box.port}: address already in use" in done.stderr
    assert "hint:" in done.stderr
    assert not box.engine_pids()


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1:9o00"])
def test_an_address_that_is_none_is_wrong_usage(box: Box, address: str) -> None:
    box.write(SimModel("a"))
    done = box.run("--listen", address)
    assert done.returncode == 2
    assert address in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_signal_finds_nothing_left_to_hurry(box: Box) -> None:
    box.write(SimModel("a", "active"))
    with box.daemon() as daemon:
        daemon.ready()
        daemon.process.send_signal(signal.SIGINT)
        daemon.wait_for(lambda message: "STOPPING=1" in message, "STOPPING=1")
        assert daemon.terminate() == 0
        assert "Traceback" not in box.log()


def test_a_second_daemon_on_the_socket_is_refused_and_the_first_goes_on(box: Box) -> None:
    box.write(SimModel("a", "active"))
    with box.daemon() as daemon:
        daemon.ready()
        elsewhere = replace(box, port=free_port())
        done = elsewhere.run("--state-dir", str(box.root / "other"))
        assert done.returncode == 69
        assert str(box.socket) in done.stderr
        assert box.model("a")["phase"] == "awake"


def test_a_second_daemon_on_the_state_directory_is_refused(box: Box) -> None:
    box.write(SimModel("a", "active"))
    with box.daemon() as daemon:
        daemon.ready()
        done = box.run("--socket", str(box.root / "two.sock"), "--listen", "127.0.0.1:0")
        assert done.returncode == 69
        assert str(box.state) in done.stderr
        assert len(box.engine_pids()) == 1


def test_a_missing_binary_is_one_models_trouble_and_not_the_boxes(box: Box) -> None:
    box.write(SimModel("a", "active"), SimModel("b", command="['/no/such/vllm', 'serve']"))
    with box.daemon() as daemon:
        assert "degraded" in daemon.ready()
        broken = box.model("b")
        assert broken["status"] == "error"
        assert "/no/such/vllm" in broken["error"]["message"]
        assert box.model("a")["phase"] == "awake"


def test_a_model_that_never_gets_healthy_is_stepped_over(box: Box) -> None:
    head = (
        "switching: {available_ram_gb: 256, max_retries: 4, health_check_interval_seconds: 0.5}\n"
    )
    stuck = SimModel("stuck", flags=("--sim-imports-s", "100000"))
    box.write(stuck, SimModel("a", "active", engine="start_timeout_s: 15"), head=head)
    with box.daemon() as daemon:
        assert "degraded" in daemon.ready()
        assert "not healthy after 2 s" in box.model("stuck")["error"]["message"]
        assert box.model("a")["phase"] == "awake"


@pytest.mark.parametrize("operation", ["start", "sleep"])
def test_an_engine_that_dies_in_the_bootstrap_does_not_stop_it(box: Box, operation: str) -> None:
    frail = SimModel("frail", flags=("--sim-fault", f"die@{operation}"))
    box.write(frail, SimModel("a", "active"))
    with box.daemon() as daemon:
        daemon.ready()
        assert box.model("a")["status"] in ("active", "sleeping")
        assert box.model("frail")["status"] in ("error", "switching")
        assert "frail failed" in box.log() or "frail is down" in box.log()


def test_killed_engine_comes_back_and_the_story_says_so(box: Box) -> None:
    box.write(SimModel("a", "active"))
    with box.daemon() as daemon:
        daemon.ready()
        (pid,) = box.engine_pids()
        os.kill(pid, signal.SIGKILL)
        daemon.status_line("a starting")
        daemon.status_line("a awake")
        assert "killed by SIGKILL" in box.log()
        assert box.engine_pids() != {pid}


@pytest.mark.parametrize(
    "part", ["starting a", "falling asleep a", "starting b", "falling asleep b", "waking a"]
)
def test_a_stop_in_any_phase_of_the_bootstrap_leaves_nothing(box: Box, part: str) -> None:
    box.speed = 40.0
    box.write(SimModel("a", "active"), SimModel("b"))
    with box.daemon() as daemon:
        daemon.status_line(part)
        assert daemon.terminate() == 0
        assert not box.engine_pids()
        assert not box.socket.exists()


def test_a_killed_daemon_loses_no_engine(box: Box) -> None:
    box.write(SimModel("a", "active"), SimModel("b"))
    with box.daemon() as daemon:
        daemon.ready()
        before = box.engine_pids()
        assert len(before) == 2
        daemon.sweep = False
        daemon.kill()
    with box.daemon() as again:
        assert "READY=1" in again.ready()
        assert box.engine_pids() == before
        assert box.model("a")["phase"] == "awake"
        assert box.model("b")["phase"] == "asleep"
        assert box.ctl("switch", "b").returncode == 0
        assert again.terminate() == 0
        assert not box.engine_pids()


def test_hang_up_reloads_what_changed_and_keeps_the_rest(box: Box) -> None:
    box.write(SimModel("a", "active"), SimModel("b"))
    with box.daemon() as daemon:
        daemon.ready()
        before = box.engine_pids()
        box.write(SimModel("a", "active"), SimModel("c"))
        daemon.process.send_signal(signal.SIGHUP)
        reloading = daemon.wait_for(lambda message: "RELOADING=1" in message, "RELOADING=1")
        assert "MONOTONIC_USEC=" in reloading
        daemon.ready()
        daemon.status_line("c")
        daemon.wait_for(lambda m: "2 models" in m or "1 asleep" in m, "the new fleet")
        assert len(box.engine_pids() & before) == 1


def test_a_bad_file_is_not_reloaded_and_harms_nobody(box: Box) -> None:
    box.write(SimModel("a", "active"))
    with box.daemon() as daemon:
        daemon.ready()
        good = box.config.read_text()
        box.config.write_text("models: 3\n")
        done = box.ctl("reload")
        assert done.returncode != 0
        assert f"{box.config}:1" in done.stderr
        assert box.model("a")["phase"] == "awake"
        box.config.write_text(good)
        assert box.ctl("reload").returncode == 0


def test_a_state_directory_that_cannot_be_written_is_told_of_and_all_runs(box: Box) -> None:
    box.write(SimModel("a", "active"))
    blocked = box.root / "file"
    blocked.write_text("")
    with box.daemon("--state-dir", str(Path(blocked, "below"))) as daemon:
        daemon.ready()
        assert "cannot write state" in box.log()
        assert box.model("a")["phase"] == "awake"


def test_events_tell_the_story_as_it_happens(box: Box) -> None:
    box.write(SimModel("a", "active"), SimModel("b"))
    with box.daemon() as daemon:
        daemon.ready()
        seen: set[str] = set()
        with box.reading_ctl("--json", "events") as events:
            models = itertools.cycle("ba")
            while not {"operation", "phase"} <= seen:  # it may not listen yet
                if select.select([events], [], [], 0)[0]:
                    seen.add(json.loads(events.readline())["kind"])
                else:
                    assert box.ctl("switch", next(models)).returncode == 0


def test_the_demo_brings_its_own_models(box: Box) -> None:
    box.write(SimModel("a", "active"))
    done = box.run("demo", "--config", str(box.config))
    assert done.returncode == 2
    assert "brings its own models" in done.stderr


def test_logs_can_be_followed(box: Box) -> None:
    box.write(SimModel("a", "active"))
    with box.daemon() as daemon:
        daemon.ready()
        with box.reading_ctl("logs", "a", "-n", "1", "-f") as logs:
            assert logs.readline()
            assert box.ctl("stop", "a").returncode == 0
            assert logs.readline()
