"""The memory of a simulated box, read from the file that its engines share.

What `python -m homegptd.sim card FILE` makes; nothing of the simulator is imported.
"""

import json
import logging
from pathlib import Path
from typing import Any

from homegptd.core.memory import Card, Gpu

from .meter import Reading, User

log = logging.getLogger(__name__)


class CardFile:
    """Fits `CardSource`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def read(self) -> Reading | None:
        """The file is replaced atomically, so no lock is needed to read it whole."""
        try:
            return _reading(json.loads(self._path.read_text()))
        except (OSError, ValueError, KeyError) as error:
            log.warning("cannot read the simulated card %s: %s", self._path, error)
            return None


def _reading(box: Any) -> Reading:
    used: dict[Gpu, int] = {Gpu(int(gpu)): 0 for gpu in box["gpu_total_mib"]}
    users: list[User] = []
    host: dict[int, int] = {}
    taken = 0
    for owner, held in box["holdings"].items():
        pid, name = _who(owner)
        if pid and not Path(f"/proc/{pid}").exists():
            continue  # dropped from the file when somebody writes it the next time
        mine = held["pinned_mib"] + held["host_mib"]
        taken += mine
        host[pid] = host.get(pid, 0) + mine
        for gpu, mib in held["gpu_mib"].items():
            used[Gpu(int(gpu))] += mib
            users.append(User(pid, Gpu(int(gpu)), mib, name))
    cards = {
        Gpu(int(gpu)): Card(f"simulated {gpu}", total, used[Gpu(int(gpu))])
        for gpu, total in box["gpu_total_mib"].items()
    }
    return Reading(cards, tuple(users), host, box["ram_total_mib"] - taken)


def _who(owner: str) -> tuple[int, str]:
    if owner.startswith("foreign:"):
        return 0, owner.removeprefix("foreign:")
    return int(owner.partition(":")[0]), ""
