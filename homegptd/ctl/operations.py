"""What to say of an operation: its figures as far as they mean something, and what it waits for."""

from __future__ import annotations

from .render import MOVING, clean, cut, seconds_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from homegptd.wire.control import ModelView, OperationView, StatusView, StepView

    from .render import Style

_OPEN = ("drain", "prove")  # they take as long as an answer, or a trial, takes


def title(view: OperationView) -> str:
    return clean(" ".join(filter(None, (view["kind"], view["model"]))))


def step_name(step: StepView) -> str:
    return clean(f"{step['do']} {step['model']}".strip())


def running_step(view: OperationView) -> StepView | None:
    return next((step for step in view["steps"] if step["state"] == "running"), None)


def foreseen(view: OperationView) -> str:
    """How long it should take, and what that does not count."""
    if not view["expected_s"]:
        return ""
    drains = any(step["do"] == "drain" and step["state"] != "done" for step in view["steps"])
    return f", about {seconds_text(view['expected_s'])}{' after the drain' if drains else ''}"


def spent(seconds: float, expected_s: float | None) -> str:
    """Seconds so far, of those expected while that can still come true."""
    if not expected_s or seconds > expected_s:
        return seconds_text(seconds)
    return f"{seconds_text(seconds)} of about {seconds_text(expected_s)}"


def total(view: OperationView, ago_s: float = 0.0) -> str:
    """The time of the whole, `ago_s` seconds after the view was made."""
    is_open = any(step["do"] in _OPEN and step["state"] != "done" for step in view["steps"])
    return spent(view["elapsed_s"] + ago_s, None if is_open else view["expected_s"])


def waits_for(view: OperationView, status: StatusView) -> str:
    """Why it does not get on; empty where a step simply takes its time."""
    models = {model["id"]: model for model in status["models"]}
    step = running_step(view)
    if step is None:
        return _before(view, status, models.get(view["model"] or ""))
    model = models.get(step["model"])
    return clean(model["why"]) if model and step["do"] in _OPEN else ""


def _before(view: OperationView, status: StatusView, own: ModelView | None) -> str:
    """What comes before its first, or next, step."""
    for model in [own, *status["models"]] if own else status["models"]:
        if model["phase"] in MOVING:
            return f"waiting for {clean(model['id'])}: {clean(model['why'])}"
    for other in status["operations"]:
        if other["id"] < view["id"]:
            return f"waiting for operation {other['id']}: {title(other)}"
    return "waiting"


def operation_lines(operation: OperationView, style: Style) -> list[str]:
    """A running operation: its figures, then its steps."""
    head = f"operation {operation['id']}: {title(operation)}, {total(operation)}"
    marks = {"done": "✓", "running": "▸", "waiting": "·"} if style.unicode else {}
    steps = [
        f"{marks.get(step['state'], step['state'])} {step_name(step)}"
        for step in operation["steps"]
    ]
    shown = [f"{head}, asked by {clean(operation['by'])}"]
    if steps:
        shown.append("  " + "  ".join(steps))
    return [cut(line, style.width, style) for line in shown]
