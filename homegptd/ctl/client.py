"""A blocking client of the control socket: `_socket` alone, because `socket` costs 6 ms."""

from __future__ import annotations

import _socket

from homegptd.wire.lean import call_line, loads
from homegptd.wire.paths import foreign_directory

from .asked import Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class Lost(Exception):
    """The connection ended before the answer."""


class Refusal(Stop):
    """The daemon turned the call down; its reason chooses the exit code."""

    def __init__(self, error: Any) -> None:
        from homegptd.wire.codes import row

        data = error.get("data") or {}
        reason = data.get("reason") or "internal"
        super().__init__(
            error.get("message", ""), code=row(reason).exit, hint=data.get("hint"), reason=reason
        )


class Client:
    """One connection. `call` for an answer, `begin` and `next` for more than that."""

    def __init__(self, path: str, *, limit_s: float = 10.0) -> None:
        """Connect; calls and `call`'s answers may take `limit_s` seconds.

        Raises: Stop, with the reason why there is no daemon.
        """
        stranger = foreign_directory(path)
        if stranger is not None:
            raise _absent(path, f"its directory belongs to user {stranger}, which is not you")
        self.path = path
        self.limit_s = limit_s
        self._buffer = b""
        self._farewell = "it closed the connection without an answer"
        self._last_id = 0
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self._socket.settimeout(limit_s)
        try:
            self._socket.connect(path)
        except OSError as exc:
            self._socket.close()
            from .absent import why

            raise why(path, exc) from None

    def call(self, method: str, params: Mapping[str, object] | None = None) -> Any:
        """The result of a call. Raises: Refusal; Stop when no answer comes."""
        try:
            wanted = self.begin(method, params)
            while True:
                message = self.next(self.limit_s)
                if message is None:
                    silent = f"it does not answer (waited {self.limit_s:.0f} s)"
                    raise _absent(self.path, silent, logged=True)
                if "method" not in message and message.get("id") == wanted:
                    return result_of(message)
        except Lost:
            raise _absent(self.path, self._farewell, logged=True) from None

    def begin(self, method: str, params: Mapping[str, object] | None = None) -> int:
        """Send a call and return its id. Raises: Lost."""
        self._last_id += 1
        self._socket.settimeout(self.limit_s)
        try:
            self._socket.sendall(call_line(self._last_id, method, params))
        except OSError:
            raise Lost from None
        return self._last_id

    def next(self, limit_s: float | None) -> Any:
        """The next message, None if none came in time. Raises: Lost."""
        while b"\n" not in self._buffer:
            self._socket.settimeout(limit_s)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                return None
            except OSError:
                raise Lost from None
            if not data:
                raise Lost
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message: Any = loads(line.decode())
        except ValueError:
            raise _absent(self.path, "what answers there does not speak JSON") from None
        if message.get("method") == "closing":
            self._farewell = message["params"]["message"]
        return message

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(path: str, method: str, params: Mapping[str, object] | None = None) -> Any:
    """Connect, call, close. Raises: Refusal, Stop."""
    with Client(path) as client:
        return client.call(method, params)


def result_of(message: Any) -> Any:
    """The result in an answer. Raises: Refusal."""
    if "error" in message:
        raise Refusal(message["error"])
    return message["result"]


def _absent(path: str, reason: str, *, logged: bool = False) -> Stop:
    from .absent import absent, log_hint

    return absent(path, reason, log_hint() if logged else None)
