"""`doctor`: what is wrong with this box, and the command that mends it."""

from __future__ import annotations

import os
from time import monotonic

from .asked import Stop
from .client import ask
from .host import FAILED, REFUSED, confirm, daemon_runs, host, need_root
from .host import places as host_places
from .render import clean, out, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .asked import Asked

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}
SWITCH_S = 1800.0


def run(asked: Asked) -> int:
    """Exit code 1 if something is wrong. Raises: Stop."""
    root = os.geteuid() == 0
    running = _runs(asked)
    bad = False
    found: list[Any] = []
    gpu = "gpu" in asked.options
    if gpu:
        need_root("doctor --gpu")
    examine = host("doctor").examine
    for one in examine(host_places(), root=root, running=running, inside=gpu):
        bad = bad or one.verdict == "fail"
        found.append(one)
        if not asked.json:
            _show(one)
    measured = _on_gpus(asked, running) if gpu else []
    bad = bad or any(row["verdict"] == "fail" for row in measured)
    if asked.json:
        rows = [{name: getattr(one, name) for name in ("check", "verdict", "said", "mend")}
                for one in found]  # fmt: skip
        print_json({"ok": not bad, "findings": rows, "gpu": measured})
    return FAILED if bad else 0


def _runs(asked: Asked) -> bool:
    try:
        return daemon_runs(asked)
    except Stop:
        return False


def _show(one: Any) -> None:
    style = out()
    mark = style.paint(one.verdict.ljust(4), _COLOURS[one.verdict])
    print(f"{mark}  {one.check.ljust(13)} {clean(one.said)}")
    arrow = "→" if style.unicode else "->"
    if one.mend and one.verdict != "ok":
        print(f"      {' ' * 13} {style.paint(f'{arrow} {clean(one.mend)}', 'bold')}")


# ------------------------------------------------------------ what only a card can show


def _on_gpus(asked: Asked, running: bool) -> list[dict[str, Any]]:
    """Each model awake, asleep and awake again, with what the cards say in between."""
    if not running:
        text = "doctor --gpu works through the daemon, which does not run"
        raise Stop(text, code=3, hint="sudo systemctl start homegpt", reason="absent")
    if not host("box").cards():
        hint = "homegptctl doctor says why"
        raise Stop("nvidia-smi shows no card", code=FAILED, hint=hint, reason="host")
    if not asked.json and not confirm(asked, "this switches every model once; go on?"):
        raise Stop("nothing was measured", code=REFUSED, reason="cancelled")
    status = ask(asked.socket, "status")
    names = [one["id"] for one in status["models"] if one["status"] != "disabled"]
    return [_measured(asked, name) for name in names]


def _measured(asked: Asked, model: str) -> dict[str, Any]:
    try:
        _do(asked, "switch", model)
        awake = _used()
        slept_s = _do(asked, "sleep", model)
        asleep = _used()
        woke_s = _do(asked, "wake", model)
        again = _used()
    except Stop as stop:
        row: dict[str, Any] = {"model": model, "verdict": "fail", "said": stop.message}
    else:
        freed = sum(awake.values()) - sum(asleep.values())
        grown = sum(again.values()) - sum(awake.values())
        good = freed > 0 and grown < max(1024, 0.05 * sum(awake.values()))
        said = f"freed {freed} MiB in {slept_s:.1f} s, woke in {woke_s:.1f} s, then {grown:+} MiB"
        row = {"model": model, "verdict": "ok" if good else "fail", "said": said}
        row |= {"awake_mib": awake, "asleep_mib": asleep, "slept_s": slept_s, "woke_s": woke_s}
    if not asked.json:
        mark = out().paint(row["verdict"].ljust(4), _COLOURS[row["verdict"]])
        print(f"{mark}  {model}: {clean(row['said'])}")
    return row


def _do(asked: Asked, verb: str, model: str) -> float:
    """Carry out a verb to its end; seconds it took. Raises: Stop."""
    from .client import Client

    began = monotonic()
    with Client(asked.socket, limit_s=SWITCH_S) as client:
        view = client.call(verb, {"model": model, "wait": True})
    if view["state"] != "done":
        error = view["error"] or {}
        raise Stop(error.get("message") or f"{verb} {model}: {view['state']}", code=FAILED)
    return monotonic() - began


def _used() -> dict[int, int]:
    return {card.index: card.used_mib for card in host("box").cards()}
