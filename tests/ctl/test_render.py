"""How things look: widths, durations, bars, colours."""

from __future__ import annotations

import io
from typing import Any

import pytest

from homegptd.ctl import render
from homegptd.ctl.render import Style
from homegptd.ctl.status import lines


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def terminal(width: int, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Style:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Style(Terminal())


def model(name: str, phase: str, **more: Any) -> dict[str, Any]:
    return {
        "id": name, "name": name, "aliases": [], "status": "active", "phase": phase, "since": 100.0,
        "level": None, "gpus": [0], "memory_mib": {"gpu": 58368, "host": 0},
        "requests": {"running": 0, "waiting": 0, "frozen": 0}, "until": None, "why": "idle",
        "default": False, "pinned": False, "error": None,
    } | more  # fmt: skip


def box(*models: dict[str, Any], **more: Any) -> Any:
    return {
        "version": "0.1.0", "pid": 1, "started_at": 0.0, "now": 4000.0, "ready": True,
        "phase_of_daemon": "ready", "summary": "all well", "default": None, "models": list(models),
        "queue": [], "gpus": [], "host": {"total_mib": 1024, "used_mib": 512}, "operations": [],
    } | more  # fmt: skip


LONG = model(
    "qwen3-next-80b-a3b-thinking", "asleep", level=1, memory_mib={"gpu": 1228, "host": 46080},
    requests={"running": 0, "waiting": 14, "frozen": 1}, until=4724.0,
    why="held by an operator's switch, then wakes for 14 requests",
)  # fmt: skip


def test_eighty_columns_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    style = terminal(80, monkeypatch, NO_COLOR="1")
    failed = model("a", "down", status="error", error={"message": "out of memory", "hint": None})
    shown = lines(box(LONG, failed, model("b", "falling-asleep", default=True)), style)
    assert max(map(len, shown)) <= 80
    text = "\n".join(shown)
    assert "qwen3-next-80b-a3b-thinking" in text
    assert "12:04 held by an operator's switch, then wakes for 14 requests" in text
    assert "✗ failed" in text
    assert "out of memory" in text
    assert "* b" in text


@pytest.mark.parametrize("width", [24, 40, 60, 79, 81, 200])
def test_no_line_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    gpu = {"index": 0, "name": "Toy 80", "total_mib": 81920, "used_mib": 4096,
           "reserved_mib": 64000, "free_mib": 13824}  # fmt: skip
    queue = [{"model": "qwen3-next-80b-a3b-thinking", "waiting": 14, "since": 3900.0}]
    summary = "ready: qwen3-next-80b-a3b-thinking awake, 3 asleep; 2 running, 14 waiting"
    view = box(LONG, model("b", "waking"), gpus=[gpu], queue=queue, summary=summary)
    shown = lines(view, terminal(width, monkeypatch, NO_COLOR="1"))
    assert max(map(len, shown)) <= width
    text = "\n".join(shown)
    assert "qwen3" in text
    assert "◐ waking" in text
    assert ("qwen3-next-80b-a3b-thinking  ○ asleep L1" in text) == (width >= 60)


def test_columns_go_one_after_the_other_when_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = box(model("model-of-eleven", "awake"))
    headers = {
        width: next(line.split() for line in lines(view, style) if line.startswith("  MODEL"))
        for width in (100, 50, 45, 36, 28)
        if (style := terminal(width, monkeypatch, NO_COLOR="1"))
    }
    assert headers == {
        100: ["MODEL", "STATE", "SINCE", "MEMORY", "REQS", "WHY"],
        50: ["MODEL", "STATE", "SINCE", "MEMORY", "REQS"],
        45: ["MODEL", "STATE", "MEMORY", "REQS"],
        36: ["MODEL", "STATE", "REQS"],
        28: ["MODEL", "STATE"],
    }


def test_the_heading_breaks_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    view = box(summary="ready: gemma-3-27b awake, 3 asleep; 2 running")
    shown = lines(view, terminal(40, monkeypatch, NO_COLOR="1"))
    assert shown == ["homegptd 0.1.0, up 1h06; ready:", "  gemma-3-27b awake, 3 asleep; 2 running"]


def test_a_time_that_is_over_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    style = terminal(100, monkeypatch)
    shown = "\n".join(lines(box(model("a", "awake", until=3990.0)), style))
    assert "0:00" not in shown
    assert "UNTIL" not in shown
    shown = "\n".join(lines(box(model("a", "awake", until=4007.5)), style))
    assert "0:07 idle" in shown
    assert "UNTIL / WHY" in shown


def test_reserved_memory_says_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"index": 0, "name": "gpu0", "total_mib": 81920, "used_mib": 4096,
           "reserved_mib": 64000, "free_mib": 13824}  # fmt: skip
    view = box(model("gemma", "proving"), model("b", "draining"), gpus=[gpu])
    shown = lines(view, terminal(80, monkeypatch))[-2]
    assert shown.endswith("4.0 of 80.0 GiB, 62.5 reserved by gemma, 13.5 free")


@pytest.mark.parametrize(
    ("locale", "unicode"),
    [({"LC_ALL": "C"}, False), ({"LC_ALL": "POSIX", "LANG": "C.UTF-8"}, False),
     ({"LC_ALL": "", "LANG": "de_DE.ISO-8859-1"}, False), ({"LC_ALL": "en_GB.UTF-8"}, True),
     ({"LC_CTYPE": "C.UTF-8", "LANG": "C"}, True), ({}, True)],
)  # fmt: skip
def test_only_a_locale_with_unicode_gets_it(
    monkeypatch: pytest.MonkeyPatch, locale: dict[str, str], unicode: bool
) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    style = terminal(80, monkeypatch, **locale)
    assert style.unicode is unicode
    shown = "\n".join(lines(box(LONG, model("b", "awake")), style))
    assert shown.isascii() is not unicode


def test_words_are_not_cut_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    style = terminal(80, monkeypatch)
    assert render.cut("makes room for gemma", 16, style) == "makes room for…"
    assert render.cut("qwen3-next-80b-a3b", 12, style) == "qwen3-next-…"
    assert render.cut("all of it", 9, style) == "all of it"


def test_a_box_without_models_has_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "all well" in lines(box(), terminal(80, monkeypatch))[0]


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal(80, monkeypatch).colour
    assert not terminal(80, monkeypatch, NO_COLOR="1").colour
    assert not terminal(80, monkeypatch, TERM="dumb").colour
    assert not Style(io.StringIO()).colour


def test_the_word_says_what_the_colour_says(monkeypatch: pytest.MonkeyPatch) -> None:
    view = box(LONG, model("b", "awake"), model("c", "down", status="disabled"))
    plain = "\n".join(lines(view, terminal(120, monkeypatch, NO_COLOR="1")))
    coloured = "\n".join(lines(view, terminal(120, monkeypatch)))
    for number in (31, 32, 33, 34, 2, 1, 0):
        coloured = coloured.replace(f"\x1b[{number}m", "")
    assert coloured == plain


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3660, "1h01"),
     (86400, "1d"), (-5, "0s")],
)  # fmt: skip
def test_short_durations(seconds: float | None, text: str) -> None:
    assert render.short(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0.04, "0.0 s"), (9.96, "10 s"), (119, "119 s"),
                          (185.4, "3:05 min")],
)  # fmt: skip
def test_durations_to_wait_for(seconds: float | None, text: str) -> None:
    assert render.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("used", "reserved", "total", "text"),
    [(0, 0, 10, "." * 20), (10, 0, 10, "#" * 20), (5, 2.5, 10, "#" * 10 + "=" * 5 + "." * 5),
     (20, 5, 10, "#" * 20), (1, 1, 0, "." * 20)],
)  # fmt: skip
def test_a_bar_is_always_twenty_wide(used: float, reserved: float, total: float, text: str) -> None:
    assert render.bar(Style(Ascii()), used, reserved, total) == f"[{text}]"


class Ascii(io.StringIO):
    encoding = "ascii"  # type: ignore[assignment]
