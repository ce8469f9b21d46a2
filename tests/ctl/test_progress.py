"""What a live switch says while it waits."""

from __future__ import annotations

import io
from typing import Any

import pytest

from homegptd.ctl.operations import total
from homegptd.ctl.progress import Progress

from .test_render import box, model, terminal


def step(do: str, name: str, state: str, seconds: float | None = None, **more: Any) -> Any:
    expected = None if do in {"drain", "prove"} else 2.6
    return {"do": do, "model": name, "state": state, "seconds": seconds,
            "expected_s": expected} | more  # fmt: skip


def operation(*steps: Any, elapsed_s: float = 0.0, **more: Any) -> Any:
    return {
        "id": 7, "kind": "switch", "model": "gemma", "by": "root", "since": 0.0, "state": "running",
        "outcome": None, "error": None, "steps": list(steps), "elapsed_s": elapsed_s,
        "expected_s": 2.6,
    } | more  # fmt: skip


class Shown:
    """A progress on a terminal of 100 columns, or on none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, tty: bool = True, **options: Any):
        style = terminal(100, monkeypatch, NO_COLOR="1")
        style.tty = tty
        self.stream = io.StringIO()
        self.progress = Progress(self.stream, style, **options)

    @property
    def line(self) -> str:
        """The line that stands there now."""
        return self.stream.getvalue().rpartition("\x1b[K")[2]

    @property
    def text(self) -> str:
        return self.stream.getvalue()


DRAINING = model("llama", "draining", why="makes room; 1 answer still running")
PROVING = model("qwen3", "proving", why="trying out freeze")


def test_a_drain_says_what_it_waits_for_and_how_to_cut_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    steps = [step("drain", "llama", "running", 10.0), step("wake", "gemma", "waiting")]
    shown.progress.update(operation(*steps, elapsed_s=10.0))
    shown.progress.look(box(DRAINING, model("gemma", "asleep")))
    assert "to cut them: homegptctl switch gemma --now\n" in shown.text
    assert shown.line == "▸ drain llama  10 s  makes room; 1 answer still running"
    shown.progress.look(box(DRAINING))
    assert shown.text.count("--now") == 1


def test_nobody_who_cuts_answers_is_told_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch, cuts=True)
    shown.progress.update(operation(step("drain", "llama", "running", 10.0), elapsed_s=10.0))
    shown.progress.look(box(DRAINING))
    assert "--now" not in shown.text


def test_before_its_first_step_it_says_what_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    shown.progress.update(operation(step("wake", "gemma", "waiting"), elapsed_s=1.0))
    shown.progress.look(box(PROVING, model("gemma", "asleep")))
    assert shown.line.endswith("waiting for qwen3: trying out freeze")
    first = operation(id=3, model="b", kind="stop")
    shown.progress.look(box(model("gemma", "asleep"), operations=[first]))
    assert shown.line.endswith("waiting for operation 3: stop b")


def test_the_reason_of_one_step_is_not_shown_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    shown.progress.update(operation(step("drain", "llama", "running", 1.0)))
    shown.progress.look(box(DRAINING))
    shown.progress.update(operation(step("drain", "llama", "done", 1.0),
                                    step("wake", "gemma", "running", 0.5)))  # fmt: skip
    assert shown.line.startswith("▸ wake gemma  0.5 s of about 2.6 s  (")


def test_a_step_that_failed_gets_no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch, tty=False)
    shown.progress.update(operation(step("start", "gemma", "failed", 1.0)))
    assert "✗ start gemma  1.0 s" in shown.text
    assert "✓" not in shown.text


def test_without_a_terminal_each_reason_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch, tty=False)
    shown.progress.update(operation(step("drain", "llama", "running", 1.0)))
    for _ in range(3):
        shown.progress.look(box(DRAINING))
    assert shown.text == (
        "operation 7: switch gemma, about 2.6 s after the drain\n"
        "  drain llama\n  makes room; 1 answer still running\n"
    )


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (operation(step("wake", "a", "running"), elapsed_s=1.0), "1.0 s of about 2.6 s"),
        (operation(step("wake", "a", "running"), elapsed_s=10.0), "10 s"),
        (operation(step("drain", "a", "running"), elapsed_s=1.0), "1.0 s"),
        (operation(step("drain", "a", "done"), elapsed_s=1.0), "1.0 s of about 2.6 s"),
        (operation(elapsed_s=1.0, expected_s=None), "1.0 s"),
    ],
)
def test_a_total_that_cannot_come_true_is_left_out(view: Any, text: str) -> None:
    assert total(view) == text
