"""`homegptctl plan MODEL`: what a switch would do now."""

from __future__ import annotations

from .client import Refusal, ask
from .models import with_near_model
from .render import clean, out, print_json, seconds_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from homegptd.wire.control import PlanView

    from .asked import Asked

DOES_NOT_FIT = 4


def run(asked: Asked) -> int:
    """Print the plan; exit code 4 if it does not fit. Raises: Stop."""
    try:
        view: PlanView = ask(asked.socket, "plan", {"model": asked.words[0]})
    except Refusal as refusal:
        raise with_near_model(asked, refusal) from None
    if asked.json:
        print_json(view)
    else:
        out()
        print("\n".join(lines(view)))
    return 0 if view["fits"] else DOES_NOT_FIT


def lines(view: PlanView) -> list[str]:
    """The plan for people."""
    model = clean(view["model"])
    shown = [_heading(view, model)]
    width = max((len(f"{step['do']} {step['model']}") for step in view["steps"]), default=0)
    for number, step in enumerate(view["steps"], 1):
        name = clean(f"{step['do']} {step['model']}".ljust(width))
        about = seconds_text(step["expected_s"]) if step["expected_s"] is not None else ""
        shown.append(f"  {number}. {name}  {about:>8}  {clean(step['why'])}".rstrip())
    return shown + [f"  {clean(line)}" for line in view["sum"]]


def _heading(view: PlanView, model: str) -> str:
    if not view["fits"]:
        return f"a switch to {model} is not possible now"
    if not view["steps"]:
        return f"{model} is awake, nothing to do"
    count = len(view["steps"])
    return f"a switch to {model} takes {count} {'step' if count == 1 else 'steps'}{_about(view)}"


def _about(view: PlanView) -> str:
    """The forecast with its spread: `, about 6 s (5 to 9 s)`."""
    eta = view.get("eta")
    if not eta or not eta["mid_s"]:
        return ""
    low, high = seconds_text(eta["low_s"]), seconds_text(eta["high_s"])
    return f", about {seconds_text(eta['mid_s'])} ({low} to {high})"
