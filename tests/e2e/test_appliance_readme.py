"""README's "On a server", word for word, on a box with a card; and a model in one command.

The card, its tool and the hub are stand-ins: there are none here. Without a driver's library
`doctor --gpu` measures nothing and says so; what it measures is shown on a simulated card.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .appliance import CONFIG, Appliance, Sim
from .lab.images import IMAGE
from .lab.machine import REPO
from .lab.registry import registry

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]
VLLM = "docker.io/vllm/vllm-openai:v0.32.0"
TOKEN = "hf_whisper-0987654321"
HUB = Path(__file__).parent / "lab/hub.py"
SMI = Path(__file__).parent / "lab/nvidia-smi"
EXAMPLE = "Qwen/Qwen3-8B"


@pytest.fixture
def box(appliance: Appliance) -> Iterator[Appliance]:
    """With a card and a driver, vLLM's image, and the configuration that the package brings."""
    machine = appliance.machine
    machine.put(SMI, "/usr/bin/nvidia-smi")
    machine.put(SMI, "/root/image/usr/bin/nvidia-smi")
    machine.put(HUB, "/root/image/opt/huggingface_hub/__init__.py")
    machine.run("podman", "create", "-q", "--name=made", IMAGE, "x")
    machine.run("podman", "cp", "/root/image/.", "made:/")
    machine.run("podman", "commit", "-q", "made", VLLM)
    machine.run("podman", "rm", "made")
    machine.write(CONFIG, machine.read("/usr/share/homegpt/config.yaml"))
    yield appliance
    appliance.systemctl("stop", "homegpt")
    machine.run("podman", "rmi", VLLM)
    machine.path("/usr/bin/nvidia-smi").unlink()
    machine.run("sh", "-c", "rm -rf /root/image /var/cache/homegpt/hf/*")


def _steps() -> list[list[str]]:
    """The commands of that section after the installation."""
    text = (REPO / "README.md").read_text().partition("## On a server")[2]
    block = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[0]
    rows = [row.partition("#")[0].split() for row in block.splitlines()]
    assert rows[0][:2] == ["make", "deb"]
    return [[word for word in row if word != "sudo"] for row in rows[1:]]


def test_the_steps_of_readme_lead_to_models_that_answer(box: Appliance) -> None:
    machine = box.machine
    seen = []
    for words in _steps():
        yes = ["--yes"] if words[1:2] in (["init"], ["apply"], ["add"]) else []
        done = machine.run(*words, *yes, service=True, timeout=120, check=words[1] != "doctor")
        seen.append((words[1], done.out))
        if words[1] == "init":
            _quicken(box)
    told = dict(seen)
    assert f"fetched {EXAMPLE}" in told["pull"]
    assert "GPU 0" not in told["doctor"]  # that is for doctor --gpu
    assert box.phases() == {"qwen3-8b": "awake", "qwen3-4b": "asleep"}
    assert "Qwen3-4B" in machine.read(CONFIG)
    assert "qwen3-8b" in told["-u"]  # journalctl


def _quicken(box: Appliance) -> None:
    """The proposal, with engines that load at once: they are simulated."""
    text = box.machine.read(CONFIG)
    assert "memory_mib: 81559" in text
    quick = "sim-speed: 1000, sim-weights-gb: 8, sim-residue-gb: 1"
    box.write_config(
        text.replace("args: {enable-sleep-mode: true}", f"args: {{{quick}}}")
        .replace("  available_ram_gb: ", "  available_ram_gb: 10")
        .replace("webui:\n  enabled: true", "webui:\n  enabled: false")
    )  # fmt: skip


def test_a_model_is_fetched_with_its_token_and_shown_nowhere(box: Appliance) -> None:
    """`add`: download, unit, asleep; and `remove` undoes all but the weights."""
    machine = box.machine
    box.write_config(
        "# mine\ngpus: [{index: 0, memory_mib: 81559}]\nsecrets: {hf_token: hf}\n"
        "switching: {available_ram_gb: 256}\n"
        "engine:\n  args: {sim-speed: 1000, sim-weights-gb: 8, sim-residue-gb: 1}\n"
        "models:\n  - {id: first, gpu_memory_gb: 60, engine: {model: /models/first}}  # mine\n"
    )
    before = machine.read(CONFIG)
    machine.run("podman", "secret", "create", "--replace", "hf", "-", stdin=TOKEN)
    box.start()
    done = machine.run("homegptctl", "add", EXAMPLE, "--yes", service=True)
    assert "weights 14.9" in done.out  # as its name tells, since the cache does not know it yet
    assert f"fetched {EXAMPLE}" in done.out
    assert machine.read("/var/cache/homegpt/hf/token-seen") == TOKEN  # by the stand-in
    machine.path("/var/cache/homegpt/hf/token-seen").unlink()
    assert box.phases()["qwen3-8b"] == "asleep"
    shown = [
        "journalctl --no-pager",
        "cat /proc/[0-9]*/cmdline",
        f"grep -r . {CONFIG} /etc/containers",
    ]
    for words in shown:
        assert TOKEN not in machine.run("sh", "-c", words, check=False).out, words
    machine.run("homegptctl", "remove", "qwen3-8b", "--yes")
    assert machine.read(CONFIG) == before
    assert box.phases() == {"first": "asleep"}
    assert machine.path("/var/cache/homegpt/hf/hub/models--Qwen--Qwen3-8B/refs/main").exists()
    machine.run("podman", "secret", "rm", "hf")


def test_an_image_is_pulled_with_its_progress_in_sight(box: Appliance) -> None:
    """From a registry in this test's own thread, as `podman save` lays one out."""
    machine = box.machine
    machine.run("podman", "save", "-q", "--format=oci-dir", "-o", "/root/oci", VLLM)
    name = "127.0.0.1:5000/lab/vllm:1"
    conf = "/etc/containers/registries.conf.d/lab.conf"
    machine.write(conf, '[[registry]]\nlocation = "127.0.0.1:5000"\ninsecure = true\n')
    box.configure(Sim("coder", "active", engine=f"image: '{name}'"))
    try:
        with registry(machine.path("/root/oci")):
            terminal = ("script", "-qec", "homegptctl pull coder", "/dev/null")
            told = machine.run(*terminal, service=True, env={"TERM": "xterm"}).out
        assert re.search(rf"{name}: .*\d of \d layers", told), told
        assert f"fetched {name}" in told
        box.start()
        assert box.phases() == {"coder": "awake"}
        box.systemctl("stop", "homegpt")
    finally:
        machine.path(conf).unlink()
        machine.run("sh", "-c", f"rm -rf /root/oci; podman rmi {name}", check=False)


def test_the_doctor_looks_inside_containers_and_says_that_nothing_measures(box: Appliance) -> None:
    machine = box.machine
    box.write_config(
        "gpus: [{index: 0, memory_mib: 81559}]\n"
        "engine:\n  args: {sim-speed: 1000, sim-weights-gb: 8, sim-residue-gb: 1}\n"
        "models:\n"
        "  - {id: one, gpu_memory_gb: 60, weights_gb: 8, engine: {model: /models/one}}\n"
        "  - {id: two, gpu_memory_gb: 60, weights_gb: 8, engine: {model: /models/two}}\n"
    )
    box.start()
    words = ("homegptctl", "--json", "doctor", "--gpu", "--yes")
    told = json.loads(machine.run(*words, service=True, check=False).out)
    found = {one["check"]: one for one in told["findings"]}
    assert found["GPU 0 inside"]["verdict"] == "ok", found["GPU 0 inside"]
    assert found["VRAM"]["said"] == "80 GB on 1 GPUs"
    assert found["memory limits"]["verdict"] == "warn"  # none in this lab
    (driver,) = told["gpu"]
    assert (driver["model"], driver["verdict"]) == ("driver", "fail")
    assert "no driver" in driver["said"]
    cdi = machine.read("/etc/cdi/nvidia.yaml")
    machine.write("/etc/cdi/nvidia.yaml", cdi.replace("GPU-lab-0", "GPU-lab-1"))
    try:
        done = machine.run("homegptctl", "doctor", "--gpu", "--yes", service=True, check=False)
    finally:
        machine.write("/etc/cdi/nvidia.yaml", cdi)
    assert "sees GPU-lab-1 instead" in done.out
    assert done.code == 1
