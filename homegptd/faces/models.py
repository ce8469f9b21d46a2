"""The models as clients see them: by id or alias, and as a list, from memory alone."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TypeVar

from homegptd.core.model import ModelId
from homegptd.core.refusals import Reason, Refusal
from homegptd.wire import control as wire

from . import sight
from .adjust import Adjustment
from .clients import Client, asking
from .desk import Desk
from .errors import Problem

T = TypeVar("T")

_LONGEST = 100
"""Characters of a name that is worth a search, and is shown."""
VIRTUAL = ("active", "default")
"""Names that mean a model without naming it."""


class Models:
    """The model list of the OpenAI API, from the newest snapshot.

    With `only` it is the list of a door to that one model: others are not there. Nor are those that
    the client who asks may not use.
    """

    def __init__(self, desk: Desk, only: ModelId | None = None) -> None:
        self._desk = desk
        self._only = only

    def find(self, name: str) -> ModelId | None:
        found = self._desk.resolve(name)
        return found if found is not None and self._shows(found) else None

    def _shows(self, model: ModelId) -> bool:
        return self._only in (None, model) and asking().sees(model)

    def as_is(self, name: str, client: Client, kinds: frozenset[str] | None) -> ModelId | None:
        """The model of that very id, where a request of these kinds goes to it as it came."""
        model, desk = ModelId(name), self._desk
        if model not in desk.known() or self._only not in (None, model) or not client.sees(model):
            return None
        fits = kinds is None or desk.kinds.get(model) in (None, *kinds)
        return model if fits and not desk.adjustments.get(model) else None

    def is_known_to(self, model: ModelId, name: str | None) -> bool:
        """Whether the engine of `model` answers to this name."""
        if name == model:
            return True
        if name is None or self._desk.resolve(name) is None:
            return False  # none, or a virtual one
        return model not in self._desk.by_id_only

    def kind(self, model: ModelId) -> str | None:
        """What the model is for, as configured; None where that is not known."""
        return self._desk.kinds.get(model)

    def default(self) -> ModelId | None:
        """The model of a request that names none."""
        model = self._only or self._desk.default()
        return model if model is not None and self._shows(model) else None

    def adjustment(self, model: ModelId) -> Adjustment | None:
        """What the configuration sets in requests for it."""
        return self._desk.adjustments.get(model)

    def virtual(self, name: str, kinds: frozenset[str] | None) -> ModelId | None:
        """What is meant by `default`, and by `active`: the model used last of those that are awake
        and of these kinds, else the default. A model of that very name goes before."""
        if name not in VIRTUAL:
            return None
        awake = self._desk.awake() if name == "active" else ()
        able = (m for m in awake if kinds is None or self.kind(m) in (None, *kinds))
        fit = (model for model in able if self._shows(model))
        return self._only or next(fit, None) or self.default()

    def views(self) -> list[wire.ModelView]:
        """All models that are there for this client, in the order of the configuration."""
        views = [view for view in self._desk.models() if self._shows(ModelId(view["id"]))]
        return self.shown(views)

    def shown(self, told: T, client: Client | None = None) -> T:
        """`told` without the names of models that are not there for the client, or who asks."""
        sees = (client or asking()).sees
        return sight.without(told, [model for model in self._desk.known() if not sees(model)])

    def told(self, problem: Problem, client: Client | None = None) -> Problem:
        """The same for what a client hears instead of an answer."""
        message, hint = (self.shown(text, client) for text in (problem.message, problem.hint or ""))
        return replace(problem, message=message, hint=hint or None)

    def unknown(self, name: str) -> Refusal:
        """Names what is near, or else what there is."""
        known = [each for view in self.views() for each in (view["id"], *view["aliases"])]
        asked = name.lower() if len(name) <= _LONGEST else ""  # the search is quadratic
        near = difflib.get_close_matches(asked, known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}" if near else f"known are {', '.join(known)}"
        hint = hint if known else "this key may use none"
        shown = name if len(name) <= _LONGEST else name[:_LONGEST] + "…"
        return Refusal(Reason.UNKNOWN_MODEL, f'there is no model "{shown}"', hint=hint)

    def listed(self) -> dict[str, object]:
        """The answer to GET /v1/models: all models, whatever their state."""
        return {"object": "list", "data": self.entries()}

    def entries(self) -> list[dict[str, object]]:
        return [self._entry(view) for view in self.views()]

    def entry(self, name: str) -> dict[str, object] | None:
        """The answer to GET /v1/models/NAME; None where there is no such model."""
        model = self.find(name) or self.virtual(name, None)
        views = (view for view in self.views() if view["id"] == model)
        return next((self._entry(view) for view in views), None)

    def _entry(self, view: wire.ModelView) -> dict[str, object]:
        """State goes under a key of our own: some clients hide models by a `status` they know."""
        return {
            "id": view["id"],
            "object": "model",
            "created": int(self._desk.started_at),
            "owned_by": "homegpt",
            "homegpt": {key: view[key] for key in ("name", "aliases", "status", "why")},
        }
