"""One box for all clients of a subject: the simulator always; two real vLLM servers on a CPU where
HOMEGPT_REAL_VLLM names their Python. The same tests run against both.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.client import pid_of
from tests.e2e.harness import Box, Running, SimModel

SERVE = Path(__file__).parents[2] / ".ci/real-vllm/serve"
REAL = pytest.param("real", marks=[pytest.mark.real_vllm, pytest.mark.timeout(600)])
SUBJECTS = ["sim", REAL] if os.environ.get("HOMEGPT_REAL_VLLM") else ["sim"]
_TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
_AWAKE_GB = {"a": 60.0, "b": 60.0, "c": 30.0, "embed": 5.0, "ears": 5.0}


@dataclass
class Served:
    """A daemon with its models up, and where its clients go."""

    kind: str
    box: Box
    daemon: Running
    models: tuple[str, ...]
    """Those that generate; only one of the first two is awake at a time."""

    @property
    def is_sim(self) -> bool:
        return self.kind == "sim"

    @property
    def v1(self) -> str:
        return f"{self.box.url}/v1"


def configure_sim(box: Box, *names: str) -> None:
    """Simulated models, which answer to `router.max_waiting` and the like as real ones do."""
    special = {"embed": ("--sim-kind", "embed"), "ears": ("--sim-kind", "audio")}
    models = [
        SimModel(
            name, "active" if name == "a" else "sleep", awake_gb=_AWAKE_GB[name], weights_gb=2.0,
            flags=("--sim-tokens-per-s", "2", *special.get(name, _TOOLS)),
        )
        for name in names
    ]  # fmt: skip
    box.write(*models)
    text = box.config.read_text()
    for name, kind in (("embed", "embed"), ("ears", "audio")):
        before, mine, after = text.partition(f"  - id: {name}\n")
        text = before + mine + after.replace("{command", f"{{kind: {kind}, command", 1)
    box.config.write_text(text)


def configure_real(box: Box, *names: str) -> None:
    python, model = os.environ["HOMEGPT_REAL_VLLM"], os.environ["HOMEGPT_REAL_MODEL"]
    box.config.write_text(
        "gpus: [{index: 0, memory_mib: 81920}]\nswitching: {available_ram_gb: 256}\nmodels:\n"
    )
    for name in names:
        words = ", ".join(f"'{w}'" for w in (SERVE, "{socket}", name, model, *_TOOLS))
        with box.config.open("a") as file:
            file.write(
                f"  - id: {name}\n"
                f"    gpu_memory_gb: 60\n    weights_gb: 8\n"
                f"    startup_mode: {'active' if name == 'a' else 'sleep'}\n"
                f"    engine: {{command: [{words}], env: {{HOMEGPT_REAL_VLLM: '{python}'}}}}\n"
            )


@pytest.fixture(scope="session", params=SUBJECTS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """The tests leave it as they found it, but for which model is awake."""
    root = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    box, sim = Box(root), request.param == "sim"
    models = ("a", "b", "c") if sim else ("a", "b")
    if sim:
        configure_sim(box, *models, "embed", "ears")
    else:
        configure_real(box, *models)
    with box.daemon() as daemon:
        daemon.ready(30.0 if sim else 400.0)
        yield Served(request.param, box, daemon, models)
        assert daemon.terminate() == 0
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def box() -> Iterator[Box]:
    """A box of its own, for tests that do more than ask."""
    root = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    yield Box(root)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def _engines_live_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """No client may cost the box an engine."""
    if "served" not in request.fixturenames:
        yield
        return
    served: Served = request.getfixturevalue("served")
    before = {name: pid_of(served.box, name) for name in served.models} if served.is_sim else {}
    yield
    after = {name: pid_of(served.box, name) for name in before}
    assert after == before
