"""Weights that come back while another engine still answers: then less is left to do afterwards.

Two engines never move memory on one GPU at a time: the weights are there before the other falls
asleep. If nobody wants the model awake any more, they go again, and nothing has happened; vLLM can
do that since 0.31.
"""

from collections.abc import Collection

from . import ledger
from .draft import Draft
from .model import (
    Asleep,
    Awake,
    Draining,
    Engine,
    Gpu,
    ModelId,
    Phase,
    Roused,
    SleepMode,
    State,
)


def rouse(d: Draft, engine: Engine, displaced: Collection[Engine]) -> None:
    """Wake the weights of `engine`, where that is possible and `displaced` are all draining.

    Whoever of them can fall asleep at once does that first.
    """
    phase, drain = engine.phase, all(isinstance(each.phase, Draining) for each in displaced)
    if not isinstance(phase, Asleep) or not drain or not d.quiet(engine.spec.gpus):
        return
    if possible(d.state(), engine, displaced):
        d.rouse(engine.spec.model, phase)


def possible(state: State, engine: Engine, displaced: Collection[Engine]) -> bool:
    """Whether its weights fit beside all there is, while `displaced` have answers that may last."""
    traits, phase = engine.traits, engine.phase
    if not isinstance(phase, Asleep) or phase.frozen or phase.crowded or traits is None:
        return False
    able = state.policy.rouse and traits.can_rouse and ledger.takes_no_more(engine, phase.level)
    if not (able and displaced and all(_answers(each.phase) for each in displaced)):
        return False
    limit = ledger.budget(state)
    return ledger.fits_roused(state.engines, engine.spec.model, phase.level, limit)


def _answers(phase: Phase) -> bool:
    cut = isinstance(phase, Draining) and phase.cut_at is not None
    return isinstance(phase, Awake | Draining) and bool(phase.leases) and not cut


def settle(d: Draft, due: Collection[ModelId]) -> None:
    """Whoever is roused, and not `due` to be awake, goes back to sleep."""
    for name, engine in list(d.engines.items()):
        if name not in due:
            _back_to_sleep(d, engine)


def undo(d: Draft, gpus: tuple[Gpu, ...]) -> bool:
    """Whether somebody who is roused on these GPUs goes back to sleep before a start there.

    That takes minutes, and whoever is wanted on his other GPUs would wait for it as well.
    """
    here = [each for each in d.engines.values() if not set(gpus).isdisjoint(each.spec.gpus)]
    went = [_back_to_sleep(d, engine) for engine in here]
    return any(went)


def _back_to_sleep(d: Draft, engine: Engine) -> bool:
    phase = engine.phase
    if not isinstance(phase, Roused) or not d.quiet(engine.spec.gpus):
        return False
    d.sleep(engine.spec.model, phase.level, mode=SleepMode.WAIT)
    return True
