"""`doctor --gpu`: what only a card can show, measured by the daemon on every model.

Each model is woken, put to sleep and woken again: what it holds, what comes back, what it keeps,
the host RAM that it pins, how long each takes, and whether the books agree with the driver.
"""

from __future__ import annotations

from time import monotonic

from .asked import Stop
from .client import Client, ask
from .host import FAILED, REFUSED, confirm
from .render import clean, gib, out

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from homegptd.wire.control import MemoryModelView, MemoryReport

    from .asked import Asked

SWITCH_S = 1800.0
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}
_ASTRAY_MIB = 1024
"""By how much the books may be above or below what the driver says."""


def exercise(asked: Asked, *, running: bool) -> list[dict[str, Any]]:
    """One row for the driver, one for each model and level. Raises: Stop."""
    if not running:
        text = "doctor --gpu works through the daemon, which does not run"
        raise Stop(text, code=3, hint="sudo systemctl start homegpt", reason="absent")
    report: MemoryReport = ask(asked.socket, "memory")
    rows = [_say(asked, _driver(report))]
    if not report["measures"]:
        return rows
    if not asked.json and not confirm(asked, "this switches every model once; go on?"):
        raise Stop("nothing was measured", code=REFUSED, reason="cancelled")
    status = ask(asked.socket, "status")
    for model in status["models"]:
        if model["status"] != "disabled":
            rows += [_say(asked, row) for row in _model(asked, model["id"])]
    rows.append(_say(asked, _books(ask(asked.socket, "memory"))))
    return rows


def _driver(report: MemoryReport) -> dict[str, Any]:
    if not report["measures"]:
        said = "nothing measures: no driver, or nvidia-ml-py is missing (the extra gpu)"
        return _row("driver", "fail", said)
    cards = [f"{place['name']} {gib(place['total_mib'])} GB"
             for place in report["places"] if place["gpu"] is not None]  # fmt: skip
    return _row("driver", "ok", ", ".join(cards))


def _books(report: MemoryReport) -> dict[str, Any]:
    """What is left by the books must be there; more than that is only careful."""
    wrong = [
        f"{place['name']}: {gib(place['left_mib'])} GB left by the books, {gib(free)} free"
        for place in report["places"]
        if (free := place["free_mib"]) is not None and place["left_mib"] - free > _ASTRAY_MIB
    ]
    said = "; ".join(wrong) or "no more is promised than is free"
    return _row("books", "fail" if wrong else "ok", said)


def _model(asked: Asked, model: str) -> list[dict[str, Any]]:
    """At each level that works here."""
    rows = [_cycle(asked, model, 1)]
    try:
        _do(asked, "switch", model)
        _do(asked, "sleep", model, level=2)
    except Stop as stop:
        return [*rows, _row(model, "skip", f"no level 2: {stop.message}", level=2)]
    return [*rows, _cycle(asked, model, 2)]


def _cycle(asked: Asked, model: str, level: int) -> dict[str, Any]:
    try:
        woke_s = _do(asked, "switch", model)
        awake = _seen(asked, model)
        slept_s = _do(asked, "sleep", model, level=level)
        asleep = _seen(asked, model)
        again_s = _do(asked, "switch", model)
        again = _seen(asked, model)
    except Stop as stop:
        return _row(model, "fail", stop.message, level=level)
    was, kept = _on_gpus(awake), _on_gpus(asleep)
    freed, grown = was - kept, _on_gpus(again) - was
    host = asleep["holds_host_mib"]
    pinned = _figure(asleep, "pinned")
    good = freed > was / 2 and grown < max(_ASTRAY_MIB, 0.05 * was)
    said = (
        f"level {level}: {gib(was)} GB awake, {gib(freed)} freed in {slept_s:.1f} s, {gib(kept)} "
        f"kept; woken in {again_s:.1f} s, then {gib(grown)} more; "
        f"{gib(host or 0)} GB of host RAM"
    )
    return _row(model, "ok" if good else "fail", said, level=level) | {
        "awake_mib": was, "freed_mib": freed, "kept_mib": kept, "grown_mib": grown,
        "pinned_mib": pinned, "host_mib": host,
        "brought_up_s": woke_s, "slept_s": slept_s, "woke_s": again_s,
    }  # fmt: skip


def _seen(asked: Asked, model: str) -> MemoryModelView:
    report: MemoryReport = ask(asked.socket, "memory", {"model": model})
    return report["models"][0]


def _on_gpus(view: MemoryModelView) -> int:
    return sum((view["holds_gpu_mib"] or {}).values())


def _figure(view: MemoryModelView, kind: str) -> int:
    return next((one["mib"] for one in view["figures"] if one["kind"] == kind), 0)


def _do(asked: Asked, verb: str, model: str, **more: object) -> float:
    """Carry out a verb to its end; seconds it took. Raises: Stop."""
    began = monotonic()
    with Client(asked.socket, limit_s=SWITCH_S) as client:
        view = client.call(verb, {"model": model, "wait": True, **more})
    if view["state"] != "done":
        error = view["error"] or {}
        raise Stop(error.get("message") or f"{verb} {model}: {view['state']}", code=FAILED)
    return monotonic() - began


def _row(model: str, verdict: str, said: str, level: int | None = None) -> dict[str, Any]:
    return {"model": model, "level": level, "verdict": verdict, "said": said}


def _say(asked: Asked, row: dict[str, Any]) -> dict[str, Any]:
    if not asked.json:
        mark = out().paint(row["verdict"].ljust(4), _COLOURS[row["verdict"]])
        print(f"{mark}  {clean(row['model'])}: {clean(row['said'])}")
    return row
