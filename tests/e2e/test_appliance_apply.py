"""From the configuration to units: what `homegptctl apply` does on the box, and what it refuses."""

import json
from urllib.request import urlopen

import pytest

from homegptd.host.quote import lines

from .appliance import CODER, CONFIG, WRITER, Appliance, Sim, configuration
from .client import answer, client
from .lab.images import IMAGE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
RULE = "/etc/polkit-1/rules.d/50-homegpt.rules"
QUADLETS = "/etc/containers/systemd/homegpt"


def _apply(box: Appliance, *, check: bool = True) -> str:
    done = box.ctl("apply", "--yes", check=check)
    return done.out + done.err


def _installed(box: Appliance) -> str:
    """All that `apply` writes."""
    return box.machine.run("sh", "-c", f"cat {QUADLETS}/* {RULE}").out


def test_only_what_changed_is_touched(running: Appliance) -> None:
    before = running.main_pids("coder", "writer")
    running.configure(CODER, Sim("writer", args={"max-model-len": 4096}))
    shown = running.ctl("apply", check=False)
    assert shown.code == 4  # nobody said yes
    assert "+    --max-model-len 4096" in shown.out
    assert running.machine.run("grep", "-r", "4096", QUADLETS, check=False).out == ""
    told = _apply(running)
    assert "changed vllm-writer.service" in told
    assert "homegptd: changed writer" in told
    assert running.main_pids("coder") == {"coder": before["coder"]}
    assert _apply(running).splitlines()[0].startswith("homegptd: nothing changed")


def test_what_podman_would_refuse_changes_nothing(running: Appliance) -> None:
    before, pids = _installed(running), running.main_pids("coder", "writer")
    at = "/etc/containers/systemd/vllm-.container.d/50-all.conf"
    running.machine.write(at, "[Container]\nNoSuchKey=1\n")
    running.configure(CODER, Sim("writer", args={"max-model-len": 4096}))
    assert "unsupported key 'NoSuchKey'" in _apply(running, check=False)
    assert _installed(running) == before
    assert running.main_pids("coder", "writer") == pids


def test_a_drop_in_survives_and_a_unit_by_hand_is_taken_as_it_is(appliance: Appliance) -> None:
    """The one by hand publishes a port, as the original manager's did."""
    machine = appliance.machine
    at = "/etc/containers/systemd/vllm-writer.container.d/90-local.conf"
    machine.write(at, "[Container]\nEnvironment=MINE=1\n")
    hand = (
        f"[Container]\nImage={IMAGE}\nContainerName=by-hand\nPull=never\n"
        "PublishPort=127.0.0.1:8101:8000\nEnvironment=VLLM_SERVER_DEV_MODE=1\nRunInit=true\n"
        "Exec=/models/x --served-model-name byhand --enable-sleep-mode --host 0.0.0.0 "
        "--port 8000 --sim-speed 200 --sim-weights-gb 8 --sim-residue-gb 1\n"
    )
    machine.write("/etc/containers/systemd/by-hand.container", hand)
    machine.systemctl("daemon-reload")
    byhand = (
        "  - {id: byhand, container_name: by-hand, host_port: 8101, gpu_memory_gb: 61, "
        "weights_gb: 8, residue_gb: 1.1}\n"
    )
    appliance.write_config(configuration(CODER, WRITER) + byhand)
    appliance.start()
    assert appliance.phases() == {"coder": "awake", "writer": "asleep", "byhand": "asleep"}
    appliance.ctl("switch", "byhand")
    with urlopen("http://127.0.0.1:8101/v1/models", timeout=5) as told:
        assert b"byhand" in told.read()
    appliance.configure(CODER, Sim("writer", args={"max-model-len": 4096}))
    _apply(appliance)
    appliance.ctl("switch", "writer")
    env = machine.run("podman", "exec", "vllm-writer", "busybox", "env", service=True).out
    assert "MINE=1" in env
    assert machine.read("/etc/containers/systemd/by-hand.container") == hand


def test_a_bad_file_is_told_by_the_daemon_and_the_engines_stay(running: Appliance) -> None:
    pids = running.main_pids("coder", "writer")
    running.write_config(configuration(CODER, Sim("writer", "sleeep")))
    running.systemctl("restart", "homegpt", check=False)
    shown = running.machine.show("homegpt", "ExecMainStatus", "NRestarts", "ActiveState")
    assert shown == {"ExecMainStatus": "78", "NRestarts": "0", "ActiveState": "failed"}
    running.configure(CODER, WRITER)
    running.start()
    assert running.main_pids("coder", "writer") == pids


def test_a_full_disk_leaves_the_units_as_they_were(running: Appliance) -> None:
    machine = running.machine
    before, pids = _installed(running), running.main_pids("coder", "writer")
    keep = f"cp -a {QUADLETS} /root/kept && mount -t tmpfs -o size=64k tmpfs {QUADLETS} && "
    machine.run("sh", "-c", f"{keep} cp -a /root/kept/. {QUADLETS}/ && rm -r /root/kept")
    try:
        machine.run("sh", "-c", f"cat /dev/zero > {QUADLETS}/zeros", check=False)
        running.configure(CODER, WRITER, *(Sim(f"more-{n}") for n in range(3)))
        told = _apply(running, check=False)
        assert "No space left on device" in told, told
        machine.path(f"{QUADLETS}/zeros").unlink()
        assert _installed(running) == before
        assert running.phases() == {"coder": "awake", "writer": "asleep"}
        _apply(running)  # there is room now
        assert "vllm-more-2.service" in machine.read(RULE)
        assert running.main_pids("coder", "writer") == pids
    finally:
        machine.run("umount", "--lazy", QUADLETS)


def test_words_reach_the_engine_as_they_are(appliance: Appliance) -> None:
    machine = appliance.machine
    words = ["--json", '{"a": 1, "b": "c d"}', "--pct", "100% %h", "--var", "$HOME ${PATH} $$"]
    words += ["--slash", "a\\b \\n", "--quotes", "\"a\" 'b'"]
    words += ["--word", "Grüße → ☃", "a;b #", "#", "*"]
    show = "#!/usr/bin/python3\nimport json, sys\njson.dump(sys.argv[1:], open('/out/args', 'w'))\n"
    machine.write("/run/lab-show/show", show, mode=0o755)
    machine.install(
        "quote.container",
        f"[Container]\nImage={IMAGE}\nPull=never\nNetwork=none\nVolume=/run/lab-show:/out\n"
        f"PodmanArgs=--entrypoint=/out/show\nExec={lines(words)}\n",
    )
    machine.run("systemctl", "start", "quote", service=True)
    machine.run("sh", "-c", "until test -s /run/lab-show/args; do sleep 0.05; done", timeout=20)
    assert json.loads(machine.read("/run/lab-show/args")) == words


# ------------------------------------------------------------ a door for each model


async def test_each_model_has_its_old_address(appliance: Appliance) -> None:
    appliance.configure(CODER, Sim("writer", more="host_port: 8002"))
    appliance.start()
    async with client(appliance) as session:
        async with session.get("http://127.0.0.1:8002/v1/models") as told:
            assert [one["id"] for one in (await told.json())["data"]] == ["writer"]
        wish = {"prompt": "hello", "max_tokens": 3}
        async with session.post("http://127.0.0.1:8002/v1/completions", json=wish) as told:
            assert told.status == 200, await told.text()
        assert appliance.phases() == {"coder": "asleep", "writer": "awake"}
        appliance.systemctl("restart", "homegpt")
        async with session.get("http://127.0.0.1:8002/v1/models") as told:
            assert told.status == 200
        assert await answer(session, "coder")


# ------------------------------------------------------------ the doctor


def _findings(box: Appliance) -> dict[str, dict[str, str]]:
    told = json.loads(box.ctl("--json", "doctor", check=False).out)
    return {one["check"]: one for one in told["findings"]}


def test_the_doctor_names_what_mends_each_failure(running: Appliance) -> None:
    found = _findings(running)
    assert all(one["mend"] for one in found.values() if one["verdict"] == "fail")
    sound = {"configuration", "systemd", "podman", "CDI", "ports", "units", "images", "closed"}
    assert {name for name in sound if found[name]["verdict"] != "ok"} == set(), found
    assert found["driver"]["verdict"] == "fail"  # no card here
    assert "vllm-coder" in found["containers"]["said"], found["containers"]
    machine = running.machine
    cdi = machine.path("/etc/cdi/nvidia.yaml")
    cdi.rename(cdi.with_name("nvidia.off"))
    machine.run("chmod", "o+rwx", "/run/homegpt/engines/writer")
    try:
        told = running.ctl("doctor", check=False).out
    finally:
        cdi.with_name("nvidia.off").rename(cdi)
    assert "no specification for nvidia.com/gpu=0" in told
    assert "→ sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml" in told
    assert "/run/homegpt/engines/writer is open to everybody" in told


def test_a_start_without_a_configuration_says_so(appliance: Appliance) -> None:
    machine = appliance.machine
    machine.path(CONFIG).unlink()
    appliance.systemctl("start", "homegpt", check=False)
    shown = machine.show("homegpt", "ExecMainStatus", "NRestarts")
    assert shown == {"ExecMainStatus": "78", "NRestarts": "0"}
    assert "homegptctl doctor" in appliance.ctl("init", "--yes").out
    appliance.ctl("config", "check")
    machine.run("runuser", "-u", "homegpt", "--", "test", "-r", CONFIG)
