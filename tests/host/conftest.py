"""A machine with the built package on it, for all tests that need one."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.lab import roots
from tests.e2e.lab.images import load_engine
from tests.e2e.lab.machine import Machine, booted

REPO = Path(__file__).parents[2]
IMAGE = "docker.io/vllm/vllm-openai:v0.32.0"
# what the package depends on beyond the lab's own base, so that dpkg alone can install it
NEEDS = roots.Layer("needs", ("aardvark-dns", "nftables", "catatonit"), under=roots.BASE)

CONFIG = """\
# a box for tests
gpus:
  - {index: 0, memory_mib: 32607}
  - {index: 1, memory_mib: 32607}
switching:
  available_ram_gb: 128
engine:
  args: {sim-speed: 1000, sim-weights-gb: 4}
models:
  - id: alpha
    gpu_memory_gb: 20
    weights_gb: 4
    startup_mode: active
    engine: {model: /models/alpha}

  # the second
  - id: beta
    gpu_memory_gb: 20
    weights_gb: 4
    engine: {model: /models/beta}
"""


@pytest.fixture(scope="session")
def packaged() -> Iterator[Machine]:
    """Debian 13 with the package installed by dpkg, and the simulated engine's image."""
    if why := roots.why_not():
        if os.environ.get("HOMEGPT_REQUIRE_LAB") == "1":
            pytest.fail(f"HOMEGPT_REQUIRE_LAB=1, but the lab {why}")
        pytest.skip(why)
    built = subprocess.run(["make", "-s", "deb"], cwd=REPO, capture_output=True, check=False)
    assert built.returncode == 0, built.stderr.decode()
    deb = REPO / built.stdout.decode().splitlines()[-1]
    with booted(NEEDS) as machine:
        machine.put(deb, "/root/homegpt.deb")
        machine.run("dpkg", "-i", "/root/homegpt.deb")
        load_engine(machine, IMAGE)
        yield machine


@pytest.fixture
def box(packaged: Machine) -> Iterator[Machine]:
    """The packaged machine with two small models configured, and nothing running."""
    packaged.write("/etc/homegpt/config.yaml", CONFIG)
    yield packaged
    packaged.systemctl("stop", "homegpt", check=False)
    packaged.systemctl("reset-failed", check=False)
    packaged.run("sh", "-c", "rm -rf /etc/containers/systemd/*.d")
    packaged.run("homegptctl", "apply", "--yes", "--files-only", check=False)
