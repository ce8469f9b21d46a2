"""What the verbs for the host's files share: late imports, questions, errors as `Stop`.

`homegptd.host` needs PyYAML and much of the standard library, so it is imported by name when used.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from importlib import import_module

from .absent import ABSENT
from .asked import Stop
from .client import Client
from .render import out

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from .asked import Asked

FAILED, REFUSED, CONFIG = 1, 4, 78
RELOAD_S = 90.0


def host(module: str) -> Any:
    """A module of `homegptd.host`."""
    return import_module(f"homegptd.host.{module}")


def places() -> Any:
    return host("places").Places()


@contextmanager
def faults() -> Iterator[None]:
    """Faults of the host's files in the words of this command. Raises: Stop."""
    config_error = import_module("homegptd.config.parse").ConfigError
    cannot_render = host("render").CannotRender
    try:
        yield
    except host("commands").HostFault as fault:
        raise Stop(fault.message, code=FAILED, hint=fault.hint, reason="host") from None
    except (config_error, cannot_render) as error:
        hint = "homegptctl config check"
        raise Stop(str(error), code=CONFIG, hint=hint, reason="bad-config") from None
    except PermissionError as error:
        text = f"may not touch {error.filename}"
        raise Stop(text, code=FAILED, hint="run it with sudo", reason="forbidden") from None


def need_root(verb: str) -> None:
    """Raises: Stop."""
    if os.geteuid() != 0:
        text = f"{verb} works on files of root"
        raise Stop(text, code=REFUSED, hint=f"sudo homegptctl {verb}", reason="forbidden")


def show_diff(rows: list[str]) -> None:
    style = out()
    colours = {"+": "green", "-": "red", "@": "blue"}
    for row in rows:
        print(style.paint(row, colours.get(row[:1], "")))


def confirm(asked: Asked, question: str) -> bool:
    """Whether to go on: said beforehand, or asked on a terminal."""
    if "yes" in asked.options:
        return True
    if not sys.stdin.isatty():
        print(f"homegptctl: nothing was done; {asked.verb} --yes does it", file=sys.stderr)
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}
    except EOFError:
        return False


def reload_daemon(asked: Asked) -> str:
    """What the running daemon did with the new configuration. Raises: Stop."""
    with Client(asked.socket, limit_s=RELOAD_S) as client:
        view = client.call("reload", {"wait": True})
    if view["state"] == "failed":
        error = view["error"] or {}
        text = error.get("message") or "homegptd refused the configuration"
        raise Stop(text, code=CONFIG, hint=error.get("hint"), reason="bad-config")
    return f"homegptd: {view['outcome'] or 'reloaded'}"


def carry_out(asked: Asked, plan: Any) -> list[str]:
    """Install a plan and have the daemon follow it. Raises: Stop; then nothing has changed."""
    told = "files-only" not in asked.options and daemon_runs(asked)
    tell = (lambda: reload_daemon(asked)) if told else None
    outcome = host("apply").carry_out(plan, tell_daemon=tell)
    lines = [*outcome.lines]
    lines += [f"systemd has no {unit}: write it, then apply again" for unit in outcome.unlisted]
    return lines


def daemon_runs(asked: Asked) -> bool:
    try:
        Client(asked.socket).close()
    except Stop as stop:
        if stop.code == ABSENT:
            return False
        raise
    return True
