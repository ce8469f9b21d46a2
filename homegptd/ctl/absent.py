"""Why nobody can be reached at a socket, and what to do about it."""

from __future__ import annotations

import os

from homegptd.wire import paths

from .asked import Stop

ABSENT = 3
_UNITS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)


def why(path: str, exc: OSError) -> Stop:
    """The words for an error of connect(2)."""
    if isinstance(exc, FileNotFoundError):
        return absent(path, "there is no socket", _start_hint(path))
    if isinstance(exc, PermissionError):
        return absent(path, "you may not use the socket", _group_hint(path))
    if isinstance(exc, ConnectionRefusedError):
        return absent(path, "the socket is stale, nobody listens", _start_hint(path, stale=True))
    if isinstance(exc, TimeoutError | BlockingIOError):
        return absent(path, "it is too busy to accept a connection", None)
    return absent(path, exc.strerror or str(exc), "name the socket with --socket")


def absent(path: str, reason: str, hint: str | None) -> Stop:
    return Stop(
        f'cannot reach homegptd at "{path}": {reason}', code=ABSENT, hint=hint, reason="absent"
    )


def log_hint() -> str:
    """Where the daemon says more."""
    return "journalctl -u homegpt -n 50" if has_unit() else "the output of homegptd says more"


def has_unit() -> bool:
    """Whether systemd knows homegpt.service here."""
    return any(os.path.exists(f"{place}/homegpt.service") for place in _UNITS)  # noqa: PTH110


def _start_hint(path: str, *, stale: bool = False) -> str:
    named = os.environ.get(paths.ENVIRONMENT)
    usual = (paths.SYSTEM_SOCKET, paths.user_socket())
    if path not in usual and not stale:  # somebody named it, and perhaps wrongly
        source = paths.ENVIRONMENT if path == named else "--socket"
        return f"is {path} the right path? {source} names it; or start homegptd --socket {path}"
    if path == paths.SYSTEM_SOCKET and has_unit():
        return "sudo systemctl start homegpt; or name another socket with --socket"
    if path not in usual:
        return f"homegptd --socket {path} starts one there"
    return "start homegptd, or the demo with make run; or name its socket with --socket"


def _group_hint(path: str) -> str:
    """The command that lets this user in; the group is the one of the socket, if we may look."""
    import grp

    group = "homegpt"
    for place in (path, os.path.dirname(path)):  # noqa: PTH120 - pathlib is slow to import
        try:
            group = grp.getgrgid(os.stat(place).st_gid).gr_name  # noqa: PTH116 - see above
            break
        except (OSError, KeyError):
            continue
    if group == "root":
        return "ask again as root, with sudo"
    return f'sudo usermod -aG {group} "$USER", then log in again; or use sudo'
