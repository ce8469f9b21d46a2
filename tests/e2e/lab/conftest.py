"""Machines for tests. Marked e2e; skipped where this box cannot run them.

HOMEGPT_REQUIRE_LAB=1 makes a skip a failure, for builds that must not pass without.
"""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from . import roots
from .images import load_engine
from .machine import Machine, booted

HERE = Path(__file__).parent
LAB_S = 120
WATCHED = pytest.StashKey[tuple[Machine, str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.lab)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(LAB_S, func_only=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails tells what the machine's journal says of it."""
    report = yield
    machine, since = item.stash.get(WATCHED, (None, ""))
    if report.failed and machine is not None:
        lines = [f"{e.get('_COMM', '?')}: {e['MESSAGE']}" for e in machine.journal(since=since)]
        report.sections.append(("the machine's journal", "\n".join(lines[-60:])))
    return report


@pytest.fixture(scope="session")
def can_boot() -> None:
    """Skips, or fails, where no machine can be had; builds its root at the first time (75 s)."""
    if why := roots.why_not():
        if os.environ.get("HOMEGPT_REQUIRE_LAB") == "1":
            pytest.fail(f"HOMEGPT_REQUIRE_LAB=1, but the lab {why}")
        pytest.skip(why)
    roots.prepare(roots.BASE)


@pytest.fixture(scope="session")
def shared_machine(can_boot: None) -> Iterator[Machine]:
    """Booted once, with the simulated engine's image and the user homegpt."""
    with booted() as machine:
        load_engine(machine)
        machine.run("useradd", "--system", "--no-create-home", "homegpt")
        yield machine


@pytest.fixture
def machine(request: pytest.FixtureRequest, shared_machine: Machine) -> Iterator[Machine]:
    """The shared machine, as it was after its boot."""
    request.node.stash[WATCHED] = (shared_machine, shared_machine.mark())
    yield shared_machine
    shared_machine.reset()


@pytest.fixture
def fresh_machine(can_boot: None) -> Iterator[Machine]:
    """A machine that no other test has touched: about a second, without the engine's image."""
    with booted() as machine:
        yield machine


@pytest.fixture
def clean_machine(can_boot: None) -> Iterator[Machine]:
    """Debian as just installed: no podman, no Python. `run(..., online=True)` reaches mirrors."""
    with booted(roots.CLEAN) as machine:
        yield machine
