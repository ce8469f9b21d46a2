"""The names of the models, from the daemon, quickly or not at all."""

from __future__ import annotations

from .asked import Stop, nearest
from .client import Client, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from homegptd.wire.control import StatusView

    from .asked import Asked


def names(path: str, *, limit_s: float = 0.5) -> list[str]:
    """Ids and aliases; none if the daemon does not answer in time."""
    view = _status(path, limit_s)
    models = view["models"] if view else []
    return [name for model in models for name in (model["id"], *model["aliases"])]


def numbers(path: str, *, limit_s: float = 0.5) -> list[str]:
    """Those of the operations that run; none if the daemon does not answer in time."""
    view = _status(path, limit_s)
    return [str(operation["id"]) for operation in view["operations"]] if view else []


def _status(path: str, limit_s: float) -> StatusView | None:
    try:
        with Client(path, limit_s=limit_s) as client:
            view: StatusView = client.call("status")
    except Stop:
        return None
    return view


def near_model(path: str, word: str) -> str | None:
    """The model that was probably meant."""
    known = names(path)
    lower = {name.lower(): name for name in known}
    found = nearest(word.lower(), list(lower))
    if found is None:  # "qwen" for "qwen3-vl-32b": too short to be near, but a beginning
        found = next((name for name in lower if name.startswith(word.lower())), None)
    return lower[found] if found else None


def with_near_model(asked: Asked, refusal: Refusal) -> Stop:
    """An unknown model may be a slip of the fingers; the daemon's own hint stays if it has one."""
    if refusal.reason != "unknown-model" or not asked.words:
        return refusal
    near = near_model(asked.socket, asked.words[0])
    if near:
        refusal.hint = f"did you mean {near}?"
    return refusal
