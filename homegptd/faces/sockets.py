"""A listening Unix socket: a stale one is replaced, a live one is not."""

from __future__ import annotations

import fcntl
import grp
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from homegptd.wire.paths import foreign_directory


class SocketInUse(Exception):
    """Another daemon answers at the path, or the path is something else than a stale socket."""


@contextmanager
def listening(path: str, *, mode: int = 0o660, group: str | None = None) -> Iterator[socket.socket]:
    """A listening socket at `path`, whose file goes away at the end if it is still ours.

    Raises: SocketInUse; OSError if the path cannot be made; LookupError for an unknown group.
    """
    sock = listen(path, mode=mode, group=group)
    made = Path(path).stat().st_ino
    try:
        yield sock
    finally:
        sock.close()
        with suppress(OSError):
            if Path(path).stat().st_ino == made:
                Path(path).unlink()


def listen(path: str, *, mode: int = 0o660, group: str | None = None) -> socket.socket:
    """A listening socket at `path`. A stale one is replaced, a live one is not.

    Raises: as `listening`.
    """
    parent = Path(path).parent
    _make_directory(parent, group)
    stranger = foreign_directory(path)
    if stranger is not None:
        raise SocketInUse(f'cannot listen at "{path}": {parent} belongs to user {stranger}')
    with _locked(parent, path):
        _clear(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _bind(sock, path, mode, group)
        except BaseException:
            sock.close()
            raise
    return sock


def _make_directory(parent: Path, group: str | None) -> None:
    """Raises: OSError, LookupError."""
    if parent.is_dir():
        return
    parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    if group is not None:
        os.chown(parent, -1, grp.getgrnam(group).gr_gid)


@contextmanager
def _locked(parent: Path, path: str) -> Iterator[None]:
    """Keep two daemons from both finding the same socket stale; the directory is the lock."""
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise SocketInUse(f'cannot listen at "{path}": another daemon is starting there') from None
    finally:
        os.close(descriptor)


def _clear(path: str) -> None:
    """Remove a stale socket. Raises: SocketInUse when there is something else."""
    try:
        kind = Path(path).lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise SocketInUse(f'cannot listen at "{path}": it is there and is no socket')
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass  # its backlog is full: busy, and alive
    raise SocketInUse(f'cannot listen at "{path}": another daemon answers there')


def _bind(sock: socket.socket, path: str, mode: int, group: str | None) -> None:
    before = os.umask(0o177)  # closed until it has its final mode
    try:
        sock.bind(path)
    finally:
        os.umask(before)
    if group is not None:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    Path(path).chmod(mode)
    sock.listen(256)
    sock.setblocking(False)
