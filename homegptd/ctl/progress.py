"""The progress of an operation: a line that redraws on a terminal, plain lines elsewhere."""

from __future__ import annotations

from time import monotonic

from .operations import foreseen, running_step, spent, step_name, title, total, waits_for
from .render import clean, cut, seconds_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

    from homegptd.wire.control import OperationView, StatusView, StepView

    from .render import Style

_PATIENCE_S = 2.0  # a drain that ends within this needs no advice


class Progress:
    """Shows one operation: `update` with each view, `tick` in between, `end` before other words.

    `look` tells it of the box, from where the reasons for waiting come.
    """

    def __init__(self, stream: TextIO, style: Style, *, cuts: bool = False) -> None:
        """`cuts`: whether running answers are cut anyway, so that nobody needs to be told how."""
        self._stream = stream
        self._style = style
        self._cuts = cuts
        self._view: OperationView | None = None
        self._why = ""
        self._seen_at = 0.0
        self._told: set[tuple[int, str]] = set()

    def update(self, view: OperationView) -> None:
        """Tell each step's end once, and draw the line anew."""
        if self._view is None:
            self._say(f"operation {view['id']}: {title(view)}{foreseen(view)}")
        elif _doing(view) != _doing(self._view):
            self._why = ""  # it was another step's
        self._view, self._seen_at = view, monotonic()
        for number, step in enumerate(view["steps"]):
            if step["state"] in {"done", "failed"}:
                self._once(number, "done", self._over(step))
            elif step["state"] == "running" and not self._style.tty:
                self._once(number, "running", f"  {step_name(step)}{_about(step['expected_s'])}")
        self.tick()

    def look(self, status: StatusView) -> None:
        """Learn from the status what it waits for."""
        view = self._view
        if view is None:
            return
        self._why = waits_for(view, status)
        step = running_step(view)
        number = view["steps"].index(step) if step else -1
        if self._why and not self._style.tty:
            self._once(number, "why", f"  {self._why}")
        if step and step["do"] == "drain" and self._ago(step["seconds"]) > _PATIENCE_S:
            self._advise(view, number)
        self.tick()

    def tick(self) -> None:
        """Draw the line of the running step; time goes on between two views."""
        view = self._view
        if view is None or not self._style.tty:
            return
        in_all = total(view, self._ago(0.0))
        step = running_step(view)
        if step is None:
            self._draw(f"  {title(view)}  {in_all}  {self._why}".rstrip())
            return
        here = spent(self._ago(step["seconds"]), step["expected_s"])
        rest = self._why or (f"({in_all} in all)" if len(view["steps"]) > 1 else "")
        arrow = "▸" if self._style.unicode else ">"
        self._draw(f"{arrow} {step_name(step)}  {here}  {rest}".rstrip())

    def _ago(self, seconds: float | None) -> float:
        """What was `seconds` when the view was made."""
        return (seconds or 0.0) + monotonic() - self._seen_at

    def _advise(self, view: OperationView, number: int) -> None:
        if view["kind"] in {"switch", "stop"} and not self._cuts:
            command = clean(f"homegptctl {view['kind']} {view['model']} --now")
            self._once(number, "advice", f"  running answers end first; to cut them: {command}")

    def end(self) -> None:
        """Leave a clean line."""
        if self._style.tty:
            self._write("\r\x1b[K")

    def _over(self, step: StepView) -> str:
        usual = f" (usually {seconds_text(step['expected_s'])})" if step["expected_s"] else ""
        if step["state"] == "done":
            tick = self._style.paint("✓" if self._style.unicode else "ok", "green")
        else:
            tick = self._style.paint("✗" if self._style.unicode else "failed", "red")
        took = "" if step["seconds"] is None else f"  {seconds_text(step['seconds'])}{usual}"
        return f"{tick} {step_name(step)}{took}"

    def _once(self, number: int, state: str, line: str) -> None:
        if (number, state) not in self._told:
            self._told.add((number, state))
            self._say(line)

    def _say(self, line: str) -> None:
        self.end()
        self._write(line + "\n")

    def _draw(self, line: str) -> None:
        # one column is left free: some terminals wrap when the last one is written
        width = max(1, self._style.width - 1)
        self._write("\r\x1b[K" + cut(line, width, self._style))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _doing(view: OperationView) -> str:
    step = running_step(view)
    return step_name(step) if step else ""


def _about(expected_s: float | None) -> str:
    return f", about {seconds_text(expected_s)}" if expected_s else ""
