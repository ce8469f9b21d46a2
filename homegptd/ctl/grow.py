"""`add`, `remove`, `pull` and `init`: models come and go by one command each."""

from __future__ import annotations

import sys
from shutil import get_terminal_size

from .asked import Stop, usage
from .host import (
    FAILED,
    REFUSED,
    carry_out,
    confirm,
    daemon_runs,
    faults,
    host,
    need_root,
    show_diff,
)
from .host import places as host_places
from .render import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .asked import Asked


def run(asked: Asked) -> int:
    """Raises: Stop."""
    with faults():
        if asked.verb == "init":
            return _init(asked)
        need_root(asked.verb)
        return {"add": _add, "remove": _remove, "pull": _pull}[asked.verb](asked)


def _add(asked: Asked) -> int:
    places = host_places()
    additions = host("additions")
    wish = additions.Wish(
        model=asked.words[0],
        id=asked.options.get("id"),
        gpus=_gpus(asked.options.get("gpu")),
        gpu_memory_gb=_number(asked.options.get("gpu-memory-gb")),
        args=tuple(asked.lists.get("arg", ())),
        mode=asked.options.get("mode", "sleep"),
    )
    found = additions.addition(wish, places.config.read_text(), places)
    plan = host("apply").plan(places, found.text)
    for reason in found.reasons:
        print(reason)
    show_diff(plan.config_diff())
    if not confirm(asked, f"add {found.id}?"):
        return REFUSED
    if "no-pull" not in asked.options:
        _fetch(plan.config.model(found.id), plan.config, places)
    print("\n".join(carry_out(asked, plan)))
    return _brought_up(asked, found.id, wish.mode)


def _brought_up(asked: Asked, model: str, mode: str) -> int:
    """Follow the start that the daemon begins by itself. Raises: Stop."""
    if mode == "disabled" or not daemon_runs(asked):
        return 0
    from . import acts
    from .client import ask

    def phase() -> str:
        views = ask(asked.socket, "status")["models"]
        return next((str(view["phase"]) for view in views if view["id"] == model), "down")

    asked.words = [model]
    if phase() == "down":
        asked.verb = "start"
        code = acts.run(asked)
        if code or phase() in ("asleep", "awake"):
            return code
    # a start of what is starting is done at once, so what is to come after it is asked for
    asked.verb = "wake" if mode == "active" else "sleep"
    return acts.run(asked)


def _remove(asked: Asked) -> int:
    places = host_places()
    text = host("edit").removed(places.config.read_text(), asked.words[0])
    plan = host("apply").plan(places, text)
    show_diff(plan.config_diff())
    if not confirm(asked, f"remove {asked.words[0]}?"):
        return REFUSED
    print("\n".join(carry_out(asked, plan)))
    return 0


def _pull(asked: Asked) -> int:
    from importlib import import_module

    places = host_places()
    config = import_module("homegptd.config.parse").load(places.config)
    models = config.models
    if asked.words:
        model = config.model(asked.words[0])
        if model is None:
            known = ", ".join(one.id for one in models)
            text = f'there is no model "{asked.words[0]}"'
            raise Stop(text, code=5, hint=f"there are {known}", reason="unknown-model")
        models = (model,)
    fetched = [name for model in models for name in _fetch(model, config, places)]
    if "missing" in asked.options:  # as an engine's unit asks before each start
        for model in models:
            host("pull").note_image(model, places)
    if not fetched and "missing" not in asked.options:
        print("nothing is missing")
    return 0


def _fetch(model: Any, config: Any, places: Any) -> list[str]:
    sys.stdout.flush()
    live = sys.stdout.isatty()
    try:
        fetched: list[str] = host("pull").pull(model, config, places, _live if live else _quiet)
    finally:
        if live:
            print("\r\x1b[K", end="", flush=True)
    for name in fetched:
        print(f"fetched {name}")
    return fetched


def _live(text: str) -> None:
    """One line of a terminal, over and over."""
    print(f"\r\x1b[K{clean(text)[: get_terminal_size().columns - 1]}", end="", flush=True)


def _quiet(text: str) -> None:
    """A journal is no place for a line that changes."""


def _init(asked: Asked) -> int:
    places = host_places()
    text: str = host("additions").proposal(places)
    if "yes" not in asked.options:
        print(text, end="")
        return 0
    need_root("init")
    if places.config.exists() and not _pristine(places):
        message = f"{places.config} is there and was changed; it stays as it is"
        hint = "homegptctl init prints the proposal"
        raise Stop(message, code=FAILED, hint=hint, reason="busy")
    host("files").put(places.config, text)
    print(f"wrote {places.config}; homegptctl doctor looks whether the box is fit for it")
    return 0


def _pristine(places: Any) -> bool:
    """Whether it is the file that the package brought."""
    shipped = places.at("/usr/share/homegpt/config.yaml")
    same: bool = shipped.exists() and shipped.read_bytes() == places.config.read_bytes()
    return same


def _gpus(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        usage(f"--gpu wants numbers such as 0 or 0,1, not {text}")
    return tuple(map(int, parts))


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        usage(f"--gpu-memory-gb wants a number, not {text}")
