"""Listening sockets: opened here, or kept by systemd over a restart of the daemon."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from homegptd.adapters.inherited import inherited_sockets
from homegptd.adapters.notify import Notifier
from homegptd.adapters.sockets import listening, parse_listen
from homegptd.config.schema import CONTAINER_GATEWAY
from homegptd.core.model import ModelId
from homegptd.core.refusals import Fault
from homegptd.faces.sockets import SocketInUse
from homegptd.faces.sockets import listen as listen_unix
from homegptd.faces.sockets import listening as control_socket

log = logging.getLogger(__name__)

_CONTROL = "control"


class CannotServe(Exception):
    """The daemon cannot begin: something it needs is taken or out of reach."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Doors:
    """Every socket that callers and clients come in by."""

    control: socket.socket
    http: tuple[socket.socket, ...]
    models: Mapping[ModelId, tuple[socket.socket, ...]]
    """Doors to one model each."""


@contextmanager
def open_doors(
    control: str,
    listen: tuple[str, ...],
    models: Mapping[ModelId, str],
    *,
    group: str | None,
    keeper: Notifier | None,
) -> Iterator[Doors]:
    """Listen for the duration of the block. Raises: CannotServe.

    A model's own door that cannot be opened is told of, and everything else goes on.

    With a `keeper` the sockets are handed to systemd, which gives them back to the next daemon: no
    connection is refused in between. Then the control socket's file stays, too.
    """
    with ExitStack() as stack:
        kept = inherited_sockets(os.environ) if keeper is not None else {}
        for sockets in kept.values():
            for sock in sockets:
                stack.callback(sock.close)
        http = _http_doors(stack, listen, kept, keeper)
        single = _model_doors(stack, models, kept, keeper)
        # the last one, so that whoever finds it finds the others open
        doors = Doors(_control_door(stack, control, group, kept, keeper), http, single)
        if keeper is not None:
            _drop_the_rest(doors, kept, keeper)
        yield doors


def _drop_the_rest(doors: Doors, kept: Mapping[str, list[socket.socket]], keeper: Notifier) -> None:
    """Close what the configuration names no more; systemd forgets it too."""
    used = {doors.control, *doors.http, *(s for group in doors.models.values() for s in group)}
    for name, sockets in kept.items():
        if used.isdisjoint(sockets):
            keeper.drop_fds(name)
            for sock in sockets:
                sock.close()


def _http_doors(
    stack: ExitStack,
    listen: tuple[str, ...],
    kept: dict[str, list[socket.socket]],
    keeper: Notifier | None,
) -> tuple[socket.socket, ...]:
    doors: list[socket.socket] = []
    for text in listen:
        name = f"http-{text}".replace(":", "-")
        mine = kept.get(name) or _listen(stack, text, name, keeper)
        doors.extend(mine)
    return tuple(doors)


def _model_doors(
    stack: ExitStack,
    models: Mapping[ModelId, str],
    kept: dict[str, list[socket.socket]],
    keeper: Notifier | None,
) -> Mapping[ModelId, tuple[socket.socket, ...]]:
    doors = {}
    for model, at in models.items():
        try:
            doors[model] = _http_doors(stack, (at,), kept, keeper)
        except CannotServe as error:
            log.warning('no door of its own for "%s": %s', model, error)
    return doors


def _listen(stack: ExitStack, text: str, name: str, keeper: Notifier | None) -> list[socket.socket]:
    try:
        # the containers' bridge comes with the first container, long after us
        early = text.startswith(f"{CONTAINER_GATEWAY}:")
        sockets = listening(*parse_listen(text, 9000), early=early)
    except Fault as fault:
        raise CannotServe(fault.message, fault.hint) from fault
    except ValueError as error:
        raise CannotServe(f"cannot listen: {error}") from error
    for sock in sockets:
        stack.callback(sock.close)
    if keeper is not None:
        keeper.store_fds(name, [sock.fileno() for sock in sockets])
    return sockets


def _control_door(
    stack: ExitStack,
    path: str,
    group: str | None,
    kept: dict[str, list[socket.socket]],
    keeper: Notifier | None,
) -> socket.socket:
    if _CONTROL in kept:
        return kept[_CONTROL][0]
    try:
        if keeper is None:
            return stack.enter_context(control_socket(path, group=group))
        sock = listen_unix(path, group=group)
    except SocketInUse as error:
        raise CannotServe(str(error), f"homegptctl --socket {path} status") from error
    except LookupError as error:
        raise CannotServe(f"cannot give {path} to its group: {error}") from error
    except OSError as error:
        raise CannotServe(f"cannot listen at {path}: {error.strerror}") from error
    stack.callback(sock.close)
    keeper.store_fds(_CONTROL, [sock.fileno()])
    return sock
