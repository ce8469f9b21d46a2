"""Podman's own API, by podman-py, for root's commands at a terminal: never for the daemon.

The service behind it is started for the moment and ends with it. podman.socket, which would be one
more door to root on the box, need not be enabled. An engine's start does not wait for any of this:
whether an image is there is asked of the command line (`pull.lacks_image`).
"""

import json
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from .commands import HostFault

_SERVE = "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec podman system service --time=0"
"""As systemd hands over a socket that listens already: nobody has to wait until it does."""
_END_S = 5.0
_PULL_S = 24 * 3600
"""Seconds without a word after which a download is given up; some registries are slow."""
_GB = 1e9


@contextmanager
def api() -> Iterator[Any]:
    """A client of a service of its own. Raises: HostFault where podman-py or Podman is missing, or
    says no inside the block."""
    try:
        podman = import_module("podman")
    except ImportError:
        hint = "sudo apt install python3-podman"
        raise HostFault("podman-py is not installed", hint) from None
    refused = (import_module("podman.errors").PodmanError,
               import_module("requests").RequestException)  # fmt: skip
    try:
        with _service() as url, podman.PodmanClient(base_url=url, timeout=_PULL_S) as client:
            yield client
    except refused as error:
        raise HostFault(f"Podman's service: {error}", "podman info") from error


@contextmanager
def _service() -> Iterator[str]:
    """`podman system service`, where only we reach it; its URL."""
    with tempfile.TemporaryDirectory(prefix="homegpt-") as folder:
        path = f"{folder}/podman.sock"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            sock.listen()
            words, nowhere = ["/bin/sh", "-c", _SERVE], subprocess.DEVNULL
            server = subprocess.Popen(words, stdin=sock.fileno(), stdout=nowhere, stderr=nowhere)
        try:
            yield f"unix://{path}"
        finally:
            server.terminate()
            try:
                server.wait(_END_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


# ------------------------------------------------------------ images


@dataclass(slots=True)
class Layers:
    """How far a pull is: layers and their bytes, as Podman's stream tells them one by one."""

    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    def take(self, line: Mapping[str, Any]) -> None:
        """Raises: HostFault where the line tells of an error."""
        if error := line.get("error") or line.get("errorDetail", {}).get("message"):
            raise HostFault(str(error))
        name, status = line.get("id"), line.get("status", "")
        if not name or status == "Pull complete":
            return
        detail = line.get("progressDetail") or {}
        if total := detail.get("total"):
            self.seen[name] = (int(detail.get("current", 0)), int(total))
        if status in {"Download complete", "Already exists"}:
            self.done.add(name)
            total = self.seen.get(name, (0, 0))[1]
            self.seen[name] = (total, total)

    def __str__(self) -> str:
        got, total = (sum(part) for part in zip(*self.seen.values(), (0, 0), strict=True))
        layers = f"{len(self.done)} of {len(self.seen)} layers"
        if not total:
            return layers
        return f"{100 * got // total:3} %, {got / _GB:.1f} of {total / _GB:.1f} GB, {layers}"


def pull_image(name: str, show: Callable[[str], None]) -> None:
    """Fetch an image; `show` is given each new line about how far it is. Raises: HostFault."""
    layers = Layers()
    repository, tag = split(name)
    with api() as client:
        # tls_verify: as registries.conf says, which podman-py's own default would overrule
        for row in client.images.pull(repository, tag=tag, stream=True, tls_verify=None):
            for line in row.splitlines():
                layers.take(json.loads(line))
            show(f"{name}: {layers}")


def split(name: str) -> tuple[str, str]:
    """Repository and tag, or digest: a colon in the host's part is a port."""
    repository, at, digest = name.partition("@")
    if at:
        return repository, digest
    path, colon, tag = name.rpartition(":")
    return (path, tag) if colon and "/" not in tag else (name, "latest")


# ------------------------------------------------------------ containers


@dataclass(frozen=True, slots=True)
class Container:
    """One that runs, as the doctor looks at it."""

    memory_mib: int
    """0 where the kernel does not count it."""
    ports: tuple[str, ...]
    """Published ports of the box, as `address:port`."""


def running(names: Iterable[str]) -> dict[str, Container]:
    """Those of the containers that run. Raises: HostFault."""
    found = {}
    with api() as client:
        there = {one.name for one in client.containers.list()}
        for name in [name for name in names if name in there]:
            one = client.containers.get(name)
            told = one.stats(stream=False, decode=True)
            found[name] = Container(_memory_mib(told), tuple(_ports(one.attrs)))
    return found


def _memory_mib(told: Mapping[str, Any]) -> int:
    rows = told.get("Stats") or [{}]
    return int(rows[0].get("MemUsage", 0)) >> 20


def _ports(attrs: Mapping[str, Any]) -> Iterator[str]:
    for rows in (attrs["HostConfig"].get("PortBindings") or {}).values():
        yield from (f"{row.get('HostIp') or '*'}:{row['HostPort']}" for row in rows or ())
