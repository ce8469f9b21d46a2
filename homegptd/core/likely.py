"""Which model will be wanted next: by what followed before, and by who was used last.

Simple on purpose. A home has few models and strong habits: one asks a coder, then the chat again.
"""

from collections.abc import Mapping

from .model import Awake, Draining, Engine, ModelId, State

KEPT = 64
"""Wakes that are remembered."""


def likely(state: State, after: ModelId) -> Mapping[ModelId, float]:
    """For each other model the chance to be the next one wanted, once `after` is awake.

    Its share of the weights: one for each time it followed `after` among the last wakes, and one
    more, shared by rank (1, 1/2, 1/3 …) from the one used last, highest priority first. So who
    came never counts little, but never nothing.
    """
    followed: dict[ModelId, int] = {}
    for one, next_one in zip(state.wanted, state.wanted[1:], strict=False):
        if one == after:
            followed[next_one] = followed.get(next_one, 0) + 1
    others = {name: _worth(e) for name, e in state.engines.items() if name != after}
    weights = {
        name: followed.get(name, 0) + 1.0 / (1 + sum(other > worth for other in others.values()))
        for name, worth in others.items()
    }
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _worth(engine: Engine) -> tuple[int, float, bool]:
    return engine.spec.priority, engine.last_used, isinstance(engine.phase, Awake | Draining)
