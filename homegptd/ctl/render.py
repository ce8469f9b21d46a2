"""How things look in a terminal: colours, bars, durations. Plain text where nobody looks."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "dim": "2", "bold": "1"}
MOVING = (
    "starting",
    "rousing",
    "roused",
    "waking",
    "draining",
    "falling-asleep",
    "stopping",
    "proving",
)
"""Phases of an engine that is on its way somewhere."""


class Style:
    """What a stream can show."""

    __slots__ = ("colour", "tty", "unicode", "width")

    def __init__(self, stream: TextIO) -> None:
        self.tty = stream.isatty()
        self.colour = (
            self.tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        )
        self.unicode = _is_utf8(stream.encoding or "") and _locale_has_unicode()
        self.width = _width(stream) if self.tty else 0  # 0: as long as it takes

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self.colour and colour else text


def _is_utf8(name: str) -> bool:
    return name.lower().replace("-", "") == "utf8"


def _locale_has_unicode() -> bool:
    """What the environment asks for; Python writes UTF-8 even in the C locale (PEP 540)."""
    names = map(os.environ.get, ("LC_ALL", "LC_CTYPE", "LANG"))
    named = next(filter(None, names), "")
    return not named or _is_utf8(named.partition("@")[0].rpartition(".")[2])


def _width(stream: TextIO) -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def out() -> Style:
    """The style of stdout; from now on it takes every character somehow."""
    _forgive(sys.stdout)
    return Style(sys.stdout)


def err() -> Style:
    """The style of stderr."""
    return Style(sys.stderr)


def _forgive(stream: TextIO) -> None:
    """A terminal in the C locale shall show a question mark rather than a traceback."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def clean(text: object) -> str:
    """Text from elsewhere without control characters, which could repaint the terminal."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(mark if mark.isprintable() or mark == "\t" else "?" for mark in shown)


def clean_lines(text: object) -> str:
    """As `clean`, for text that may have several lines."""
    return "\n".join(clean(line) for line in str(text).split("\n"))


def complain(message: object, hint: object = None) -> None:
    """A message and the next step on stderr."""
    print(f"homegptctl: {clean_lines(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {clean_lines(hint)}", file=sys.stderr)


def short(seconds: float | None) -> str:
    """How long, in at most five characters: 12s, 3m, 1h05, 2d."""
    if seconds is None:
        return "-"
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}"
    return f"{whole // 86400}d"


def left(seconds: float) -> str:
    """A countdown: 0:42, 12:04, 2h05."""
    whole = max(0, int(seconds))
    return f"{whole // 60}:{whole % 60:02}" if whole < 3600 else short(whole)


def seconds_text(seconds: float | None) -> str:
    """A duration that somebody waits for: 0.4 s, 12 s, 3:05 min."""
    if seconds is None:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02} min"


def gib(mib: float) -> str:
    """MiB as GiB with one decimal."""
    return f"{mib / 1024:.1f}"


def bar(style: Style, used: float, reserved: float, total: float) -> str:
    """A bar of 20: used, reserved, free."""
    marks = "█▒░" if style.unicode else "#=."
    if total <= 0:
        return f"[{marks[2] * 20}]"
    first = min(20, max(0, round(20 * used / total)))
    second = min(20 - first, max(0, round(20 * reserved / total)))
    return f"[{marks[0] * first}{marks[1] * second}{marks[2] * (20 - first - second)}]"


def cut(text: str, width: int, style: Style) -> str:
    """Text that fits `width`, cut between words where there are some; 0 means no limit."""
    if not width or len(text) <= width:
        return text
    mark = "…" if style.unicode else "~"
    kept = text[: max(0, width - 1)]
    if text[len(kept) : len(kept) + 1] != " " and len(kept.rpartition(" ")[0]) > width // 2:
        kept = kept.rpartition(" ")[0]
    return kept.rstrip() + mark


def wrapped(text: str, style: Style, *, indent: str) -> list[str]:
    """Lines of whole words that fit; `textwrap` would cost 5 ms."""
    if not style.width or len(text) <= style.width:
        return [text]
    shown: list[str] = []
    line = ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > style.width:
            shown.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return [cut(line, style.width, style) for line in [*shown, line]]


def print_json(value: object) -> None:
    """One JSON document, for programs."""
    from json import dumps

    print(dumps(value, indent=2))
