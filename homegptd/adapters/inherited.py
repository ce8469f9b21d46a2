"""Sockets that systemd kept for us over a restart: the other end of `Notifier.store_fds`.

See sd_listen_fds(3) and "FileDescriptorStoreMax=" in systemd.service(5).
"""

import os
import socket
from collections.abc import MutableMapping

FIRST = 3
"""SD_LISTEN_FDS_START."""


def inherited_sockets(environ: MutableMapping[str, str]) -> dict[str, list[socket.socket]]:
    """Sockets by the name under which they were stored; non-blocking, closed in children.

    Takes LISTEN_* out of `environ`, so that neither a child nor a second call takes them too. What
    is no socket any more is closed. Whoever calls owns them, and closes those it has no use for.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, list[socket.socket]] = {}
    for index, number in enumerate(range(FIRST, FIRST + int(count))):
        name = names[index] if index < len(names) and names[index] else "unknown"
        if (sock := _socket(number)) is not None:
            found.setdefault(name, []).append(sock)
    return found


def _socket(number: int) -> socket.socket | None:
    try:
        sock = socket.socket(fileno=number)
    except OSError:
        _close(number)
        return None
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def _close(number: int) -> None:
    try:
        os.close(number)
    except OSError:
        return
