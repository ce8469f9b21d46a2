"""Where the control socket lies: one rule for the daemon and for those who call it."""

from __future__ import annotations

import os

SYSTEM_SOCKET = "/run/homegpt/control.sock"
ENVIRONMENT = "HOMEGPT_SOCKET"
_SHARED = "/tmp/homegpt-"  # noqa: S108 - `foreign_directory` says why this is safe


def socket_to_ask(system: str = SYSTEM_SOCKET) -> str:
    """The socket a caller tries when the command line names none.

    The environment first; then the system's socket for root, or when there is one; then the user's.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        return named
    if os.geteuid() == 0 or _exists(system):
        return system
    return user_socket()


def socket_to_offer(system: str = SYSTEM_SOCKET) -> str:
    """The socket a daemon makes when the command line names none.

    As `socket_to_ask`, except that an ordinary user's daemon never claims the system's path.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        return named
    return system if os.geteuid() == 0 else user_socket()


def user_socket() -> str:
    """The path for one user: `$XDG_RUNTIME_DIR`, else a directory in /tmp named by the user id."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return f"{runtime}/homegpt/control.sock"
    return f"{_SHARED}{os.geteuid()}/control.sock"


def foreign_directory(path: str) -> int | None:
    """The user id of a stranger who owns the directory of `path` in /tmp, if that is so.

    /tmp is everybody's: whoever makes `/tmp/homegpt-1000` first could play the daemon to user 1000.
    Root and ourselves are no strangers; elsewhere the directory above says who may make one.
    """
    if not path.startswith(_SHARED):
        return None
    try:
        owner = os.stat(os.path.dirname(path)).st_uid  # noqa: PTH116, PTH120 - pathlib is slow
    except OSError:
        return None
    return None if owner in (0, os.geteuid()) else owner


def _exists(path: str) -> bool:
    """Whether there is something at `path`; a directory we may not look into counts as yes.

    /run/homegpt is closed to those outside its group; they shall hear of the group, not of /tmp.
    """
    try:
        os.stat(path)  # noqa: PTH116 - pathlib is slow to import
    except PermissionError:
        return True
    except OSError:
        return False
    return True
