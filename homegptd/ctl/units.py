"""`render` and `apply`: from the configuration to units."""

from __future__ import annotations

import sys

from .host import FAILED, REFUSED, carry_out, confirm, faults, host, need_root, show_diff
from .host import places as host_places
from .render import print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .asked import Asked


def run(asked: Asked) -> int:
    """Raises: Stop."""
    with faults():
        return _render(asked) if asked.verb == "render" else _apply(asked)


def _render(asked: Asked) -> int:
    from importlib import import_module
    from pathlib import Path

    places = host_places()
    name = asked.options.get("config") or str(places.config)
    config = import_module("homegptd.config.parse").load(name)
    files: dict[str, str] = host("render").render(config)
    if "check" in asked.options:
        folder = Path(asked.options.get("to") or places.quadlets)
        rows = host("files").changes(folder, files).diff()
        show_diff(rows)
        return FAILED if rows else 0
    if "to" in asked.options:
        return _write(Path(asked.options["to"]), files)
    if asked.json:
        print_json({"files": files})
    else:
        print("\n".join(f"# ---- {name}\n{text}" for name, text in files.items()))
    return 0


def _write(folder: Any, files: dict[str, str]) -> int:
    changed = host("files").changes(folder, files)
    for name, text in changed.writes.items():
        host("files").put(folder / name, text)
    for name in changed.removals:
        (folder / name).unlink()
    print(f"{folder}: {len(files)} units, {len(changed.writes)} written", file=sys.stderr)
    return 0


def _apply(asked: Asked) -> int:
    need_root("apply")
    plan = host("apply").plan(host_places())
    rows: list[str] = plan.diff()
    if not asked.json and ("yes" not in asked.options or sys.stdout.isatty()):
        show_diff(rows)
    if rows and not confirm(asked, "apply this?"):
        return REFUSED
    lines = carry_out(asked, plan)
    if asked.json:
        print_json({"diff": rows, "done": lines})
    else:
        print("\n".join(lines) or "the units are as configured")
    return 0
