"""`systemctl start homegpt` on a box where the package was installed, and what goes wrong there."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from .appliance import CODER, WEBUI, WRITER, Appliance, Sim, beside, meanwhile, until
from .client import answer, call, client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def _health(box: Appliance) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{box.url}/health", timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_start_returns_when_all_models_were_brought_up_in_order(appliance: Appliance) -> None:
    appliance.start()
    assert appliance.phases() == {"coder": "awake", "writer": "asleep"}
    assert appliance.show("homegpt", "StatusText").startswith("ready: coder awake, 1 asleep")
    told = appliance.story()
    order = ["coder is starting", "coder is asleep", "writer is starting", "writer is asleep",
             "coder is waking", "coder is awake", "ready: 2 models", "Started homegpt"]  # fmt: skip
    places = [next(at for at, line in enumerate(told) if line.startswith(o)) for o in order]
    assert places == sorted(places)
    assert _health(appliance)[0] == 200


def test_the_daemon_knows_from_which_image_an_engine_runs(running: Appliance) -> None:
    asked = ("podman", "inspect", "--format={{.ImageDigest}}", "vllm-coder")
    digest = running.machine.run(*asked).out.strip()
    (coder, _) = json.loads(running.ctl("--json", "memory").out)["models"]
    assert coder["measured_with"].endswith(f" ({digest})")


async def test_both_doors_answer_while_the_models_load(appliance: Appliance) -> None:
    slow = {"sim-imports-s": 400}  # 2 s each
    appliance.configure(Sim("coder", "active", slow), Sim("writer", "sleep", slow))
    async with meanwhile(appliance.start) as start:
        await until(appliance.socket_answers)
        await until(lambda: beside(_status_says, appliance, "starting coder"))
        assert (await call(appliance, "status"))["phase_of_daemon"] == "bootstrap"
        code, body = await beside(_health, appliance)
        assert code == 503
        assert "coder" in str(body["summary"])
        assert body["models"]["coder"] in {"switching", "stopped"}
        assert appliance.show("homegpt", "ActiveState") == "activating"
        await until(lambda: beside(_status_says, appliance, "writer"))
        assert not start.done()
    assert _health(appliance)[0] == 200


async def test_a_request_during_the_bootstrap_waits_and_is_answered(appliance: Appliance) -> None:
    appliance.configure(Sim("coder", "active", {"sim-imports-s": 400}), WRITER)
    async with meanwhile(appliance.start), client(appliance) as session:
        await until(appliance.socket_answers)
        assert await answer(session, "coder")


def test_a_bootstrap_may_take_longer_than_systemds_patience(appliance: Appliance) -> None:
    appliance.machine.write(
        "/etc/systemd/system/homegpt.service.d/90-brief.conf", "[Service]\nTimeoutStartSec=4\n"
    )
    appliance.machine.systemctl("daemon-reload")
    slow = {"sim-imports-s": 800}  # 4 s each
    appliance.configure(Sim("coder", "active", slow), Sim("writer", "sleep", slow))
    began = time.monotonic()
    appliance.start()
    assert time.monotonic() - began > 8
    assert appliance.show("homegpt", "NRestarts") == "0"


def test_open_webui_starts_after_ready_and_reaches_the_daemon(appliance: Appliance) -> None:
    appliance.configure(CODER, head=f"webui: {{enabled: true, image: '{WEBUI}'}}\n")
    appliance.start()
    assert _until_active(appliance, "open-webui")
    entered = [int(appliance.show(unit, "ActiveEnterTimestampMonotonic"))
               for unit in ("homegpt", "open-webui")]  # fmt: skip
    assert entered[0] < entered[1]
    ask = (
        "import os, urllib.request as u;"
        "print(u.urlopen(os.environ['OPENAI_API_BASE_URLS'] + '/models', timeout=5).read())"
    )
    words = ("podman", "exec", "open-webui", "python3", "-c", ask)
    assert "coder" in appliance.machine.run(*words, service=True).out
    shown = appliance.machine.run("podman", "secret", "inspect", "--showsecret", "homegpt-webui")
    secret = json.loads(shown.out)[0]["SecretData"]
    assert len(secret) == 44
    assert secret not in appliance.machine.run("podman", "inspect", "open-webui").out
    appliance.systemctl("stop", "homegpt")


def test_a_model_without_its_image_is_one_lasting_fault_that_names_it(appliance: Appliance) -> None:
    appliance.configure(CODER, Sim("writer", engine="image: 'localhost/no-such:1'"))
    appliance.start()
    broken = appliance.model("writer")
    assert broken["status"] == "error"
    assert "no-such:1" in broken["error"]["message"]
    assert appliance.model("coder")["phase"] == "awake"
    starts = [line for line in appliance.story() if line.startswith("writer is starting")]
    assert len(starts) == 1


def test_what_podman_cannot_run_is_not_tried_again(appliance: Appliance) -> None:
    appliance.configure(CODER, Sim("writer", engine="volumes: ['/no/such/folder:/data']"))
    appliance.start()
    broken = appliance.model("writer")
    assert "/no/such/folder" in broken["error"]["message"]
    assert len([s for s in appliance.story() if s.startswith("writer is starting")]) == 1


def test_a_configuration_with_errors_ends_with_78_and_is_told_whole(appliance: Appliance) -> None:
    appliance.write_config("models:\n  - id: a\n    gpu_memory_gb: lots\n  - idd: b\nroutr: 3\n")
    done = appliance.systemctl("start", "homegpt", check=False)
    assert done.code != 0
    shown = appliance.machine.show("homegpt", "ExecMainStatus", "NRestarts", "ActiveState")
    assert shown == {"ExecMainStatus": "78", "NRestarts": "0", "ActiveState": "failed"}
    told = "\n".join(appliance.story())
    for problem in (":3: models[a].gpu_memory_gb", ":4: models[1]", ":5: routr"):
        assert problem in told


def test_stop_frees_everything(running: Appliance) -> None:
    running.systemctl("stop", "homegpt")
    assert running.containers() == set()
    left = running.machine.run("systemctl", "list-units", "--no-legend", "vllm-*.service").out
    assert left == ""
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{running.url}/health", timeout=5)


async def test_stop_amid_the_bootstrap_frees_everything(appliance: Appliance) -> None:
    appliance.configure(Sim("coder", "active", {"sim-imports-s": 2000}), WRITER)
    appliance.systemctl("start", "--no-block", "homegpt")
    await until(lambda: beside(_status_says, appliance, "coder"))
    began = time.monotonic()
    await beside(appliance.systemctl, "stop", "homegpt")
    assert time.monotonic() - began < 15
    assert appliance.containers() == set()


def _status_says(box: Appliance, word: str) -> bool:
    return word in box.show("homegpt", "StatusText")


def _until_active(box: Appliance, unit: str) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if box.show(unit, "ActiveState") == "active":
            return True
    return False
