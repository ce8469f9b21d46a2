"""From a setup to what the daemon is built of: clients of engines, the first state, settings."""

import fcntl
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from msgspec.structs import replace

from homegptd.adapters.store import Store
from homegptd.adapters.vllm import Deadlines, VllmEngine
from homegptd.adapters.vllm_canary import Kind
from homegptd.config.schema import Config
from homegptd.core.durations import KEPT
from homegptd.core.machine import initial
from homegptd.core.memory import Learnt
from homegptd.core.model import Engine, ModelId, State
from homegptd.faces.ask import Limits
from homegptd.faces.bodies import Bodies
from homegptd.faces.early import Pace
from homegptd.faces.pool import Address
from homegptd.faces.router import Settings as RouterSettings
from homegptd.runtime.keeper import recall

from .access import engine_key
from .doors import CannotServe
from .setup import Setup

log = logging.getLogger(__name__)

_KINDS = {
    "generate": Kind.GENERATE,
    "embed": Kind.EMBED,
    "score": Kind.RERANK,
    "audio": Kind.OTHER,
}
"""The configuration's words for what a model does. Without one the engine is asked."""


def clients(
    setup: Setup,
    old: dict[ModelId, VllmEngine] | None = None,
    before: Setup | None = None,
) -> dict[ModelId, VllmEngine]:
    """One client for each model; it is new, and knows no canary, where the engine will be."""
    engines = {}
    pinned = {spec.model: spec.pinned_mib for spec in setup.specs}
    for model in setup.config.models:
        name = ModelId(model.id)
        kept = old.get(name) if old else None
        deadlines = Deadlines.for_size(pinned.get(name, 0))
        if kept is not None and before and before.fingerprint(name) == setup.fingerprint(name):
            kept.deadlines = deadlines
            engines[name] = kept
            continue
        kind = _KINDS[model.engine.kind] if model.engine else None
        at, key = setup.addresses[name], engine_key(model)
        engines[name] = VllmEngine(name, at, kind=kind, deadlines=deadlines, api_key=key)
    return engines


def first_state(setup: Setup, store: Store) -> State:
    """Everything down, with what this box has learnt about how long things take and how large
    they are."""
    state = initial(setup.specs, setup.policy, dict(setup.gpus), setup.host_mib)
    took: dict[ModelId, dict[str, tuple[float, ...]]] = {}
    for (model, act), seconds in store.durations().items():
        took.setdefault(model, {})[act] = tuple(seconds)[-KEPT:]
    engines: dict[ModelId, Engine] = {}
    for name, engine in state.engines.items():
        version, known = store.newest_figures(name, engine.spec.fingerprint)
        learnt = Learnt(known, version)
        engines[name] = replace(engine, took=took.get(name, {}), learnt=learnt)
    return recall(store, replace(state, engines=engines))


def address(at: Path | str) -> Address:
    """A Unix socket's path, or host and port of a base URL."""
    if isinstance(at, Path):
        return str(at)
    url = urlsplit(at)
    return url.hostname or "127.0.0.1", url.port or 80


def router_settings(
    config: Config, spool: Path, limits: Callable[[ModelId], Limits]
) -> RouterSettings:
    """`spool`: the directory for bodies that do not stay in memory."""
    router = config.router
    return RouterSettings(
        max_body_bytes=router.max_body_bytes,
        bodies=Bodies(router.max_waiting_bytes, directory=spool),
        limits=limits,
        pace=Pace(early_head_s=router.early_head_s),
        tasks_switch=router.background_tasks == "switch",
        realtime_idle_s=router.realtime_idle_s,
    )


def difference(before: Setup, after: Setup) -> str:
    old = {spec.model: spec for spec in before.specs}
    new = {spec.model: spec for spec in after.specs}
    parts = [
        *(f"added {name}" for name in new if name not in old),
        *(f"removed {name}" for name in old if name not in new),
        *(f"changed {name}" for name in new if name in old and new[name] != old[name]),
    ]
    doors = [(c.http.listen, c.webui.enabled) for c in (before.config, after.config)]
    if doors[0] != doors[1]:
        parts.append("http.listen and webui need a restart of the daemon")
    if before.doors != after.doors:
        parts.append("doors to single models (host_port) change with a restart of the daemon")
    return ", ".join(parts) or "nothing changed for the models"


@contextmanager
def only_one(state_dir: Path) -> Iterator[None]:
    """Two daemons with one state would adopt each other's engines."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("w")
    except OSError as error:
        log.warning("cannot lock %s: %s", state_dir, error.strerror)
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotServe(
                f"another homegptd uses {state_dir}",
                "homegptd --state-dir DIR gives one of its own",
            ) from None
        yield
