"""What systemd is told while we live: how far we are, that we are ready, that we are well."""

import asyncio
from collections.abc import Callable

from homegptd.core.model import State
from homegptd.core.story import Line

from .ports import NotifyPort

EXTEND_EVERY_S, EXTEND_BY_S = 5.0, 30.0
"""During the bootstrap: each tick asks systemd for more time than until the next few ticks."""


class Heartbeat:
    """Sends READY=1 once the bootstrap is over, STATUS= with each line of the story."""

    def __init__(
        self, notifier: NotifyPort, state: Callable[[], State], summary: Callable[[State], str]
    ) -> None:
        self._notifier = notifier
        self._state = state
        self._summary = summary
        self._ready = False

    def tell(self, lines: tuple[Line, ...]) -> None:
        """A step had a story: pass on where that leaves us."""
        state = self._state()
        if state.booted and not self._ready:
            self._ready = True
            self._notifier.ready(self._summary(state))
        else:
            self._notifier.status(self._summary(state))

    async def beat(self, watchdog_s: float | None) -> None:
        """Until cancelled: more time while booting, and the watchdog's ping.

        The scheduler steps on the loop that runs this, so a loop that hangs is not pinged for; a
        scheduler that breaks ends the process.
        """
        every = EXTEND_EVERY_S if watchdog_s is None else min(watchdog_s, EXTEND_EVERY_S)
        while True:
            if not self._ready:
                self._notifier.extend(EXTEND_BY_S)
            if watchdog_s is not None:
                self._notifier.watchdog()
            await asyncio.sleep(every)
