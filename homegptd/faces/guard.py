"""Who may change the box over HTTP: nobody from elsewhere, and no web page behind a user's back.

A page of another site can make the browser post here (cross-site request), or let its own name
point to this box and then read answers too (DNS rebinding). The first shows in `Origin` and
`Sec-Fetch-Site`, the second in a `Host` that is neither an address nor a name of this box.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TypeAlias

from aiohttp import web

from . import errors
from .errors import Denied

Network: TypeAlias = IPv4Network | IPv6Network
LOOPBACK: tuple[Network, ...] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


def _own_names() -> frozenset[str]:
    name = socket.gethostname().lower()
    return frozenset({"localhost", name, name.partition(".")[0], f"{name}.local"})


@dataclass(frozen=True, slots=True)
class Guard:
    """`managers`: networks from which the box may be managed. `hosts`: names it is called by."""

    managers: tuple[Network, ...] = LOOPBACK
    hosts: frozenset[str] = field(default_factory=_own_names)

    def may_look(self, request: web.BaseRequest) -> None:
        """Raises: Denied."""
        host = request.headers.get("Host")
        if host is not None and not self._is_ours(host):
            raise _forbidden(f'"{host[:100]}" is not a name of this box', "use its address")

    def may_manage(self, request: web.BaseRequest) -> None:
        """Raises: Denied."""
        self.may_look(request)
        if not self._is_near(request):
            hint = "use homegptctl on the box, or allow this network"
            raise _forbidden("management is not open to this address", hint)
        self.is_no_other_site(request)

    def is_no_other_site(self, request: web.BaseRequest) -> None:
        """Raises: Denied. A page may open a websocket to anywhere, so that too has to ask."""
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
        foreign = origin is not None and origin.partition("://")[2] != request.headers.get("Host")
        if foreign or site in ("cross-site", "same-site"):
            raise _forbidden("the request comes from a page of another site", None)

    def _is_ours(self, host: str) -> bool:
        name = _without_port(host.lower())
        if name in self.hosts or name.endswith(".localhost"):
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True

    def _is_near(self, request: web.BaseRequest) -> bool:
        if any(name in request.headers for name in _FORWARDED):
            return False  # a proxy on this box speaks for somebody else
        transport = request.transport
        peer = transport.get_extra_info("peername") if transport is not None else None
        if not isinstance(peer, tuple):
            return transport is not None  # a Unix socket: the file's mode has decided
        address = ip_address(peer[0].partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self.managers)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _forbidden(message: str, hint: str | None) -> Denied:
    return Denied(errors.of_reason("forbidden", message, hint=hint))
