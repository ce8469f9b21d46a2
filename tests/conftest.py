"""What a run left out, said at its end: a test that nobody ran shall not pass for one that did."""

import pytest

_LEFT = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    lab = [item for item in items if item.get_closest_marker("lab")]
    if lab:
        stash = lab[0].config.stash
        stash[_LEFT] = stash.get(_LEFT, 0) + len(lab)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if count := terminalreporter.config.stash.get(_LEFT, 0):
        text = (
            f"not run: {count} tests on a machine with systemd and podman; as root: .ci/appliance"
        )
        terminalreporter.write_line(f"{text}, and .venv/bin/pytest tests/e2e/lab")
