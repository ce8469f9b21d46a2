"""sd_notify(3), through PyPI `sdnotify` behind one guard."""

import logging
import os
import re
import socket
import time
import unicodedata
import warnings
from collections.abc import Mapping, Sequence

import sdnotify

log = logging.getLogger(__name__)

STATUS_MAX = 512
"""Characters. systemd drops datagrams beyond 4096 bytes (PIPE_BUF), READY=1 included."""
PATIENCE_S = 1.0
"""How long READY, RELOADING and STOPPING wait where systemd's queue is full; others are dropped."""

_SPELLED = str.maketrans(
    {
        "\N{RIGHTWARDS ARROW}": "->",
        "\N{LEFTWARDS ARROW}": "<-",
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "-",
        "\N{MULTIPLICATION SIGN}": "x",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LATIN SMALL LETTER SHARP S}": "ss",
        "\N{MIDDLE DOT}": "-",
    }
)


class Notifier:
    """Fits `NotifyPort`. Never raises; does nothing where no NOTIFY_SOCKET is set.

    sdnotify 0.3.2 encodes as Latin-1 and by default swallows what that raises: one arrow in STATUS
    loses the READY=1 beside it. Hence `debug=True` and ASCII only; a failure is logged once.
    """

    def __init__(self) -> None:
        self._failing = False
        self._systemd = self._connect() if os.environ.get("NOTIFY_SOCKET") else None

    def ready(self, status: str) -> None:
        self._send("READY=1", _status(status), patience_s=PATIENCE_S)

    def status(self, text: str) -> None:
        self._send(_status(text))

    def extend(self, seconds: float) -> None:
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """The time must come in the same message, see Type=notify-reload in systemd.service(5)."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}", patience_s=PATIENCE_S)

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", _status(status), patience_s=PATIENCE_S)

    def store_fds(self, name: str, fds: Sequence[int]) -> None:
        """Let systemd keep `fds` over a restart; they come back as LISTEN_FDS under `name`.

        Needs FileDescriptorStoreMax= in the unit. sdnotify has no words for it.
        """
        state = f"FDSTORE=1\nFDNAME={_fd_name(name)}"
        if self._systemd is not None:
            sock: socket.socket = self._systemd.socket
            try:
                sock.settimeout(PATIENCE_S)
                socket.send_fds(sock, [state.encode("ascii")], fds)
            except OSError as error:
                self._failed(error)

    def drop_fds(self, name: str) -> None:
        """Let systemd forget what it keeps under `name`."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={_fd_name(name)}", patience_s=PATIENCE_S)

    def close(self) -> None:
        if self._systemd is not None:
            self._systemd.socket.close()
            self._systemd = None

    def _connect(self) -> sdnotify.SystemdNotifier | None:
        try:
            with warnings.catch_warnings():  # it drops its socket unclosed where connect fails
                warnings.simplefilter("ignore", ResourceWarning)
                return sdnotify.SystemdNotifier(debug=True)
        except OSError as error:
            self._failed(error)
            return None

    def _send(self, *assignments: str, patience_s: float = 0.0) -> None:
        if self._systemd is None:
            return
        try:
            self._systemd.socket.settimeout(patience_s)
            self._systemd.notify("\n".join(assignments))
        except (OSError, UnicodeError) as error:
            self._failed(error)
        else:
            self._failing = False

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            log.warning("cannot notify systemd at %s: %s", os.environ["NOTIFY_SOCKET"], error)


def watchdog_interval_s(environ: Mapping[str, str]) -> float | None:
    """How often to ping: half of what systemd allows, in seconds; None where nobody watches us.

    As sd_watchdog_enabled(3) reads WATCHDOG_USEC and WATCHDOG_PID.
    """
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0:
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(usec) / 2e6


def _fd_name(name: str) -> str:
    """As sd_pid_notify_with_fds(3) allows: printable ASCII without a colon."""
    return re.sub(r"[^!-9;-~]", "-", name)[:255]


def _status(text: str) -> str:
    """One line of ASCII: a line break would start another assignment."""
    spelled = unicodedata.normalize("NFKD", text.translate(_SPELLED))
    plain = " ".join(spelled.encode("ascii", "ignore").decode().split())
    plain = re.sub(r"[^ -~]", "", plain)
    return "STATUS=" + (plain if len(plain) <= STATUS_MAX else plain[: STATUS_MAX - 3] + "...")
