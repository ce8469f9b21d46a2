"""The two subjects. The real one joins when HOMEGPT_REAL_VLLM names its Python; `.ci/contract`
makes one and runs everything. Where the two differ, the simulator is wrong."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.contract.subjects import SHARED, Client, Server, running, start

REAL = pytest.param("real", marks=[pytest.mark.real_vllm, pytest.mark.timeout(300)])
SUBJECTS = ["sim", REAL] if os.environ.get("HOMEGPT_REAL_VLLM") else ["sim"]


def pytest_report_header() -> str:
    if len(SUBJECTS) == 2:
        return "contract: the simulator and a real vLLM"
    return "contract: the simulator alone (.ci/contract tries a real vLLM too)"


@pytest.fixture(scope="session", params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def shared_server(subject: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as they found it."""
    with running(subject, tmp_path_factory.mktemp(subject), SHARED) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """Awake before, and awake and alive again after."""
    yield shared_server
    assert shared_server.process.poll() is None, shared_server.tail()
    shared_server.blocking("POST", "/wake_up")
    shared_server.blocking("POST", "/wake_up?tags=scheduling")


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server)


@pytest.fixture
def launch(subject: str, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of one's own, for tests that end them; `ready=False` does not wait."""
    with ExitStack() as stack:

        def launched(*flags: str, ready: bool = True, **env: str) -> Server:
            server = start(subject, tmp_path, flags, env)
            stack.callback(server.end)
            if ready:
                server.wait_until_ready(20 if subject == "sim" else 240)
            return server

        yield launched
