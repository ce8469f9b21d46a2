"""What holds an engine awake for one request."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING

from homegptd.core.model import ModelId, Ticket
from homegptd.core.refusals import Refusal

if TYPE_CHECKING:
    from .scheduler import Scheduler


class Refused(Exception):
    """A request or an operation is turned down; `refusal` says why and when to ask again."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Lease:
    """A granted ticket: holds its engine awake until the block ends."""

    __slots__ = ("_answer", "_cut", "_outcome", "_scheduler", "_served", "ticket")

    def __init__(self, scheduler: Scheduler, ticket: Ticket) -> None:
        self._scheduler = scheduler
        self._answer: asyncio.Future[None] | None = None
        self._outcome: Refusal | bool = False  # True: granted
        self._served = False
        self._cut: asyncio.Future[Refusal] | None = None
        self.ticket = ticket

    @property
    def model(self) -> ModelId:
        return self.ticket.model

    @property
    def cut(self) -> asyncio.Future[Refusal]:
        """Done when the answer has to end now, with the refusal to tell the client."""
        if self._cut is None:
            self._cut = self._scheduler.loop.create_future()
        return self._cut

    @property
    def frozen(self) -> bool:
        """Whether the answer is held inside an engine that sleeps or is about to."""
        return self._scheduler.is_frozen(self.ticket)

    def served(self) -> None:
        """The whole answer went out."""
        self._served = True

    def silent(self, seconds: float) -> None:
        """Nobody has heard anything of the engine for so long, and something was due."""
        self._scheduler.suspect(self.ticket, seconds)

    async def __aenter__(self) -> Lease:
        """Wait for the engine. Raises: Refused."""
        try:
            self._scheduler.open(self)
            if self._outcome is False:
                self._answer = self._scheduler.loop.create_future()
                await self._answer
        except BaseException:
            self._scheduler.close(self.ticket.id, served=False)
            raise
        if isinstance(self._outcome, Refusal):
            self._scheduler.close(self.ticket.id, served=False)
            raise Refused(self._outcome)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the engine go."""
        self._scheduler.close(self.ticket.id, served=self._served)

    def settle(self, outcome: Refusal | bool) -> None:
        """Granted (True) or refused: only the scheduler says so."""
        self._outcome = outcome
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)
