"""How hard to look: `HYPOTHESIS_PROFILE=quick|ci|night pytest tests/properties`."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
}
# The same examples each time, so that a red build is the change's doing; `night` seeks new ones.
_FIXED = {**_COMMON, "derandomize": True, "database": None}
settings.register_profile("quick", max_examples=60, stateful_step_count=40, **_FIXED)
settings.register_profile("ci", max_examples=400, stateful_step_count=60, **_FIXED)
settings.register_profile("night", max_examples=10_000, stateful_step_count=100, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The limit of a single example is none for hundreds of them."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(600))
