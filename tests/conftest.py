"""What a run left out, said at its end: a test that nobody ran shall not pass for one that did.

And what tests need to run in several processes (pytest-xdist), see `make test`.
"""

from collections.abc import Generator
from typing import Any

import pytest

_LEFT = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    lab = [item for item in items if item.get_closest_marker("lab")]
    if lab:
        stash = lab[0].config.stash
        stash[_LEFT] = stash.get(_LEFT, 0) + len(lab)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """pytest-xdist: each worker selects among all tests, and the controller alone has a voice."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left"] = session.config.stash.get(_LEFT, 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was logged goes from the worker to the controller as UTF-8, surrogates too."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_LEFT] = getattr(node, "workeroutput", {}).get("left", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if count := terminalreporter.config.stash.get(_LEFT, 0):
        text = (
            f"not run: {count} tests on a machine with systemd and podman; as root: .ci/appliance"
        )
        terminalreporter.write_line(f"{text}, and .venv/bin/pytest tests/e2e/lab")
