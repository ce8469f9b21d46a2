"""Who may come in over HTTP: by key, or else nobody from elsewhere and no other site's web page.

A page of another site can make the browser post here (cross-site request), or let its own name
point to this box and then read answers too (DNS rebinding). The first shows in `Origin` and
`Sec-Fetch-Site`, the second in a `Host` that is neither an address nor a name of this box. Whoever
shows a good key needs none of these checks: browsers never add one by themselves.
"""

from __future__ import annotations

import socket
from asyncio import Transport
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Protocol, TypeAlias

from aiohttp import web
from multidict import CIMultiDictProxy

from homegptd.config.keys import Key

from . import errors
from .clients import ANYBODY, Client, Headers, Keyring
from .errors import Denied, Problem

Network: TypeAlias = IPv4Network | IPv6Network
LOOPBACK: tuple[Network, ...] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP")
_PRIVATE = (".localhost", ".local", ".internal", ".home.arpa")
"""No name below these is to be had in public DNS (RFC 6761, 6762, 8375, ICANN for `.internal`)."""
_PREFLIGHT_S = 600


class Access(Enum):
    """Who may use a path. Where keys are asked for, every other than OPEN needs one."""

    OPEN = "everybody"
    USE = "everybody who calls the box by its own name, and no web page of another site"
    LOOK = "the same; it shows the box, not the models"
    MANAGE = "a key with that right; without keys loopback and the containers' network"


class Asked(Protocol):
    """What is looked at of a request."""

    @property
    def headers(self) -> CIMultiDictProxy[str]: ...
    @property
    def transport(self) -> Transport | None: ...


def _own_names() -> frozenset[str]:
    return frozenset({socket.gethostname().lower()})


@dataclass(frozen=True, slots=True)
class Guard:
    """Finds out who asks, and turns away who may not."""

    managers: tuple[Network, ...] = LOOPBACK
    """Networks from which the box may be managed, where nobody is asked for a key."""
    hosts: frozenset[str] = frozenset()
    """Names by which the box is called, in small letters, beside its own."""
    keys: Keyring | None = None
    """None: nobody is asked for one."""
    cors: frozenset[str] = frozenset()
    """Origins whose web pages may read answers; `*`: all."""
    own: frozenset[str] = field(default_factory=_own_names)

    def greet(self, request: Asked) -> Client:
        """Who asks, as far as it can be known; nobody is turned away yet."""
        key = None if self.keys is None else self._key(request, self.keys)
        headers = self._cors(request) if "Origin" in request.headers else ()
        if self.keys is None:
            return Client(headers=headers) if headers else ANYBODY
        return Client(key, key is not None, self.keys.running, headers)

    def admit(self, request: Asked, client: Client, access: Access) -> None:
        """Raises: Denied."""
        if access is Access.OPEN:
            return
        if self.keys is not None:
            if client.key is None:
                raise Denied(_unauthorized(request))
            if access is Access.MANAGE and not client.key.manage:
                raise _forbidden(f'the key "{client.key.name}" may not manage the box', None)
            return
        self._host_is_ours(request)
        if access is Access.MANAGE:
            self._may_manage(request)
        elif not client.headers and _is_foreign(request):
            hint = "http.cors names the sites that may"
            raise _forbidden("the request comes from a page of another site", hint)

    def preflight(self, request: web.BaseRequest, client: Client) -> web.Response | None:
        """The answer to a browser that asks whether its page may; None if it is not that.

        Browsers send no key with this question, so nobody is asked for one.
        """
        wanted = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or wanted is None or not client.headers:
            return None
        headers = {"Access-Control-Allow-Methods": "GET, POST, DELETE"}
        # `*` would leave out Authorization (Fetch standard, CORS-preflight fetch)
        if asked := request.headers.get("Access-Control-Request-Headers"):
            headers["Access-Control-Allow-Headers"] = asked
        headers["Access-Control-Max-Age"] = str(_PREFLIGHT_S)
        return web.Response(headers=headers)

    def _key(self, request: Asked, keys: Keyring) -> Key | None:
        for secret in _shown(request):
            if key := keys.find(secret):
                return key
        return None

    def _cors(self, request: Asked) -> Headers:
        origin = request.headers["Origin"]
        if origin not in self.cors and not ("*" in self.cors and origin.isascii()):
            return ()
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "Retry-After, X-Request-Id, x-should-retry"),
            ("Vary", "Origin"),
        )

    def _host_is_ours(self, request: Asked) -> None:
        host = request.headers.get("Host")
        if host is not None and not _is_ours(host, self.hosts, self.own):
            hint = "use its address, or name it in http.hosts"
            raise _forbidden(f'"{host[:100]}" is not a name of this box', hint)

    def _may_manage(self, request: Asked) -> None:
        if not self._is_near(request):
            hint = "use homegptctl on the box, or a key that may (homegptctl key add)"
            raise _forbidden("management is not open to this address", hint)
        _is_no_other_site(request)

    def _is_near(self, request: Asked) -> bool:
        if any(name in request.headers for name in _FORWARDED):
            return False  # a proxy on this box speaks for somebody else
        transport = request.transport
        peer = transport.get_extra_info("peername") if transport is not None else None
        if not isinstance(peer, tuple):
            return transport is not None  # a Unix socket: the file's mode has decided
        address = ip_address(peer[0].partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self.managers)


def _shown(request: Asked) -> list[str]:
    """What the client shows as its key."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    shown = [token.strip() if scheme.lower() == "bearer" else "", request.headers.get("x-api-key")]
    return [secret for secret in shown if secret]


def _is_foreign(request: Asked) -> bool:
    """Whether a web page of another site asks. An installed program may have a scheme of its own
    (`app://`, `chrome-extension://`), which no web page can have."""
    origin = request.headers.get("Origin")
    if origin is None or _is_same(request, origin):
        return False
    return origin == "null" or origin.partition("://")[0] in ("http", "https")


def _is_no_other_site(request: Asked) -> None:
    """Raises: Denied."""
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    foreign = origin is not None and not _is_same(request, origin)
    if foreign or site in ("cross-site", "same-site"):
        raise _forbidden("the request comes from a page of another site", None)


def _is_same(request: Asked, origin: str) -> bool:
    return origin.partition("://")[2] == request.headers.get("Host")


@lru_cache(maxsize=64)
def _is_ours(host: str, *known: frozenset[str]) -> bool:
    name = _without_port(host.lower())
    if any(name in names for names in known) or name.endswith(_PRIVATE):
        return True
    if "." not in name and ":" not in name:
        return bool(name)  # nobody can have a name without a dot in public DNS
    return _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        name, _, after = host[1:].partition("]")
        return name if not after or after.startswith(":") else ""
    return host.rpartition(":")[0] if ":" in host else host


def _unauthorized(request: Asked) -> Problem:
    if _shown(request):
        text, hint = "this API key is not known here", None
    else:
        text, hint = "an API key is needed", "Authorization: Bearer KEY, or x-api-key"
    problem = errors.of_reason("unauthorized", text, hint=hint)
    return replace(problem, headers={**problem.headers, "WWW-Authenticate": "Bearer"})


def _forbidden(message: str, hint: str | None) -> Denied:
    return Denied(errors.of_reason("forbidden", message, hint=hint))
