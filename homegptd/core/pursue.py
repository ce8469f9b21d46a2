"""From goals to orders: one pass after another until nothing more can be done now.

A goal claims the GPUs it needs until it is reached; a later goal keeps off them. So goals on
different GPUs go on side by side and those on the same GPU one after the other.
"""

from dataclasses import dataclass, field

from msgspec.structs import replace

from . import foreign, ledger, levels, plans, results, rousing, sums
from .admission import turn_away
from .draft import Draft
from .drains import Resting, drain_s, progress
from .fairness import leaves_at, residency_s
from .freeing import enforce
from .goal import Goal, Reach, may_displace, room
from .goals import arranged, goals, resting_level, restores, unproved, wakes
from .haste import hurry
from .idleness import may_pin_now
from .model import (
    Asleep,
    Awake,
    Down,
    Draining,
    Engine,
    Failure,
    FallingAsleep,
    Gpu,
    ModelId,
    Proving,
    Roused,
    Rousing,
    SleepLevel,
    Starting,
    Waking,
)
from .refusals import Reason, Refusal

_MAX_PASSES = 200
"""Far above what a dozen engines can need in one step; beyond it, rules contradict each other."""
_GOES = (Reach.DOWN, Reach.CLEARED)


def pursue(d: Draft) -> None:
    """Do all that can be done now. Ends because each pass either changes something or is last."""
    if d.since is None:
        return  # not observed yet
    for _ in range(_MAX_PASSES):
        _grant(d)
        if d.freed or d.operations:
            enforce(d)
        turn_away(d)
        d.changed = False  # grants come before the goals of the same pass
        if not d.booted and not d.chores and not d.stopping:
            d.booted = True
        foreign.renew_leaking(d)
        d.chores.extend(restores(d))
        _Pass(d).run()
        if not d.changed:
            return
    raise RuntimeError(f"no rest after {_MAX_PASSES} passes: {d.state()!r}")


def _grant(d: Draft) -> None:
    if not d.waiting:
        return
    left = []
    for ticket in d.waiting:
        engine = d.engines[ticket.model]
        if isinstance(engine.phase, Awake) and not d.stopping:
            d.grant(ticket, engine.phase)
        else:
            left.append(ticket)
    d.waiting = left


@dataclass(slots=True)
class _Pass:
    d: Draft
    resting: dict[ModelId, Resting] = field(default_factory=dict)
    """Engines that somebody wants gone, and how."""
    claimed: set[Gpu] = field(default_factory=set)
    kept: set[ModelId] = field(default_factory=set)
    """Engines that an earlier goal wants up."""
    due: set[ModelId] = field(default_factory=set)
    """Engines for which room is being made, or will be as soon as fairness allows."""

    def run(self) -> None:
        for goal in goals(self.d):
            self._advance(goal)
        hurry(self.d, self.resting)
        for name, engine in list(self.d.engines.items()):
            if isinstance(engine.phase, Draining):
                progress(self.d, engine, engine.phase, self.resting.get(name))
        if not self.d.changed:  # else the next pass may make room again
            rousing.settle(self.d, self.due)

    # ------------------------------------------------------------ one goal

    def _advance(self, goal: Goal) -> None:
        engine = self.d.engines[goal.model]
        if goal.model in self.resting:
            return  # an earlier goal wants it gone first
        match goal.reach:
            case Reach.AWAKE | Reach.PROVEN:
                self.kept.add(goal.model)
                self._to_awake(goal, engine)
            case Reach.LOADED:
                self._to_loaded(goal, engine)
            case Reach.ASLEEP:
                self._to_asleep(goal, engine)
            case Reach.DOWN:
                self._to_down(goal, engine)
            case Reach.CLEARED:
                self._to_cleared(goal, engine)

    def _to_awake(self, goal: Goal, engine: Engine) -> None:
        match engine.phase:
            case Awake() as phase:
                if goal.reach is Reach.PROVEN:
                    self._to_proven(goal, engine, phase)
                else:
                    self._reached(goal, "awake")
            case Draining() as phase:
                self._undrain(engine, phase)
            case Down() | Asleep() | Rousing() | Roused():
                self._bring_up(goal, engine)
            case _:
                self._claim(engine.spec.gpus)

    def _to_loaded(self, goal: Goal, engine: Engine) -> None:
        match engine.phase:
            case Down():
                self._bring_up(goal, engine)
            case Asleep():
                self._reached(goal, "loaded and asleep")
            case Awake(leases=leases) if leases:
                self._reached(goal, "loaded and in use")
            case Awake():
                self._rest_or_prove(goal, engine)
            case Draining():
                self._rest_or_prove(goal, engine)
            case _:
                self._claim(engine.spec.gpus)

    def _to_asleep(self, goal: Goal, engine: Engine) -> None:
        match engine.phase:
            case Asleep(level=slept):
                self._already_asleep(goal, slept)
            case Down():
                text = f'cannot put "{goal.model}" to sleep: it is not running'
                hint = f"homegptctl start {goal.model}"
                self._fail(goal, Refusal(Reason.BUSY, text, hint))
            case Awake() | Draining():
                level = resting_level(self.d, goal)
                if level is None:
                    self._cannot_sleep(goal, engine)
                elif self.claimed.isdisjoint(engine.spec.gpus):
                    self._displace(goal, engine, level)
            case _:
                self._claim(engine.spec.gpus)

    def _already_asleep(self, goal: Goal, level: SleepLevel) -> None:
        """vLLM takes no sleeper from one level to another."""
        asked = goal.operation.level if goal.operation else None
        if asked is None or asked is level:
            self._reached(goal, "asleep")
            return
        name = goal.model
        text = f'"{name}" is asleep at level {level} already; wake it first'
        hint = f"homegptctl wake {name}, then: homegptctl sleep {name} --level {asked}"
        self._fail(goal, Refusal(Reason.BUSY, text, hint))

    def _to_down(self, goal: Goal, engine: Engine) -> None:
        match engine.phase:
            case Down():
                if engine.phase.failure:
                    self.d.phase(goal.model, Down(self.d.now))
                self._reached(goal, "stopped")
            case Starting():
                self.d.stop(goal.model)
            case Asleep(frozen=frozen) if frozen and not goal.cut:
                pass  # its frozen answers wake it first; they end, then it is stopped
            case Asleep() | Roused():
                self._claim(engine.spec.gpus)
                if self.d.quiet(engine.spec.gpus):
                    self._break_off(engine)
            case Rousing() | Waking() | FallingAsleep() | Proving() if goal.cut:
                self._break_off(engine)
            case Awake() | Draining():
                self._displace(goal, engine, None)
            case _:
                self._claim(engine.spec.gpus)

    def _to_cleared(self, goal: Goal, engine: Engine) -> None:
        """What is frozen there wakes first, and its answers end; or it is stopped with `--now`."""
        match engine.phase:
            case Starting(adopts=False):
                self.d.stop(goal.model)
            case Asleep(frozen=frozen) if frozen and goal.cut:
                self._break_off(engine)
            case Awake() | Draining():
                self._displace(goal, engine, resting_level(self.d, goal))
            case Down() | Asleep():
                pass
            case _:
                self._claim(engine.spec.gpus)

    def _break_off(self, engine: Engine) -> None:
        name = engine.spec.model
        self.d.cut(results.frozen(engine), f'"{name}" was stopped by an operator')
        self.d.stop(name)

    def _to_proven(self, goal: Goal, engine: Engine, phase: Awake) -> None:
        proof = goal.proof
        if goal.operation and goal.operation.restarted:
            text = engine.unproved.get(proof)
            if text is None:
                self._reached(goal, "proved: freezing works here")
            else:
                self._fail(goal, Refusal(Reason.ENGINE_FAULT, text))
        elif engine.traits is None or SleepLevel.ONE not in engine.traits.levels:
            why = engine.traits.why_no_sleep if engine.traits else None
            text = f'cannot prove freezing for "{goal.model}": {why or "it cannot sleep"}'
            self._fail(goal, Refusal(Reason.ENGINE_FAULT, text))
        elif not may_pin_now(self.d, goal.model):
            text = f'cannot prove freezing for "{goal.model}": no host RAM left for its sleep'
            self._fail(goal, Refusal(Reason.DOES_NOT_FIT, text, "homegptctl status"))
        elif phase.leases:
            text = f'cannot prove freezing for "{goal.model}" while it answers'
            self._fail(goal, Refusal(Reason.BUSY, text))
        elif self.d.quiet(engine.spec.gpus):
            self._mark_restarted(goal)
            self.d.prove(goal.model, proof)
        else:
            self._claim(engine.spec.gpus)

    def _mark_restarted(self, goal: Goal) -> None:
        if goal.operation is not None:
            place = self.d.operations.index(goal.operation)
            self.d.operations[place] = replace(goal.operation, restarted=True)

    # ------------------------------------------------------------ room

    def _bring_up(self, goal: Goal, engine: Engine) -> None:
        """Order the start or the wake, or first what has to make room for it."""
        d, gpus = self.d, engine.spec.gpus
        if not self.claimed.isdisjoint(gpus):
            self._claim(gpus)
            return  # not its turn, so its plan need not be made
        displaced = room(d, goal)
        if displaced is None:
            self._no_room(goal)
            return
        claim = set(gpus).union(*(d.engines[name].spec.gpus for name in displaced))
        free = claim.isdisjoint(self.claimed)
        self._claim(claim)
        if not free:
            return
        self.due.add(goal.model)
        at = max((self._may_drain_at(goal, d.engines[name]) for name in displaced), default=d.now)
        if at > d.now:
            d.call_at(at)
            return
        self._remember(goal, displaced)
        for name, level in displaced.items():
            self._displace(goal, d.engines[name], level)
        fits = ledger.fits_now(d.engines, goal.model, ledger.room_for(d.state(), goal.model))
        if displaced and not goal.cut:
            rousing.rouse(d, engine, [d.engines[name] for name in displaced])
        elif not displaced and d.quiet(gpus) and fits:
            if isinstance(engine.phase, Asleep | Roused):
                d.wake(goal.model, engine.phase)
            elif isinstance(engine.phase, Down) and not rousing.undo(d, gpus):
                d.start(goal.model)

    def _remember(self, goal: Goal, displaced: levels.Displacements) -> None:
        """A load for later borrows its room from whoever is awake."""
        if goal.reach is not Reach.LOADED:
            return
        awake = [n for n in displaced if isinstance(self.d.engines[n].phase, Awake)]
        operation = goal.operation
        if operation is None:
            self.d.chores = arranged(self.d, wakes(self.d, awake))
            return
        new = tuple(name for name in awake if name not in operation.displaced)
        if new:
            place = self.d.operations.index(operation)
            self.d.operations[place] = replace(operation, displaced=operation.displaced + new)

    def _no_room(self, goal: Goal) -> None:
        d = self.d
        if not goal.gentle and any(results.frozen(e) for e in d.engines.values()):
            return  # what is frozen ends in bounded time, and then there is room
        refusal = sums.no_room(
            d.state(), goal.model, may_displace=lambda engine: may_displace(d, goal, engine)
        )
        if not plans.can_ever_fit(d.state(), goal.model):
            why = Failure(refusal.message, refusal.hint)
            d.put(replace(d.engines[goal.model], no_room=why))
        self._fail(goal, refusal)
        if goal.operation is None and goal.chore is None:
            d.refuse_waiting(lambda ticket: ticket.model == goal.model, refusal)

    # ------------------------------------------------------------ displacing

    def _displace(self, goal: Goal, engine: Engine, level: SleepLevel | None) -> None:
        d, name = self.d, engine.spec.model
        self._claim(engine.spec.gpus)
        if name in self.kept:
            return
        match engine.phase:
            case Awake() as phase:
                at = self._may_drain_at(goal, engine)
                if at > d.now:
                    d.call_at(at)
                    return
                until = d.now + drain_s(engine, d.policy)
                d.phase(name, Draining(phase, phase.leases, d.now, until, None, goal.model, level))
                self.resting[name] = Resting(level, goal.model, cut=goal.cut)
            case Draining():
                self.resting[name] = Resting(level, goal.model, cut=goal.cut)
            case Asleep() if level is None and d.quiet(engine.spec.gpus):
                d.stop(name, wanted_by=goal.model)
            case _:
                pass  # its order ends first

    def _may_drain_at(self, goal: Goal, engine: Engine) -> float:
        """The instant from which `goal` may displace it."""
        phase = engine.phase
        if not isinstance(phase, Awake) or goal.urgent or goal.reach in _GOES:
            return self.d.now
        d = self.d
        return leaves_at(d, engine, phase, wanted_by=goal.model, since=goal.since, now=d.now)

    def _undrain(self, engine: Engine, phase: Draining) -> None:
        idle_since = None if phase.leases else self.d.now
        awake = replace(phase.awake, leases=phase.leases, idle_since=idle_since)
        self.d.phase(engine.spec.model, awake)
        self._claim(engine.spec.gpus)

    def _rest_or_prove(self, goal: Goal, engine: Engine) -> None:
        """Freshly loaded: put it to sleep once, so that the slow first sleep is behind us.

        What it has to prove is proved now, while nobody uses it and its GPU is its own anyway.
        """
        level = resting_level(self.d, goal)
        proof = unproved(self.d, goal, level)
        if proof is not None:
            if isinstance(engine.phase, Awake) and self.d.quiet(engine.spec.gpus):
                self.d.prove(goal.model, proof)
            self._claim(engine.spec.gpus)
        elif level is not None:
            self._displace(goal, engine, level)
        else:
            self._reached(
                goal, "loaded; it cannot sleep here, so it is stopped if others need room"
            )

    def _cannot_sleep(self, goal: Goal, engine: Engine) -> None:
        why = levels.why_none(engine, goal.operation.level if goal.operation else None)
        text = f'cannot put "{goal.model}" to sleep: {why}'
        self._fail(goal, Refusal(Reason.DOES_NOT_FIT, text, f"homegptctl stop {goal.model}"))

    # ------------------------------------------------------------ the end of a goal

    def _claim(self, gpus: tuple[Gpu, ...] | set[Gpu]) -> None:
        self.claimed.update(gpus)

    def _reached(self, goal: Goal, text: str) -> None:
        d = self.d
        if goal.operation is not None:
            self._hold(goal)
            d.finish(goal.operation, f"{goal.model} is {text}")
        if goal.chore is not None:
            self._next_chore(goal)

    def _hold(self, goal: Goal) -> None:
        """An operator's switch holds for a residency, busy or not."""
        engine = self.d.engines[goal.model]
        if goal.reach is Reach.AWAKE and isinstance(engine.phase, Awake):
            until = self.d.now + residency_s(self.d, goal.model)
            self.d.phase(goal.model, replace(engine.phase, held_until=until))

    def _fail(self, goal: Goal, refusal: Refusal) -> None:
        if goal.operation is not None:
            self.d.finish(goal.operation, refusal.message, refusal)
        if goal.chore is not None:
            self._next_chore(goal)

    def _next_chore(self, goal: Goal) -> None:
        self.d.chores = [chore for chore in self.d.chores if chore != goal.chore]
        if self.d.chores:
            self.d.chores[0] = replace(self.d.chores[0], since=self.d.now)
        self.d.changed = True
