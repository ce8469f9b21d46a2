"""The engine behind the HTTP server: executor and memory, as vLLM's EngineCore has them.

Three things are kept apart because vLLM keeps them apart, and its oddities come from there: the
*scheduler* may be paused; the *executor* believes that some tags sleep; the *memory* really is
mapped or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from homegptd.sim.card import Card
from homegptd.sim.faults import Faults
from homegptd.sim.options import Options
from homegptd.sim.physics import (
    TAGS,
    HostOutOfMemory,
    OutOfMemory,
    PhysicsError,
    StartRefused,
)
from homegptd.sim.scheduler import Mode, Scheduler, log


class Engine(Scheduler):
    """One simulated engine process."""

    def __init__(self, options: Options, card: Card, faults: Faults) -> None:
        super().__init__(options, card, faults)
        self.executor_asleep: set[str] = set()
        self.killed = False  # by the kernel, for want of host memory
        self.control_pending = 0
        self._lock = asyncio.Lock()  # the engine core does one utility call at a time

    # -- start ---------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load the model. Raises PhysicsError when the box has no room for it."""
        speeds, memory = self.options.speeds, self.memory
        try:
            await self._start_faults()
            with self.card.locked() as box:
                memory.begin_start(box)
            log.info("Loading weights of %s", self.options.model)
            await self.pass_time(speeds.load_s(memory.footprint))
            with self.card.locked() as box:
                memory.end_start(box)
        except PhysicsError:
            self.drop_memory()
            raise
        log.info("Model loading took %.2f GiB memory", memory.footprint.weights_mib / 1024)
        log.info("Available KV cache memory: %.2f GiB", memory.kv_mib / 1024)
        await self.pass_time(speeds.compile_s)

    async def _start_faults(self) -> None:
        faults = self.faults
        if slow := faults.take("slow", "start"):
            await self.pass_time(slow.value)
        if faults.take("hang", "start"):
            await self.for_ever()
        if faults.take("oom", "start"):
            raise StartRefused("CUDA out of memory. Tried to allocate 1.00 GiB.")
        if faults.take("die", "start"):
            raise StartRefused("Engine core initialization failed. See root cause above.")

    # -- sleep and wake ------------------------------------------------------------------------

    async def sleep(
        self, level: int, mode: Mode, *, keep: Sequence[Literal["weights"]] = ()
    ) -> None:
        """Raises PhysicsError (a poisoned engine) or EngineDead."""
        if self.profile.pauses_scheduler:
            await self.pause(mode)
            if level == 0:
                return
        async with self._lock:
            await self._executor_sleep(level, keep)

    async def _executor_sleep(self, level: int, keep: Sequence[Literal["weights"]]) -> None:
        await self._stay_if_dead()
        half = bool(self.executor_asleep) and "weights" not in self.executor_asleep
        if self.executor_asleep and not (half and self.profile.half_awake_sleeps):
            log.warning("Executor is already sleeping.")
            return
        if (
            not self.options.sleep_mode
        ):  # nothing lies in the pool: the call succeeds, frees nothing
            self.executor_asleep = set(TAGS)
            return
        memory, first = self.memory, not self.memory.pinned
        try:
            with self.card.locked() as box:
                memory.begin_sleep(box, level)
        except HostOutOfMemory as why:
            self.killed = True
            self.die(str(why))
        if not self.profile.pauses_scheduler:
            self.memory.asleep.update(TAGS)  # running requests touch unmapped memory at once
        await self.pass_time(self.options.speeds.sleep_s(memory.footprint, level, first=first))
        await self._stay_if_dead()
        leak = self.faults.take("leak", "sleep")
        with self.card.locked() as box:
            memory.end_sleep(box, level, leak_mib=int(leak.value) if leak else 0, keep=keep)
        self.executor_asleep = set(TAGS)
        self.reset_prefix_cache()
        self._cold = True
        log.info("It took the executor to fall asleep. Level %d", level)

    async def poisonous_sleep(self, level: int, mode: Mode) -> None:
        """A sleep that another process disturbed: done, but the executor does not know it."""
        await self.sleep(level, mode)
        self.executor_asleep.clear()

    async def wake(self, tags: Sequence[str] | None) -> bool:
        """True when nothing sleeps afterwards. Raises PhysicsError when the memory is not there.

        "scheduling" is for level 0 and no tag of the executor; one unknown tag makes it do nothing.
        """
        async with self._lock:
            await self._stay_if_dead()
            wanted = [*TAGS] if tags is None else [tag for tag in tags if tag != "scheduling"]
            if wanted:
                await self._executor_wake(wanted, all_tags=tags is None)
            if not self.executor_asleep or self.profile.partial_wake_runs:
                self.resume()
            return not self.executor_asleep

    async def _executor_wake(self, wanted: Sequence[str], *, all_tags: bool) -> None:
        chosen = [tag for tag in TAGS if tag in wanted and tag in self.executor_asleep]
        if not chosen or (not all_tags and len(chosen) < len(wanted)):
            log.warning("Executor is not sleeping, or not with tags %s.", wanted)
            return
        if not self.options.sleep_mode:
            self.executor_asleep.difference_update(chosen)
            return
        memory = self.memory
        if self.faults.take("oom", "wake"):
            raise self._half_mapped()
        with self.card.locked() as box:
            memory.begin_wake(box, chosen)
        await self.pass_time(self.options.speeds.wake_s(memory.footprint, memory.level, chosen))
        await self._stay_if_dead()
        with self.card.locked() as box:
            memory.end_wake(box, chosen)
        self.executor_asleep.difference_update(chosen)
        log.info("It took the executor to wake up tags %s.", chosen)

    def _half_mapped(self) -> OutOfMemory:
        """Let a foreign program fill the GPU for the length of one attempt, leaving half."""
        with self.card.locked() as box:
            for gpu, need in self.memory.need_mib().items():
                box.take("foreign:oom", gpu, max(0, box.free_mib(gpu) - need // 2))
            try:
                self.memory.begin_wake(box)
            except OutOfMemory as why:
                return why
            finally:
                box.drop("foreign:oom")
        return OutOfMemory("CUDA Error: out of memory at cumem_allocator.cpp:119")

    def is_sleeping_now(self) -> bool:
        return bool(self.executor_asleep) or self.paused != "no"

    async def is_sleeping(self) -> bool:
        """Crosses into the engine: waits while it is busy with a sleep or a wake."""
        async with self._lock:
            await self._stay_if_dead()
            return self.is_sleeping_now()

    async def reload(self) -> None:
        """`reload_weights` on all workers. Raises PhysicsError."""
        async with self._lock:
            await self._stay_if_dead()
            if self.memory.asleep & {"weights"}:
                self.die("CUDA error: an illegal memory access was encountered")
            await self.pass_time(self.options.speeds.reload_s(self.memory.footprint))
            await self._stay_if_dead()
            self.memory.reload()

    async def _stay_if_dead(self) -> None:
        """A call that was pending when the engine died is never answered (the zombie)."""
        if self.dead:
            await self.for_ever()
