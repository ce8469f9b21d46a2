"""`doctor`: what is wrong with this box, and the command that mends it."""

from __future__ import annotations

import os

from .asked import Stop
from .host import FAILED, daemon_runs, host, need_root
from .host import places as host_places
from .render import clean, out, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .asked import Asked

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def run(asked: Asked) -> int:
    """Exit code 1 if something is wrong. Raises: Stop."""
    root = os.geteuid() == 0
    running = _runs(asked)
    bad = False
    found: list[Any] = []
    gpu = "gpu" in asked.options
    if gpu:
        need_root("doctor --gpu")
    examine = host("doctor").examine
    for one in examine(host_places(), root=root, running=running, inside=gpu):
        bad = bad or one.verdict == "fail"
        found.append(one)
        if not asked.json:
            _show(one)
    measured: list[dict[str, Any]] = []
    if gpu:
        from .doctor_gpu import exercise

        measured = exercise(asked, running=running)
    bad = bad or any(row["verdict"] == "fail" for row in measured)
    if asked.json:
        rows = [{name: getattr(one, name) for name in ("check", "verdict", "said", "mend")}
                for one in found]  # fmt: skip
        print_json({"ok": not bad, "findings": rows, "gpu": measured})
    return FAILED if bad else 0


def _runs(asked: Asked) -> bool:
    try:
        return daemon_runs(asked)
    except Stop:
        return False


def _show(one: Any) -> None:
    style = out()
    mark = style.paint(one.verdict.ljust(4), _COLOURS[one.verdict])
    print(f"{mark}  {one.check.ljust(13)} {clean(one.said)}")
    arrow = "→" if style.unicode else "->"
    if one.mend and one.verdict != "ok":
        print(f"      {' ' * 13} {style.paint(f'{arrow} {clean(one.mend)}', 'bold')}")
