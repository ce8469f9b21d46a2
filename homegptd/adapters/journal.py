"""Where the log goes: journald with its fields, or lines on stderr for a person."""

import array
import errno
import fcntl
import logging
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

JOURNAL = Path("/run/systemd/journal/socket")
IDENTIFIER = "homegptd"

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_COLOURS = ((logging.ERROR, "\x1b[31m"), (logging.WARNING, "\x1b[33m"))
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def configure_logging(
    level: str | int,
    environ: Mapping[str, str],
    *,
    journal: Path = JOURNAL,
    stream: TextIO | None = None,
) -> logging.Handler:
    """Set up the root logger; returns its one handler. `level` is for our own lines.

    To journald where JOURNAL_STREAM says that `stream` (stderr) leads there, else lines on it. Ours
    at `level`, libraries' from WARNING on. `extra={"fields": {"MODEL_ID": …}}` adds fields.
    """
    stream = sys.stderr if stream is None else stream
    handler: logging.Handler
    if _leads_to_journal(stream, environ.get("JOURNAL_STREAM", "")) and journal.exists():
        handler = JournalHandler(journal)
    else:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(LineFormatter(colour=_wants_colour(stream, environ)))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("homegptd").setLevel(level.upper() if isinstance(level, str) else level)
    return handler


def _leads_to_journal(stream: TextIO, told: str) -> bool:
    """JOURNAL_STREAM is `device:inode` of the stream, see systemd.exec(5).

    Both are compared, because terminals started by systemd hand the variable down to the shell.
    """
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return told == f"{found.st_dev}:{found.st_ino}"


def _wants_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    with suppress(ValueError):
        return stream.isatty() and "NO_COLOR" not in environ and environ.get("TERM") != "dumb"
    return False


class JournalHandler(logging.Handler):
    """journald's native protocol, one datagram a record: systemd.io/JOURNAL_NATIVE_PROTOCOL.

    Never blocks and never raises. Where journald does not keep up (EAGAIN; seen in bursts of some
    thousand lines) a record is dropped and counted, and the next one that arrives is followed by
    the count.
    """

    def __init__(self, journal: Path = JOURNAL) -> None:
        super().__init__()
        self.dropped = 0
        self._untold = 0
        self._journal = str(journal)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(_encode(self._fields(record)))
        except Exception:  # noqa: BLE001  # a log line must not end what it tells about
            self.dropped += 1
            self._untold += 1
            return
        self._tell_dropped()

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _tell_dropped(self) -> None:
        if not self._untold:
            return
        message = f"{self._untold} log lines were lost on their way to journald"
        fields = {"MESSAGE": message, "PRIORITY": 4, "SYSLOG_IDENTIFIER": IDENTIFIER}
        with suppress(OSError):
            self._send(_encode(fields))
            self._untold = 0

    def _fields(self, record: logging.LogRecord) -> dict[str, object]:
        told = {**fields_of(record), **getattr(record, "journal", {})}
        given = {_field_name(name): value for name, value in told.items()}
        own = {
            "MESSAGE": self.format(record),
            "PRIORITY": _priority(record.levelno),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
        }
        return {name: value for name, value in (given | own).items() if name and value is not None}

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, self._journal)
        except OSError as error:
            if not _too_long(error):
                raise
            self._send_large(data)

    def _send_large(self, data: bytes) -> None:
        """By a sealed memfd: journald refuses one that could still change."""
        memfd = os.memfd_create("homegptd-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(memfd, rest) :]
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memfd]))
            self._socket.sendmsg([], [rights], 0, self._journal)
        finally:
            os.close(memfd)


class LineFormatter(logging.Formatter):
    """`12:03:04 awake    qwen3-8b  took=3.1s`: time, message, then the fields it has not said."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        said = super().format(record)
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        message, newline, traceback = said.partition("\n")
        if record.levelno >= logging.WARNING:
            message = f"{record.levelname.lower()}: {message}"
        fields = "".join(f" {field}" for field in _unsaid(record, message))
        fields = f" {fields}" if fields else ""
        if not self._colour:
            return f"{at} {message}{fields}{newline}{traceback}"
        return (
            f"{_DIM}{at}{_PLAIN} {_paint(record.levelno, message)}"
            f"{_DIM}{fields}{_PLAIN}{newline}{traceback}"
        )


def fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    """What the caller gave as `extra={"fields": …}`; `"journal"` is for journald alone."""
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def _unsaid(record: logging.LogRecord, message: str) -> list[str]:
    words = {word.strip("\"'`()[],:;.") for word in message.split()}
    unsaid = []
    for name, value in fields_of(record).items():
        key, text = name.lower().removesuffix("_id"), str(value)
        known = text in message if " " in text else text in words
        if value is not None and key != "message" and not known:
            unsaid.append(f'{key}="{text}"' if " " in text or not text else f"{key}={text}")
    return unsaid


def _paint(level: int, message: str) -> str:
    for at_least, colour in _COLOURS:
        if level >= at_least:
            return f"{colour}{message}{_PLAIN}"
    return message


def _priority(level: int) -> int:
    """syslog(3)'s numbers, debug being 7."""
    return next((number for at_least, number in _PRIORITIES if level >= at_least), 7)


def _field_name(name: str) -> str:
    """journald drops fields that are not [A-Z0-9_]{1,64} or begin with a digit or underscore."""
    return re.sub(r"[^A-Z0-9_]", "_", name.upper()).lstrip("_0123456789")[:64]


def _encode(fields: Mapping[str, object]) -> bytes:
    return b"".join(_encode_field(name, value) for name, value in fields.items())


def _encode_field(name: str, value: object) -> bytes:
    data = str(value).encode("utf-8", "backslashreplace")
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)


def _too_long(error: OSError) -> bool:
    return error.errno in {errno.EMSGSIZE, errno.ENOBUFS}
