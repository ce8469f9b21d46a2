"""The log file of an engine: opened afresh at each start, kept small, read from its end."""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

LOG_CAP_BYTES = 8 * 2**20
LOOK_EVERY_S = 30.0
TAIL_BYTES = 256 * 2**10


def cap_log(path: Path, cap_bytes: int) -> None:
    """Past the cap: keep a copy as `.1` and begin anew. The engine appends, so it goes on at 0.

    Lines written between the copy and the cut are lost; a renamed file would keep growing.
    """
    with suppress(OSError):
        if path.stat().st_size <= cap_bytes:
            return
        with suppress(OSError):  # a full disk: then without a copy
            shutil.copyfile(path, _previous(path))
        os.truncate(path, 0)


def open_log(path: Path) -> int:
    """A descriptor to append to; /dev/null where no log can be written: the engine matters more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(_previous(path))
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        log.warning("cannot write the engine's log %s: %s", path, reason)
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def tail(path: Path, lines: int) -> tuple[str, ...]:
    """Non-empty lines from the file's end; of a progress bar redrawn with \\r its last state."""
    if lines <= 0:
        return ()
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            block, wanted = b"", min(size, 16 * 2**10)
            while wanted:
                file.seek(size - wanted)
                block = file.read(wanted)
                if wanted in (size, TAIL_BYTES) or block.count(b"\n") > lines * 2:
                    break
                wanted = min(size, wanted * 4, TAIL_BYTES)
    except OSError:
        return ()
    texts = (line.rstrip().rpartition("\r")[2] for line in _split(block))
    return tuple(text for text in texts if text.strip())[-lines:]


def last_words(path: Path) -> str:
    """The newest line that may say why: ordinary news (INFO, each request) does not."""
    said = (line.strip() for line in reversed(tail(path, 50)))
    return next((line[:300] for line in said if "INFO" not in line), "")


def _split(block: bytes) -> list[str]:
    return block.decode(errors="replace").split("\n")
