"""Who runs the engines: the daemon's own children, or systemd."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from homegptd.adapters.meter import Belongings
from homegptd.adapters.processes import Processes
from homegptd.adapters.systemd import EngineUnit, SystemdUnits
from homegptd.config.schema import Config
from homegptd.core.model import ModelId
from homegptd.runtime.ports import UnitsPort

from .setup import Places, Setup

_BOOTED = Path("/run/systemd/system")
"""sd_booted(3): there while systemd is the system's manager."""


class Units(UnitsPort, Belongings, Protocol):
    """Starts and stops engines, and knows what is theirs."""


class Backend(Protocol):
    """The engines' keeper, and what becomes of them when the daemon ends."""

    @property
    def units(self) -> "Units": ...
    @property
    def keeps_sockets(self) -> bool:
        """Whether listening sockets outlive a restart of the daemon."""
        ...

    def replace(self, setup: Setup) -> None:
        """A reload: how engines are started from now on."""

    def follow(self, model: ModelId) -> list[str]:
        """The command that follows the engine's log, for whoever may read it."""
        ...

    async def leave(self) -> None:
        """The daemon ends in good order. Raises `Fault` if an engine that is to end does not."""


class ProcessBackend:
    """Engines are children: they end with the daemon, unless it is killed."""

    keeps_sockets = False

    def __init__(self, setup: Setup, state_dir: Path) -> None:
        self.units = Processes(setup.launches, state_dir)
        self._setup = setup

    def replace(self, setup: Setup) -> None:
        self._setup = setup
        self.units.replace(setup.launches)

    def follow(self, model: ModelId) -> list[str]:
        launch = self._setup.launches.get(model)
        return ["tail", "-n", "0", "-F", str(launch.log)] if launch else []

    async def leave(self) -> None:
        await self.units.close()


class SystemdBackend:
    """Engines are units: `systemctl stop` ends them, a restart or a crash leaves them."""

    keeps_sockets = True

    def __init__(self, setup: Setup, places: Places) -> None:
        self._places = places
        self._setup = setup
        self.units = SystemdUnits(_units(setup, places))

    def replace(self, setup: Setup) -> None:
        self._setup = setup
        self.units.replace(_units(setup, self._places))

    def follow(self, model: ModelId) -> list[str]:
        found = self._setup.config.model(model)
        unit = found.unit if found else f"vllm-{model}.service"
        return ["journalctl", "--output=cat", "--lines=0", "--follow", f"--unit={unit}"]

    async def leave(self) -> None:
        try:
            if await self.units.own_job_type() == "stop":
                await self.units.stop_all()
        finally:
            await self.units.close()


def choose(config: Config, setup: Setup, places: Places, state_dir: Path) -> Backend:
    """As configured, else systemd for a daemon that it started, else child processes."""
    name = config.backend or ("systemd" if _is_service() else "process")
    if name == "systemd":
        return SystemdBackend(setup, places)
    return ProcessBackend(setup, state_dir)


def _is_service() -> bool:
    return _BOOTED.exists() and "INVOCATION_ID" in os.environ and "NOTIFY_SOCKET" in os.environ


def _units(setup: Setup, places: Places) -> Mapping[ModelId, EngineUnit]:
    return {
        ModelId(model.id): EngineUnit(
            model.unit,
            places.socket(model.id) if model.engine is not None else None,
            places.image_note(model.id),
        )
        for model in setup.config.models
    }
