"""The package on a real Debian with a real systemd and a real Podman."""

import json
import re

import pytest

from homegptd.host.quote import lines
from tests.e2e.lab.machine import Machine

from .conftest import CONFIG, IMAGE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
RULE = "/etc/polkit-1/rules.d/50-homegpt.rules"
CONF = "/etc/homegpt/config.yaml"


def status(box: Machine) -> dict[str, str]:
    told = json.loads(box.run("homegptctl", "status", "--json").out)
    return {model["id"]: model["status"] for model in told["models"]}


def test_one_start_brings_up_everything(box: Machine) -> None:
    box.systemctl("start", "homegpt")
    assert status(box) == {"alpha": "active", "beta": "sleeping"}
    for name in ("alpha", "beta"):
        folder = f"/run/homegpt/engines/{name}"
        told = box.run("stat", "-c", "%A %U:%G", folder, f"{folder}/engine.sock").out
        assert told == "drwxr-s--- root:homegpt\nsrwxrwx--- root:homegpt\n"
    box.systemctl("stop", "homegpt")
    assert box.run("podman", "ps", "-q").out == ""


def test_the_sandbox_is_tight(box: Machine) -> None:
    told = box.run("systemd-analyze", "security", "--no-pager", "homegpt.service").out
    found = re.search(r"exposure level for homegpt.service: ([\d.]+)", told)
    assert found is not None
    assert float(found[1]) <= 1.5


def test_the_daemons_user_gets_no_further_than_its_units(box: Machine) -> None:
    box.systemctl("start", "homegpt")

    def tried(*argv: str) -> int:
        return box.run("runuser", "-u", "homegpt", "--", *argv, check=False).code

    assert tried("systemctl", "stop", "vllm-beta.service") == 0
    assert tried("systemd-run", "--unit=vllm-evil", "id") != 0
    assert tried("systemd-run", "--unit=vllm-beta", "id") != 0
    assert tried("systemctl", "restart", "polkit") != 0
    assert tried("systemctl", "daemon-reload") != 0
    assert tried("systemctl", "set-property", "vllm-beta.service", "MemoryMax=1G") != 0
    assert tried("mv", "/run/homegpt/engines", "/run/homegpt/other") != 0
    assert tried("ln", "-s", "/etc", "/run/homegpt/engines/evil") != 0
    assert tried("test", "-w", CONF) != 0
    assert tried("test", "-w", "/etc/containers/systemd/homegpt") != 0


def test_a_listed_unit_whose_file_is_void_is_no_way_to_root(box: Machine) -> None:
    box.run("homegptctl", "apply", "--yes", "--files-only")
    assert "vllm-beta.service" in box.read(RULE)
    at = "/etc/containers/systemd/vllm-beta.container.d/90-local.conf"
    box.write(at, "[Container]\nNoSuchKey=1\n")
    box.systemctl("daemon-reload")
    assert not box.path("/run/systemd/generator/vllm-beta.service").exists()
    words = ("runuser", "-u", "homegpt", "--", "systemd-run", "--unit=vllm-beta", "id")
    done = box.run(*words, check=False)
    assert done.code != 0
    assert "authentication required" in done.err
    box.run("homegptctl", "apply", "--yes", "--files-only")
    assert "vllm-beta.service" not in box.read(RULE)


def test_what_podman_would_refuse_changes_nothing(box: Machine) -> None:
    box.run("homegptctl", "apply", "--yes", "--files-only")
    before = box.run("sh", "-c", f"cat /etc/containers/systemd/homegpt/* {RULE}").out
    at = "/etc/containers/systemd/vllm-.container.d/50-all.conf"
    box.write(at, "[Container]\nNoSuchKey=1\n")
    box.write(CONF, CONFIG.replace("/models/beta", "/models/gamma"))
    done = box.run("homegptctl", "apply", "--yes", "--files-only", check=False)
    assert done.code == 1
    assert "unsupported key 'NoSuchKey'" in done.err
    assert box.run("sh", "-c", f"cat /etc/containers/systemd/homegpt/* {RULE}").out == before


def test_a_bad_file_fails_the_reload_and_the_start_with_its_reason(box: Machine) -> None:
    box.systemctl("start", "homegpt")
    pids = box.run("podman", "ps", "-q").out
    box.write(CONF, CONFIG.replace("active", "actve"))
    since = box.mark()
    assert box.run("systemctl", "reload", "homegpt", check=False).code == 1
    said = [entry["MESSAGE"] for entry in box.journal("-u", "homegpt", since=since)]
    assert any('found "actve"' in line for line in said)
    assert status(box) == {"alpha": "active", "beta": "sleeping"}
    box.run("systemctl", "restart", "homegpt", check=False)
    shown = box.show("homegpt", "ExecMainStatus", "NRestarts", "ActiveState")
    assert shown == {"ExecMainStatus": "78", "NRestarts": "0", "ActiveState": "failed"}
    box.write(CONF, CONFIG)
    box.systemctl("start", "homegpt")
    assert box.run("podman", "ps", "-q").out == pids


def test_a_model_is_added_and_removed_by_one_command_each(box: Machine) -> None:
    box.systemctl("start", "homegpt")
    words = ("--gpu-memory-gb", "20", "--arg", "max-model-len=4096", "--no-pull", "--yes")
    box.run("homegptctl", "add", "/models/gamma", *words)
    box.run("homegptctl", "start", "gamma")
    assert status(box)["gamma"] in {"sleeping", "active", "switching"}  # its first sleep
    box.run("homegptctl", "remove", "gamma", "--yes")
    assert "gamma" not in status(box)
    assert box.read(CONF) == CONFIG
    assert "gamma" not in box.read(RULE)
    assert not box.path("/etc/containers/systemd/homegpt/vllm-gamma.container").exists()
    assert "gamma" not in box.run("podman", "ps").out


def test_words_reach_the_engine_as_they_are(box: Machine) -> None:
    words = ["--json", '{"a": 1, "b": "c d"}', "--pct", "100% %h", "--var", "$HOME ${PATH} $$"]
    words += [
        "--slash",
        "a\\b \\n",
        "--quotes",
        "\"a\" 'b'",
        "--word",
        "Grüße → ☃",
        "a;b #",
        "#",
        "*",
    ]
    show = "#!/usr/bin/python3\nimport json, sys\njson.dump(sys.argv[1:], open('/out/args', 'w'))\n"
    box.write("/run/lab-show/show", show, mode=0o755)
    box.install(
        "quote.container",
        f"[Container]\nImage={IMAGE}\nPull=never\nNetwork=none\nVolume=/run/lab-show:/out\n"
        f"PodmanArgs=--entrypoint=/out/show\nExec={lines(words)}\n",
    )
    try:
        box.run("systemctl", "start", "quote", service=True)
        box.run("sh", "-c", "until test -s /run/lab-show/args; do sleep 0.05; done", timeout=20)
        assert json.loads(box.read("/run/lab-show/args")) == words
    finally:
        box.path("/etc/containers/systemd/homegpt/quote.container").unlink()
        box.systemctl("daemon-reload")


def test_the_doctor_names_what_mends_each_failure(box: Machine) -> None:
    box.run("homegptctl", "apply", "--yes", "--files-only")
    told = json.loads(box.run("homegptctl", "doctor", "--json", check=False).out)
    found = {one["check"]: one for one in told["findings"]}
    assert all(one["mend"] for one in told["findings"] if one["verdict"] == "fail")
    for name in ("configuration", "systemd", "podman", "CDI", "ports", "units", "images", "closed"):
        assert found[name]["verdict"] == "ok", found[name]
    assert found["driver"]["verdict"] == "fail"  # no card here
    box.path("/etc/cdi/nvidia.yaml").rename(box.path("/etc/cdi/nvidia.off"))
    try:
        told = box.run("homegptctl", "doctor", check=False).out
    finally:
        box.path("/etc/cdi/nvidia.off").rename(box.path("/etc/cdi/nvidia.yaml"))
    assert "no specification for nvidia.com/gpu=0" in told
    assert "→ sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml" in told


def test_engines_that_others_could_reach_are_found(box: Machine) -> None:
    box.systemctl("start", "homegpt")
    box.run("chmod", "o+rwx", "/run/homegpt/engines/beta")
    told = box.run("homegptctl", "doctor", check=False).out
    assert "/run/homegpt/engines/beta is open to everybody" in told


def test_a_start_without_a_configuration_says_so(box: Machine) -> None:
    box.path(CONF).unlink()
    box.run("systemctl", "start", "homegpt", check=False)
    assert box.show("homegpt", "ExecMainStatus", "NRestarts") == {
        "ExecMainStatus": "78",
        "NRestarts": "0",
    }
    proposed = box.run("homegptctl", "init", "--yes").out
    assert "homegptctl doctor" in proposed
    assert box.run("homegptctl", "config", "check").code == 0
    box.run("runuser", "-u", "homegpt", "--", "test", "-r", CONF)
