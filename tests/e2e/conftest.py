"""A box of its own for each test; short paths, since a Unix socket's name is."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .appliance import appliance, installed, running
from .harness import Box

__all__ = ["appliance", "installed", "running"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith("test_appliance"):
            item.add_marker(pytest.mark.lab)


@pytest.fixture
def box() -> Iterator[Box]:
    root = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    yield Box(root)
    shutil.rmtree(root, ignore_errors=True)
