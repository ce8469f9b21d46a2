"""Listening TCP sockets, with errors that say what to do."""

import errno
import re
import socket

from homegptd.core.refusals import Fault

_IP_FREEBIND = 15
"""ip(7); the socket module knows its name from Python 3.14 on."""


class CannotListen(Fault):
    """Lasting: an address or port must be changed, or somebody else's server ended."""

    def __init__(self, address: str, port: int, cause: str, hint: str | None = None) -> None:
        message = f"cannot listen on {spelled(address, port)}: {cause}"
        super().__init__(message, hint=hint, lasting=True)


def parse_listen(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Address and port of `127.0.0.1:9000`, `[::1]:9000`, `localhost:9000`, `:9000` or `9000`.

    An empty address or `*` means every one. Raises `ValueError` with the value and what is allowed.
    """
    found = re.fullmatch(r"(?:\[(?P<six>[^\[\]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>\d+))?", text)
    if text.isdecimal():
        host, port = "", text
    elif found is None:
        raise ValueError(f"{text!r} is not ADDRESS:PORT; IPv6 is written [::1]:9000")
    else:
        host = found["six"] if found["six"] is not None else found["host"]
        port = found["port"] or str(default_port or "")
    if not port:
        raise ValueError(f"{text!r} names no port")
    if int(port) > 65535:
        raise ValueError(f"{text!r}: a port is at most 65535")
    return ("" if host == "*" else host), int(port)


def listening(
    address: str, port: int, *, backlog: int = 4096, early: bool = False
) -> list[socket.socket]:
    """Bound, listening, non-blocking; one for each address that `address` stands for.

    Every address (`""`) is one dual-stack socket, or IPv4 where the box has no IPv6. `localhost`
    may be two. Port 0 picks one free port for all. The kernel caps `backlog` at
    net.core.somaxconn, 4096 by default. `early`: the address need not be there yet. Raises
    `CannotListen`, and then leaves none open.
    """
    found: list[socket.socket] = []
    try:
        for family, where in _resolved(address, port):
            at = port or _port_of(found)
            found.append(_listen(family, where, at, backlog=backlog, early=early))
    except OSError as error:
        for sock in found:
            sock.close()
        raise _explained(address, port, error) from error
    return found


def spelled(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address or '*'}:{port}"


def _resolved(address: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    if not address:
        return [(socket.AF_INET6, "::") if _has_ipv6() else (socket.AF_INET, "0.0.0.0")]  # noqa: S104
    try:
        infos = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise CannotListen(address, port, "no such address", f"getent hosts {address}") from error
    return list(dict.fromkeys((family, str(where[0])) for family, _, _, _, where in infos))


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def _listen(
    family: socket.AddressFamily, address: str, port: int, *, backlog: int, early: bool
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # On Linux it allows binding while old connections linger in TIME_WAIT, not stealing a port.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # bindv6only of the box must not decide what `[::]` means.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        if early:
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        sock.setblocking(False)
        sock.bind((address, port))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _port_of(found: list[socket.socket]) -> int:
    return int(found[0].getsockname()[1]) if found else 0


def _explained(address: str, port: int, error: OSError) -> CannotListen:
    match error.errno:
        case errno.EADDRINUSE:
            hint: str | None = f"ss -ltnp 'sport = :{port}'"
        case errno.EACCES:
            hint = "take a port from 1024 up, or give the service CAP_NET_BIND_SERVICE"
        case errno.EADDRNOTAVAIL:
            hint = "ip -brief address"
        case _:
            hint = None
    return CannotListen(address, port, (error.strerror or str(error)).lower(), hint)
