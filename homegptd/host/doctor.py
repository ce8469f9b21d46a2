"""Is the box fit for its configuration? Each check says what it saw and, if bad, what mends it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from homegptd.config.parse import ConfigError, load
from homegptd.config.schema import Config

from .box import Card, cards
from .places import Places

Verdict = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check came to."""

    check: str
    verdict: Verdict
    said: str
    mend: str | None = None
    """The command that mends it."""


@dataclass(frozen=True, slots=True)
class Patient:
    """What checks look at."""

    places: Places
    config: Config
    cards: list[Card] = field(default_factory=list)
    root: bool = False
    running: bool = False
    """Whether homegpt.service is active: its ports are then its own."""


Check = Callable[[Patient], Iterator[Finding]]


def examine(
    places: Places, *, root: bool, running: bool, inside: bool = False
) -> Iterator[Finding]:
    """All findings, in the order in which a new box would be mended.

    `inside`: also start a container for each card, to see whether it is there; needs root.
    """
    from .doctor_box import BOX
    from .doctor_engines import ENGINES
    from .doctor_gpu import devices

    config, finding = _config(places)
    yield finding
    if config is None:
        return
    patient = Patient(places, config, cards(), root=root, running=running)
    for check in (*BOX, *ENGINES, *((devices,) if inside else ())):
        try:
            yield from check(patient)
        except OSError as error:
            name = check.__name__.strip("_").replace("_", " ")
            why = f"{error.strerror or error}: {error.filename}"
            yield Finding(name, "skip", f"cannot look: {why}", "sudo homegptctl doctor")


def _config(places: Places) -> tuple[Config | None, Finding]:
    try:
        config = load(places.config)
    except ConfigError as error:
        mend = "homegptctl config check"
        if not Path(places.config).exists():
            mend = "sudo homegptctl init --yes"
        return None, Finding("configuration", "fail", str(error.problems[0]), mend)
    return config, Finding("configuration", "ok", f"{len(config.models)} models")
