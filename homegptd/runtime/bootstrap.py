"""What runs already when the daemon begins. The rest of the bootstrap is the machine's work."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from homegptd.core.events import Found, Observed
from homegptd.core.model import ModelId, Running, Traits
from homegptd.core.refusals import Fault

from .ports import EnginesPort, MeterPort, UnitsPort

log = logging.getLogger(__name__)

Identify = Callable[[ModelId], Awaitable[Traits]]
HasPinned = Callable[[ModelId, Running], bool | None]

OBSERVE_S = 30.0
"""How long one engine may take to say what it is, in seconds; they are asked side by side."""


async def observe(
    units: UnitsPort,
    engines: EnginesPort,
    identify: Identify,
    meter: MeterPort | None = None,
    has_pinned: HasPinned = lambda model, running: None,
) -> Observed:
    """Ask every engine that runs what it is. One that does not answer (yet) has no traits.

    `has_pinned`: what an earlier life knew of it; None: nothing.
    """
    running = await units.observe()
    found: dict[ModelId, Found] = {}

    async def ask(model: ModelId) -> None:
        said = await _ask(engines, model, identify)
        held = await meter.held(model) if meter is not None and said.traits is not None else None
        pinned = has_pinned(model, running[model])
        found[model] = replace(said, held=held, pinned=pinned)

    async with asyncio.TaskGroup() as group:
        for model in running:
            group.create_task(ask(model), name=f"observe {model}")
    return Observed({model: found[model] for model in running})


async def _ask(engines: EnginesPort, model: ModelId, identify: Identify) -> Found:
    try:
        async with asyncio.timeout(OBSERVE_S):
            if not await engines[model].ready():
                return Found()
            return Found(await identify(model))
    except (Fault, TimeoutError) as error:
        log.warning("%s runs but does not say what it is: %s", model, error)
        return Found()
