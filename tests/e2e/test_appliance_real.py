"""One journey with a real vLLM in a Quadlet container, on the CPU, beside a simulated one.

Its image is the lab's Debian with a compiler; vLLM, its Python and a tiny model are volumes at the
paths where they are outside.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .appliance import Appliance, Sim, beside, real_folders
from .client import answer, client, streamed
from .lab import roots

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.real_vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not os.environ.get("HOMEGPT_REAL_VLLM"), reason="HOMEGPT_REAL_VLLM names no Python"
    ),
]
# torch compiles C++ at run time even with --enforce-eager
COMPILER = roots.Layer("compiler", ("g++", "libnuma1"), under=roots.BASE)
IMAGE = "localhost/homegpt-vllm:1"
PATIENCE_S = 300.0


@pytest.fixture(scope="session")
def real(installed: Appliance) -> Iterator[Sim]:
    """The configuration of a real engine, whose image and files are on the machine."""
    python, model = (Path(os.environ[f"HOMEGPT_REAL_{name}"]) for name in ("VLLM", "MODEL"))
    _import(installed, python)
    volumes = [f"'{inside}:{outside}:ro'" for outside, inside in real_folders().items()]
    env = "VLLM_CPU_KVCACHE_SPACE: '1', HOME: /root"
    args = {"enforce-eager": "true", "max-model-len": 2048, "max-num-seqs": 16,
            "gpu-memory-utilization": 0.1, "no-enable-sleep-mode": "true"}  # fmt: skip
    words = ", ".join(f"{name}: {value}" for name, value in args.items())
    yield Sim(
        "real",
        "active",
        whole=f"{{image: {IMAGE}, model: {model}, args: {{{words}}}, env: {{{env}}}, "
        f"start_timeout_s: {PATIENCE_S:g}, volumes: [{', '.join(volumes)}]}}",
    )
    installed.machine.run("podman", "rmi", "-f", IMAGE)


def _import(box: Appliance, python: Path) -> None:
    name = "/var/lib/containers/image.tar"
    with roots.lent(COMPILER) as root:
        tar = ["tar", "-C", str(root), "--one-file-system", "-cf", str(box.machine.path(name)), "."]
        subprocess.run(tar, check=True, capture_output=True)
    # `vllm serve` asks for the version of the package vllm, which that for CPUs is not called
    serve = f'exec {python} -m vllm.entrypoints.openai.api_server --model "$@"'
    change = f"--change=ENTRYPOINT {json.dumps(['sh', '-c', serve, 'serve'])}"
    box.machine.run("podman", "import", "-q", change, name, IMAGE, timeout=120)
    box.machine.path(name).unlink()


async def test_a_real_vllm_in_a_container(appliance: Appliance, real: Sim) -> None:
    appliance.configure(real, Sim("writer"))
    await beside(lambda: appliance.systemctl("start", "homegpt", timeout=PATIENCE_S))
    told = appliance.ctl("logs", "real").out[-3000:]
    assert appliance.phases() == {"real": "awake", "writer": "asleep"}, told
    unit = appliance.machine.read("/etc/containers/systemd/homegpt/vllm-real.container")
    assert "DropCapability=all" in unit
    assert '{"timestamp"' in told  # vllm-logging.json is what it logs by
    async with client(appliance, PATIENCE_S) as session:
        text = await answer(session, "real")
        before = appliance.main_pids("real")
        assert await answer(session, "writer")
        assert appliance.phases() == {"real": "asleep", "writer": "awake"}
        assert await answer(session, "real") == text
        assert await streamed(session, "real", 200)
    assert appliance.main_pids("real") == before
    await beside(appliance.systemctl, "restart", "homegpt")
    assert appliance.main_pids("real") == before
    await beside(appliance.systemctl, "stop", "homegpt")
    assert appliance.containers() == set()
