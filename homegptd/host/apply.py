"""From the configuration to units that systemd knows, or back to how it was.

The order is what keeps the daemon's user from more than its own units (see `polkit`): a unit is
there before the rule names it, and the rule forgets it before it goes.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from homegptd.config.parse import load, parse
from homegptd.config.schema import Config

from .commands import HostFault, must, run
from .files import Changes, changes, difference, put, put_back
from .places import Places
from .polkit import rule
from .render import MARK, render, service
from .validate import validate

RETIRE_S = 60.0
"""Seconds that a removed model may take to end its answers while we wait; else the next apply."""
_TRANSIENT = "/run/systemd/transient/"


@dataclass(frozen=True, slots=True)
class Plan:
    """What would change."""

    config: Config
    changes: Changes
    places: Places
    text: str | None = None
    """A new text of the configuration, written together with its units."""

    def __bool__(self) -> bool:
        return bool(self.changes) or self.text is not None

    def diff(self) -> list[str]:
        return [*self.config_diff(), *self.changes.diff()]

    def config_diff(self) -> list[str]:
        """Of the configuration alone; empty where that stays."""
        if self.text is None:
            return []
        path = self.places.config
        return difference(str(path), path.read_text() if path.exists() else "", self.text)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done, for the person who asked."""

    lines: tuple[str, ...]
    unlisted: tuple[str, ...] = ()
    """Units of models without a file, which the daemon therefore may not start."""


def plan(places: Places, text: str | None = None) -> Plan:
    """Compare the configuration, or a new text for it, with the units that are there.

    Raises: ConfigError, CannotRender, HostFault.
    """
    config = load(places.config) if text is None else parse(text, str(places.config))
    return Plan(config, changes(places.quadlets, render(config)), places, text)


def carry_out(wanted: Plan, *, tell_daemon: Callable[[], str] | None = None) -> Outcome:
    """Install what was planned; `tell_daemon` reloads a running daemon and says what it did.

    Raises: HostFault, or what `tell_daemon` raised; then everything is as it was before.
    """
    if os.geteuid() != 0 and wanted.places.root == Path("/"):
        raise HostFault("units belong to root", "sudo homegptctl apply")
    with _alone(wanted.places):
        return _carried_out(wanted, tell_daemon)


def _carried_out(wanted: Plan, tell_daemon: Callable[[], str] | None) -> Outcome:
    changed, places = wanted.changes, wanted.places
    if changed.writes:
        validate(render(wanted.config), places)
    before = {path: _text(path) for path in (places.rule, places.config)}
    try:
        if wanted.text is not None:
            put(places.config, wanted.text)
        _install(changed)
        unlisted = _allow(wanted, retiring=changed.removals)
        said = [tell_daemon()] if tell_daemon else []
    except BaseException:
        _undo(changed, before)
        raise
    left = _retire(wanted, wait=tell_daemon is not None)
    _refresh_webui(wanted)
    return Outcome((*_told(changed), *said, *left), unlisted)


@contextmanager
def _alone(places: Places) -> Iterator[None]:
    """Two at a time would undo each other: a start of the daemon and an operator, say."""
    places.quadlets.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(places.quadlets, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ------------------------------------------------------------ steps


def _install(changed: Changes) -> None:
    for name, text in changed.writes.items():
        put(changed.folder / name, text)
    if changed:
        must("systemctl", "daemon-reload", doing="reload systemd")
    lost = [name for name in changed.writes if not _fragment(service(name))]
    if lost:
        units = ", ".join(map(service, lost))
        raise HostFault(
            f"systemd has no {units} although the file is there",
            "journalctl -b -t quadlet-generator",
        )


def _allow(wanted: Plan, *, retiring: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Write the rule for the units that are there; the names of those that are not."""
    names = [model.unit for model in wanted.config.models]
    gone = [service(name) for name in retiring if name.endswith(".container")]
    leaving = [name for name in gone if name != "open-webui.service"]
    fragments = {name: _fragment(name) for name in dict.fromkeys((*names, *leaving))}
    listed = {name: path for name, path in fragments.items() if path}
    text = rule(listed, mark=MARK)
    path = wanted.places.rule
    if not path.exists() or path.read_text() != text:
        put(path, text)
    return tuple(name for name in names if name not in listed)


def _retire(wanted: Plan, *, wait: bool) -> list[str]:
    """Remove the units of models that went; those that still answer stay until the next time."""
    changed = wanted.changes
    if not changed.removals:
        return []
    if not wait:
        _stop([service(name) for name in changed.removals if name.endswith(".container")])
    busy = _still_running([name for name in changed.removals if name.endswith(".container")])
    gone = [name for name in changed.removals if name not in busy]
    _allow(wanted, retiring=tuple(busy))
    for name in gone:
        (changed.folder / name).unlink(missing_ok=True)
    must("systemctl", "daemon-reload", doing="reload systemd")
    return [f"{service(name)} still ends its answers; the next apply removes it" for name in busy]


def _still_running(names: list[str]) -> list[str]:
    """Those whose units are not down when the time is over. The daemon ends them, in good order."""
    mine = [name for name in names if name != "open-webui.container"]
    if len(mine) < len(names):
        run("systemctl", "stop", "--no-block", "open-webui.service")
    until = time.monotonic() + RETIRE_S
    while True:
        busy = [name for name in mine if not _down(service(name))]
        if not busy or time.monotonic() > until:
            return busy
        time.sleep(0.25)


def _down(unit: str) -> bool:
    return _show(unit, "ActiveState").get("ActiveState") in {"inactive", "failed"}


def _stop(units: list[str]) -> None:
    """Without a daemon nobody else would; nobody is being answered either."""
    mine = [unit for unit in units if unit != "open-webui.service"]
    if mine:
        run("systemctl", "stop", *mine, limit_s=120)


def _refresh_webui(wanted: Plan) -> None:
    """It is no engine, so nobody but us looks after it. Never waits: it may come after us."""
    name = "open-webui.container"
    if name in wanted.changes.before and name in wanted.changes.writes:
        run("systemctl", "try-restart", "--no-block", service(name))
    elif name in wanted.changes.writes and not _down("homegpt.service"):
        # a start that is under way has asked for its companions before this one was there
        run("systemctl", "start", "--no-block", service(name))


def _undo(changed: Changes, before: Mapping[Path, str | None]) -> None:
    for path, text in before.items():
        if text is None:
            path.unlink(missing_ok=True)
        elif text != _text(path):
            put(path, text)
    if changed:
        put_back(changed)
        run("systemctl", "daemon-reload")


# ------------------------------------------------------------ looking


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _fragment(unit: str) -> str:
    """The file of a unit that systemd has loaded from one; "" if there is none."""
    shown = _show(unit, "LoadState", "FragmentPath")
    path = shown.get("FragmentPath", "")
    sound = shown.get("LoadState") == "loaded" and not path.startswith(_TRANSIENT)
    return path if sound else ""


def _show(unit: str, *names: str) -> Mapping[str, str]:
    done = run("systemctl", "show", unit, *(f"-p{name}" for name in names))
    return dict(line.split("=", 1) for line in done.out.splitlines() if "=" in line)


def _told(changed: Changes) -> list[str]:
    new = [service(name) for name in changed.writes if name not in changed.before]
    other = [service(name) for name in changed.writes if name in changed.before]
    gone = [service(name) for name in changed.removals]
    words = (("added", new), ("changed", other), ("removed", gone))
    return [f"{word} {', '.join(units)}" for word, units in words if units]
