"""The simulation itself, a few hours of it; `make simulate` runs hundreds."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from .town import BrokenPromise, simulate

ROOT = Path(__file__).parents[2]
FRESH = random.SystemRandom().randrange(2**32)


@pytest.mark.parametrize(
    ("seed", "hours"), [(1, 5.0), (7, 5.0), (42, 5.0), pytest.param(FRESH, 5.0, id="fresh")]
)
def test_every_promise_is_kept(seed: int, hours: float) -> None:
    replay = f"replay with: make simulate SEED={seed} HOURS={hours:g}"
    print(replay)  # for one that does not end
    try:
        result = simulate(seed, hours)
    except BrokenPromise as broken:
        story = "\n".join(broken.tail)
        pytest.fail(f"{story}\n{broken}\n{replay}")
    assert result.count.outcomes["answered"] > 0


def test_a_seed_replays_exactly_whatever_the_hashes_of_strings() -> None:
    told = {_digest(hash_seed) for hash_seed in ("1", "2")}
    assert len(told) == 1


def _digest(hash_seed: str) -> str:
    command = [sys.executable, "-m", "tests.simulation", "--seed", "3", "--hours", "4"]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if line.startswith("digest"))
