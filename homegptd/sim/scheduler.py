"""The scheduler of a simulated engine: requests, their pace, and pauses.

It may be paused in vLLM's three ways: `abort` ends what runs, `wait` lets it end, `keep` freezes
it. Requests that arrive meanwhile queue without an answer. A token that is made while memory is
unmapped kills the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal

from homegptd.sim.card import Card, owner_id
from homegptd.sim.faults import Faults
from homegptd.sim.options import Options
from homegptd.sim.physics import Memory
from homegptd.sim.text import Speech, pieces

log = logging.getLogger("vllm")
Mode = Literal["abort", "wait", "keep"]
_PREFILL_FACTOR = 100  # prompt tokens per second, as a multiple of the decode rate
_FIRST_STEP_S = 0.4  # what the first request after a wake pays once


class EngineDead(Exception):
    """The engine process is gone."""


class Aborted(Exception):
    """The request was aborted by a sleep, a pause or the shutdown."""


@dataclass(eq=False, slots=True)
class Turn:
    """One request inside the engine."""

    number: int
    prompt: str
    running: bool = False
    aborted: bool = False
    frozen: bool = False
    due: float = 0.0
    poke: asyncio.Event = field(default_factory=asyncio.Event)


class Scheduler:
    """Requests of one engine. Owned by one server, used from its event loop only."""

    def __init__(self, options: Options, card: Card, faults: Faults) -> None:
        self.options = options
        self.profile = options.profile
        self.faults = faults
        self.card = card
        self.memory = Memory(owner_id(), options.footprint)
        self.turns: set[Turn] = set()
        self.paused: Literal["no", "new", "all"] = "no"
        self.dead = False
        self.died = asyncio.Event()
        self.gauges = (0, 0)  # running, waiting: as of the last step
        self.generated = 0
        self.prompted = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0}
        self._numbers = itertools.count()
        self._changed = asyncio.Event()
        self._never = asyncio.Event()
        self._cold = True
        self._prefixes: set[int] = set()
        self._random = random.Random(options.seed)

    # -- time ----------------------------------------------------------------------------------

    async def pass_time(self, seconds: float) -> None:
        """Let simulated seconds pass; with a seed they vary by up to a tenth."""
        vary = self._random.uniform(0.9, 1.1) if self.options.seed else 1.0
        await asyncio.sleep(seconds * vary / self.options.speed)

    async def for_ever(self) -> None:
        await self._never.wait()

    # -- death ----------------------------------------------------------------------------------

    def die(self, why: str) -> None:
        """The engine process ends; its memory is free, its callers never hear of it again."""
        if self.dead:
            return
        log.error("EngineCore encountered a fatal error: %s", why)
        self.dead = True
        self.drop_memory()
        self.died.set()
        self.notify()

    def drop_memory(self) -> None:
        with self.card.locked() as box:
            box.drop(self.memory.owner)

    @property
    def hung(self) -> bool:
        """Stopped in its tracks by a `hang` that names no operation."""
        return any(f.name == "hang" and f.on is None for f in self.faults.ordered)

    async def while_hung(self) -> None:
        """Wait for the end of such a hang, as after a SIGCONT."""
        while self.hung and not self.dead:
            self._changed.clear()
            await self._changed.wait()

    def notify(self) -> None:
        """Something changed that a request or a drain may wait for."""
        self._changed.set()
        for turn in self.turns:
            turn.poke.set()

    # -- requests ------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return sum(not turn.running for turn in self.turns)

    @property
    def running(self) -> int:
        return sum(turn.running for turn in self.turns)

    def queue_full(self) -> bool:
        limit = self.options.max_queued
        return limit is not None and self.waiting >= limit and not self._may_start()

    async def generate(self, prompt: str, limit: int, rate: float) -> AsyncGenerator[str, None]:
        """Tokens of the answer, at `rate` per simulated second.

        Raises EngineDead or Aborted. Closing the iterator takes the request out of the engine.
        """
        turn = Turn(next(self._numbers), prompt)
        self.turns.add(turn)
        try:
            await self._begin(turn, prompt, rate)
            speech = Speech.after(self.options.names[0], prompt)
            for _ in range(limit):
                await self._step(turn, 1 / rate)
                piece = speech.next(valid=self._sane(turn))
                speech.hear(piece)
                self.generated += 1
                yield piece
        finally:
            self.turns.discard(turn)
            if self.paused == "no" or not turn.aborted:
                self._record()
            self.notify()

    async def compute(self, prompt: str) -> bool:
        """One forward pass without an answer; true when its result is sound."""
        turn = Turn(next(self._numbers), prompt)
        self.turns.add(turn)
        try:
            await self._begin(turn, prompt, self.options.tokens_per_s)
            return self._sane(turn)
        finally:
            self.turns.discard(turn)
            self._record()
            self.notify()

    async def _begin(self, turn: Turn, prompt: str, rate: float) -> None:
        while not self._may_start():
            self._raise_if_over(turn)
            turn.poke.clear()
            await turn.poke.wait()
        self._raise_if_over(turn)
        turn.running = True
        turn.due = asyncio.get_running_loop().time()
        await self._step(turn, self._prefill_s(prompt, rate))

    def _prefill_s(self, prompt: str, rate: float) -> float:
        cold, self._cold = self._cold, False
        key = hash(prompt)
        if key in self._prefixes:
            return _FIRST_STEP_S if cold else 0.0
        self._prefixes.add(key)
        return len(pieces(prompt)) / (rate * _PREFILL_FACTOR) + (_FIRST_STEP_S if cold else 0.0)

    async def _step(self, turn: Turn, seconds: float) -> None:
        """One step of the scheduler for this request: `seconds` of running time must pass."""
        clock = asyncio.get_running_loop().time
        wanted = seconds / self.options.speed
        turn.due = max(turn.due, clock() - 0.05) + wanted
        while True:
            self._raise_if_over(turn)
            left = turn.due - clock()
            if not self._may_go_on():
                turn.frozen = turn.frozen or self.paused == "all"
                await self._poked(turn)
                turn.due = clock() + min(max(left, 0.0), wanted)
            elif left <= 0.001:
                break
            else:
                await self._nap(turn, left)
        if wanted <= 0.001 and self.generated % 32 == 0:
            await asyncio.sleep(0)  # faster than the clock: let others live
        self._touch_memory()
        self._record()

    async def _nap(self, turn: Turn, seconds: float) -> None:
        turn.poke.clear()
        try:
            async with asyncio.timeout(seconds):
                await turn.poke.wait()
        except TimeoutError:
            return

    async def _poked(self, turn: Turn) -> None:
        turn.poke.clear()
        await turn.poke.wait()

    def _may_start(self) -> bool:
        return self.paused == "no" and not self.hung and self.running < self.options.max_num_seqs

    def _may_go_on(self) -> bool:
        return self.paused != "all" and not self.hung

    def _raise_if_over(self, turn: Turn) -> None:
        if self.dead:
            raise EngineDead
        if turn.aborted:
            raise Aborted

    def _touch_memory(self) -> None:
        if self.memory.asleep:
            self.die("CUDA error: an illegal memory access was encountered")
            raise EngineDead

    def _sane(self, turn: Turn) -> bool:
        frozen = turn.frozen and self.faults.peek("garbage-after-freeze", "chat")
        wrong = frozen or self.faults.peek("garbage", "chat")
        return self.memory.weights_valid and not wrong

    def _record(self) -> None:
        self.gauges = (self.running, self.waiting)

    # -- scheduler -----------------------------------------------------------------------------

    async def pause(self, mode: Mode) -> None:
        """Stop scheduling; `wait` returns when what ran has ended, the others at once."""
        self.paused = "all" if mode == "keep" else "new"
        if mode == "abort":
            self.abort_all()
        if mode == "wait":
            await self._drained()

    def resume(self) -> None:
        self.paused = "no"
        self.notify()

    def abort_all(self) -> None:
        for turn in self.turns:
            turn.aborted = True
        self.gauges = (0, 0)
        self.notify()

    async def _drained(self) -> None:
        while any(t.running and not t.aborted for t in self.turns) and not self.dead:
            self._changed.clear()
            await self._changed.wait()

    async def idle(self) -> None:
        """Wait until no request is left, running or waiting."""
        while self.turns and not self.dead:
            self._changed.clear()
            await self._changed.wait()

    def reset_prefix_cache(self) -> None:
        self._prefixes.clear()
