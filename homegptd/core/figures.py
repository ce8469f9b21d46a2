"""Which figure counts, and what measurements teach.

A measured figure is a moving maximum: it rises at once, and falls by a third of the difference with
each smaller measurement. It wins over what was given, unless what was given is to be trusted.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from .memory import HOST, Figure, Figures, Gpu, Held, Kind, Learnt, Source
from .model import Engine, EngineSpec, Traits, half_awake
from .words import gb

SHARES: Mapping[Kind, float] = {
    Kind.AWAKE: 0.01,
    Kind.RESIDUE: 0.125,
    Kind.ROUSED: 0.02,
    Kind.PINNED: 0.02,
    Kind.HOST: 0.125,
}
"""Safety margin of a measured figure, as a share of it. Awake is exact, since vLLM takes its KV
cache at the start; residues and processes grow a little with use."""
FALLS = 0.3
"""Weight of a measurement below the figure."""
_Learnt = dict[tuple[Kind, Gpu], Figure]

HOARDS = 2
"""Sleeps in a row that gave too little back, after which an engine is stopped rather than slept."""


def figure(engine: Engine, kind: Kind, place: Gpu = HOST) -> Figure:
    """What is charged for it, with its source and its margin."""
    measured = engine.learnt.figures.get((kind, place))
    if measured is not None and not engine.spec.trust_given:
        return measured  # most often so, and this is asked many times in each step
    given = _given(engine, kind, place)
    stands = given.source is Source.CONFIGURED
    return given if measured is None or stands else measured


def table(engine: Engine) -> Figures:
    """Every figure of an engine that counts."""
    kinds = [Kind.AWAKE, Kind.RESIDUE]
    if _known(engine, Kind.ROUSED) or half_awake(engine.phase):
        kinds.append(Kind.ROUSED)
    on_gpus = [(kind, gpu) for gpu in engine.spec.gpus for kind in kinds]
    keys = [*on_gpus, (Kind.PINNED, HOST), (Kind.HOST, HOST)]
    return {(kind, place): figure(engine, kind, place) for kind, place in keys}


def _given(engine: Engine, kind: Kind, place: Gpu) -> Figure:
    spec = engine.spec
    source = Source.ESTIMATED if kind in spec.estimated else Source.CONFIGURED
    match kind:
        case Kind.AWAKE:
            return Figure(spec.awake_mib, source)
        case Kind.RESIDUE:
            return Figure(spec.residue_mib, source)
        case Kind.ROUSED:
            share = -(-spec.pinned_mib // len(spec.gpus))
            mib = figure(engine, Kind.RESIDUE, place).charged_mib + share
            most = figure(engine, Kind.AWAKE, place).charged_mib
            return Figure(min(mib + round(SHARES[kind] * mib), most), Source.ESTIMATED)
        case Kind.PINNED:
            return Figure(spec.pinned_mib, source, spec.pinned_margin_mib)
        case Kind.HOST:
            return Figure(spec.host_mib, source)


# ---------------------------------------------------------------- what measurements teach


def configured(engine: Engine, spec: EngineSpec) -> Engine:
    """With these settings. Other flags or another image make of measurements estimates again."""
    if spec.fingerprint == engine.spec.fingerprint:
        return replace(engine, spec=spec)
    return replace(engine, spec=spec, learnt=Learnt())


def identified(engine: Engine, traits: Traits) -> Engine:
    """It said which vLLM it is; what was measured with another one does not count."""
    learnt = engine.learnt
    if learnt.build not in ("", traits.build):
        learnt = Learnt()
    if not learnt.figures:
        learnt = replace(learnt, figures=traits.figures)
    learnt = replace(learnt, build=traits.build)
    if learnt.rouses_badly:
        traits = replace(traits, can_rouse=False)
    if learnt.hoards >= HOARDS:
        why = "its sleep gave too little memory back"
        traits = replace(traits, levels=frozenset(), why_no_sleep=why)
    return replace(engine, traits=traits, learnt=learnt)


def started(engine: Engine, before: Held | None, after: Held | None) -> Engine:
    """Awake for the first time in its life, with nothing pinned yet."""
    if after is None:
        return engine
    learnt = dict(engine.learnt.figures)
    _learn(engine, learnt, Kind.AWAKE, _held(after, _moved(before, after)), after.at)
    if after.host_mib is not None:
        _fold(learnt, Kind.HOST, HOST, after.host_mib, after.at)
    return _with(engine, figures=learnt)


def adopted(engine: Engine, held: Held | None) -> Engine:
    """Found running, awake or asleep; what it has pinned nobody knows."""
    if held is None:
        return engine
    learnt, asleep = dict(engine.learnt.figures), engine.traits is not None and engine.traits.asleep
    _learn(engine, learnt, Kind.RESIDUE if asleep else Kind.AWAKE, held.gpu_mib, held.at)
    _pinned(engine, learnt, None, held)
    left = {gpu: held.gpu_mib[gpu] for gpu in engine.spec.gpus if asleep and gpu in held.gpu_mib}
    return _with(engine, figures=learnt, first_residue=left, last_residue=left)


def woke(
    engine: Engine, before: Held | None, after: Held | None, *, roused: bool = False
) -> Engine:
    """Awake out of its sleep; `roused`: with its weights there before."""
    return _rose(engine, before, after, Kind.ROUSED if roused else Kind.RESIDUE, Kind.AWAKE)


def roused(engine: Engine, before: Held | None, after: Held | None) -> Engine:
    """Its weights alone are awake."""
    return _rose(engine, before, after, Kind.RESIDUE, Kind.ROUSED)


def _rose(engine: Engine, before: Held | None, after: Held | None, base: Kind, now: Kind) -> Engine:
    if after is None:
        return engine
    learnt = dict(engine.learnt.figures)
    moved = _moved(before, after)
    taken = {gpu: mib + moved[gpu] for gpu, mib in _known(engine, base).items() if gpu in moved}
    _learn(engine, learnt, now, _held(after, taken), after.at)
    _pinned(engine, learnt, None, after)
    return _with(engine, figures=learnt)


def slept(engine: Engine, before: Held | None, after: Held | None) -> Engine:
    """`before` tells what it held after real work, which a start does not know yet. What leaked
    over this sleep it will hold on top when it is awake again."""
    if before is None or after is None:
        return engine
    learnt = dict(engine.learnt.figures)
    left = _left(engine, before, after)
    last = engine.learnt.last_residue
    leaked = {gpu: max(left.get(gpu, 0) - mib, 0) for gpu, mib in last.items()}
    now = {gpu: mib + leaked.get(gpu, 0) for gpu, mib in before.gpu_mib.items()}
    up = _up(engine)
    _learn(engine, learnt, up, now, before.at)
    other = Kind.AWAKE if up is Kind.ROUSED else Kind.ROUSED
    for gpu, mib in leaked.items():
        if known := learnt.get((other, gpu)):
            learnt[other, gpu] = replace(known, mib=known.mib + mib)
    _learn(engine, learnt, Kind.RESIDUE, left, after.at)
    _pinned(engine, learnt, before, after)
    first = engine.learnt.first_residue or left
    return _with(engine, figures=learnt, first_residue=first, last_residue=left, hoards=0)


def renewed(engine: Engine) -> Engine:
    """Its process has ended, and with it what had leaked."""
    leaked = {gpu: max(mib, 0) for gpu, mib in grown(engine).items()}
    kept = {
        (kind, place): replace(known, mib=known.mib - leaked.get(place, 0))
        for (kind, place), known in engine.learnt.figures.items()
    }
    return _with(engine, figures=kept, first_residue={}, last_residue={})


def hoarded(engine: Engine, before: Held | None, after: Held | None) -> str | None:
    """The sum, if a sleep gave back less than half of what it should have; None: it did well."""
    if before is None or after is None:
        return None
    back, was = _back(before, after), _held(before, _known(engine, _up(engine)))
    for gpu in engine.spec.gpus:
        if gpu not in back or gpu not in was:
            continue
        due = was[gpu] - figure(engine, Kind.RESIDUE, gpu).mib
        if due > 0 and back[gpu] < due / 2:
            return f"{gb(max(back[gpu], 0))} of {gb(was[gpu])} GB came back on gpu{gpu}"
    return None


def grown(engine: Engine) -> Mapping[Gpu, int]:
    """By how much its residue is above that of its first sleep, on each GPU."""
    last = engine.learnt.last_residue
    return {gpu: last[gpu] - mib for gpu, mib in engine.learnt.first_residue.items() if gpu in last}


def hoarding(engine: Engine) -> Engine:
    """Its sleep gave too little back once more."""
    return _with(engine, hoards=engine.learnt.hoards + 1)


def rouses_badly(engine: Engine) -> Engine:
    """Its weights are not woken alone any more."""
    return _with(engine, rouses_badly=True)


def forgiven(engine: Engine) -> Engine:
    """An operator wants it tried again."""
    return _with(engine, hoards=0)


def leak(engine: Engine, limit_mib: int) -> str | None:
    """What has leaked, in words, if it is more than `limit_mib` anywhere."""
    for gpu, mib in grown(engine).items():
        if mib > limit_mib:
            first = engine.learnt.first_residue[gpu]
            return f"what it keeps asleep on gpu{gpu} grew from {gb(first)} to {gb(first + mib)} GB"
    return None


# ---------------------------------------------------------------- parts


def _with(engine: Engine, **learnt: Any) -> Engine:
    return replace(engine, learnt=replace(engine.learnt, **learnt))


def _learn(engine: Engine, learnt: _Learnt, kind: Kind, seen: Mapping[Gpu, int], at: float) -> None:
    for gpu in engine.spec.gpus:
        if gpu in seen:
            _fold(learnt, kind, gpu, seen[gpu], at)


def _fold(learnt: _Learnt, kind: Kind, place: Gpu, mib: int, at: float) -> None:
    known = learnt.get((kind, place))
    if known is not None and mib < known.mib:
        mib = known.mib - round(FALLS * (known.mib - mib))
    learnt[kind, place] = Figure(mib, Source.MEASURED, round(SHARES[kind] * mib), at)


def _pinned(engine: Engine, learnt: _Learnt, before: Held | None, after: Held) -> None:
    """What the process group holds beyond what it held before its first sleep.

    At level 1 the weights lie in host RAM, so less than half of them cannot be: then the driver
    keeps the pages where the kernel counts them for nobody, and the fall of MemAvailable has to do.
    """
    if after.host_mib is None:
        return
    host = learnt.get((Kind.HOST, HOST))
    if host is None or not engine.holds_pinned or engine.pins_unsure:
        _more_host(engine, learnt, after.host_mib, after.at)
        return
    mib, least = after.host_mib - host.mib, engine.spec.pinned_mib // 2
    if mib < least and (Kind.PINNED, HOST) not in learnt and before is not None:
        mib = max(mib, before.free_mib.get(HOST, 0) - after.free_mib.get(HOST, 0))
    if mib >= least:
        _fold(learnt, Kind.PINNED, HOST, mib, after.at)


def _more_host(engine: Engine, learnt: _Learnt, mib: int, at: float) -> None:
    """It holds more than is charged for all of it: then its processes are larger than thought."""
    pinned = figure(engine, Kind.PINNED) if engine.holds_pinned else Figure(0, Source.ESTIMATED)
    if mib > figure(engine, Kind.HOST).charged_mib + pinned.charged_mib:
        _fold(learnt, Kind.HOST, HOST, mib - pinned.mib, at)


def _up(engine: Engine) -> Kind:
    """What it holds before it falls asleep."""
    return Kind.ROUSED if half_awake(engine.phase) else Kind.AWAKE


def _known(engine: Engine, kind: Kind) -> dict[Gpu, int]:
    return {place: f.mib for (k, place), f in engine.learnt.figures.items() if k is kind}


def _held(seen: Held, otherwise: Mapping[Gpu, int]) -> Mapping[Gpu, int]:
    """By its processes; where the driver does not tell them apart, by what became of the device."""
    return seen.gpu_mib or otherwise


def _moved(before: Held | None, after: Held) -> dict[Gpu, int]:
    """What was taken from each device: by this engine, since its GPUs are its own meanwhile."""
    return {gpu: -mib for gpu, mib in _devices(before, after)}


def _back(before: Held, after: Held) -> dict[Gpu, int]:
    """What it gave back on each GPU."""
    if before.gpu_mib and after.gpu_mib:
        return {gpu: mib - after.gpu_mib.get(gpu, 0) for gpu, mib in before.gpu_mib.items()}
    return dict(_devices(before, after))


def _left(engine: Engine, before: Held, after: Held) -> dict[Gpu, int]:
    if after.gpu_mib:
        return {gpu: after.gpu_mib[gpu] for gpu in engine.spec.gpus if gpu in after.gpu_mib}
    up, back = _known(engine, _up(engine)), _back(before, after)
    return {gpu: max(up[gpu] - back[gpu], 0) for gpu in engine.spec.gpus
            if gpu in up and gpu in back}  # fmt: skip


def _devices(before: Held | None, after: Held) -> Iterator[tuple[Gpu, int]]:
    """By how much each device has more free memory than before."""
    for gpu, free in (before.free_mib if before else {}).items():
        if gpu != HOST and gpu in after.free_mib:
            yield gpu, after.free_mib[gpu] - free
