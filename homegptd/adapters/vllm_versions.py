"""What each release of vLLM can be trusted with. A table and a look-up, nothing else.

The rows come from reading the releases 0.11 to 0.33 side by side (`v1/engine/core.py`,
`v1/executor/abstract.py`, `device_allocator/cumem.py`, `entrypoints/serve/dev/sleep`).
"""

import re
from dataclasses import dataclass

from homegptd.core.model import SleepLevel


@dataclass(frozen=True, slots=True)
class Profile:
    """From release `since` on; every later row has what the earlier ones have."""

    since: tuple[int, int]
    sleeps: bool = True
    """Has /sleep, /wake_up?tags= and /collective_rpc in the form used here (0.11+)."""
    sleep_modes: bool = False
    """`mode=abort|wait|keep`; sleep pauses the scheduler, requests to a sleeper queue (0.17+).

    Before, a request that runs or arrives during sleep kills the engine (vllm#15483, #28714).
    """
    safe_partial_wake: bool = False
    """`/wake_up?tags=weights` leaves the scheduler paused (0.24+, vllm#44395)."""
    idempotent_wake: bool = False
    """A wake that ran out of memory may be asked for again (0.29+)."""
    takes_back: bool = False
    """/sleep takes back an engine whose weights alone are awake: the executor keeps tags (0.31+).

    Before, such an engine counts as asleep and nothing happens.
    """
    json_bodies: bool = False
    """/sleep and /wake_up say in JSON what they did (0.32+); before, bodies are empty."""

    @property
    def levels(self) -> frozenset[SleepLevel]:
        """Both, even before 0.24: nothing is sent to an engine in the middle of its wake."""
        return frozenset(SleepLevel) if self.sleeps else frozenset()

    @property
    def dies_of_sleep_under_load(self) -> bool:
        return self.sleeps and not self.sleep_modes


TOO_OLD = Profile((0, 0), sleeps=False)
PROFILES = (
    TOO_OLD,
    Profile((0, 11)),
    Profile((0, 17), sleep_modes=True),
    Profile((0, 24), sleep_modes=True, safe_partial_wake=True),
    Profile((0, 29), sleep_modes=True, safe_partial_wake=True, idempotent_wake=True),
    Profile(
        (0, 31),
        sleep_modes=True,
        safe_partial_wake=True,
        idempotent_wake=True,
        takes_back=True,
    ),
    Profile(
        (0, 32),
        sleep_modes=True,
        safe_partial_wake=True,
        idempotent_wake=True,
        takes_back=True,
        json_bodies=True,
    ),
)


def profile_of(version: str) -> Profile:
    """The row for a version as /version tells it: `0.32.0`, `0.33.1rc2.dev7+gabc`, `0.29.0+cpu`.

    What is newer than the table, or no number at all (a build from a branch), gets the newest row.
    """
    number = re.match(r"v?(\d+)\.(\d+)", version)
    if number is None:
        return PROFILES[-1]
    release = (int(number[1]), int(number[2]))
    return [row for row in PROFILES if row.since <= release][-1]
