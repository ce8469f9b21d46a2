"""One vLLM server, from 0.11 to 0.33: sleep, wake and proofs as verified transactions.

vLLM's 200 proves nothing: `/sleep` can answer 200 for a level it did not apply, `/wake_up` for
weights that were never reloaded, `/health` for an engine that hangs. So each transaction ends with
a look that crosses into the engine process (`/is_sleeping`), and at the model's own words; at the
memory looks whoever gives the orders. What cannot be verified is a fault, and the machine restarts
that engine.

Never called: `/resume` (unpauses the scheduler over unmapped weights), `/pause`, `tags=` lists
with commas (silently ignored).
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from homegptd.adapters.faults import Broken, EngineFault, Hung, Lied, Unsafe, cannot
from homegptd.adapters.vllm_canary import TOKENS, TOKENS_KEPT, Canary, Kind, Reference, recognise
from homegptd.adapters.vllm_proofs import Rig, prove_freeze, prove_reload
from homegptd.adapters.vllm_versions import PROFILES, Profile, profile_of
from homegptd.adapters.vllm_wire import Answer, Params, Wire, truth
from homegptd.core.model import ModelId, Proof, SleepLevel, SleepMode, Traits

POLL_S = 0.1
"""Between two looks at something that only vLLM knows; there is no event to wait for."""
_PINS_MIB_S = 512.0
"""Half of the slowest pinning that was reported; what is known of a size may be half of it too."""


_STREAM = (None, Kind.GENERATE)
"""Whose answers can be frozen: models of this kind, and those of which it is not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds; vLLM has none of its own for any of this (vllm#45644)."""

    ready_s: float = 2.0
    """/health reads a flag; an API process that cannot do that in time is not ready."""
    ask_s: float = 10.0
    """/version and /v1/models, right after start, while caches still fill."""
    check_s: float = 20.0
    """/is_sleeping waits for the running step to end: a long prefill, or a kernel compiled at its
    first use (20 s seen on two CPU cores). Shorter would restart busy engines."""
    sleep_s: float = 180.0
    """The first level-1 sleep pins host memory, 1-4 GiB/s; for 90 GiB and more see `for_size`."""
    settle_s: float = 20.0
    """How long an unanswered order may still show its effect before it counts as a fault."""
    idle_s: float = 30.0
    """Before 0.17 the engine must be seen empty before it is put to sleep."""
    wake_s: float = 120.0
    """Bytes over PCIe: 64 GiB take 20 s at gen 3 x4, the slowest link one meets at home."""
    reload_s: float = 600.0
    """Level 2 reads the checkpoint again, perhaps from a cold disk."""
    canary_s: float = 60.0
    """A few tokens; the first request after a start may compile kernels."""
    prove_s: float = 300.0
    """A few hundred tokens, twice, with a sleep in between."""

    @classmethod
    def for_size(cls, pinned_mib: int) -> "Deadlines":
        """For an engine whose first sleep pins that much. It may be the one inside of a proof."""
        usual = cls()
        more_s = max(pinned_mib / _PINS_MIB_S - usual.sleep_s, 0.0)
        return replace(usual, sleep_s=usual.sleep_s + more_s, prove_s=usual.prove_s + more_s)


class VllmEngine:
    """Fits `EnginePort`. One transaction at a time is the caller's care."""

    def __init__(
        self,
        model: ModelId,
        at: Path | str,
        *,
        kind: Kind | None = None,
        deadlines: Deadlines | None = None,
        api_key: str | None = None,
        canary_reference: Reference | None = None,
    ) -> None:
        """`at`: the engine's Unix socket, or a base URL. `kind`: None to find out by asking.

        `canary_reference`: what the healthy model said in an earlier life, if anybody kept it.
        """
        self.canary_reference = canary_reference
        self._model = model
        self._wire = Wire(at, api_key)
        self._kind = kind
        self.deadlines = deadlines or Deadlines()
        self._profile: Profile = PROFILES[-1]
        self._canary: Canary | None = None
        self._longest = 0

    # --- asking

    async def ready(self) -> bool:
        """200 from /health. That it listens is the news: vLLM binds early and listens late."""
        try:
            return (await self._ask("GET", "/health", self.deadlines.ready_s)).ok
        except EngineFault:
            return False

    async def identify(self) -> Traits:
        with cannot(f'identify "{self._model}"'):
            version = str(
                (await self._ask("GET", "/version", self.deadlines.ask_s)).pick("version")
            )
            self._profile = profile_of(version)
            self._canary = None  # a new life may serve under another name
            sleeping = await self._ask("GET", "/is_sleeping", self.deadlines.check_s)
            asleep = sleeping.status != 404 and truth(sleeping)
            if not asleep:
                await self._sing()
            level = await self._asleep_level() if asleep else None
            if asleep and self._profile.takes_back:
                # Whoever was here before may have died between two halves of a wake, which nothing
                # tells: on an engine that is wholly asleep this does nothing. One whose level
                # nothing tells (no metrics) is reloaded at its wake in any case.
                await self._order_sleep(level or SleepLevel.TWO, SleepMode.KEEP)
            return self._traits(version, sleeping.status != 404, asleep=asleep, level=level)

    async def is_sleeping(self) -> bool:
        with cannot(f'ask "{self._model}" whether it sleeps'):
            return await self._sleeps(self.deadlines.check_s)

    async def check(self) -> None:
        with cannot(f'vouch for "{self._model}"'):
            answer = await self._ask("GET", "/is_sleeping", self.deadlines.check_s)
            if answer.status == 404:  # no dev mode: the models list is the best there is
                answer = await self._ask("GET", "/v1/models", self.deadlines.ask_s)
            answer.required()

    async def speak(self) -> None:
        """Workers that wait for each other leave all else answering (vllm#45094)."""
        await self.check()
        with cannot(f'get a word out of "{self._model}"'):
            await (await self._met()).sing(deadline_s=self.deadlines.canary_s, tokens=1)

    # --- telling

    async def sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        """`WAIT` is for an engine that was drained: nobody is served any more, so if it does not
        end by itself what is left in it is aborted. `KEEP` freezes what runs (level 1, 0.17+)."""
        with cannot(f'put "{self._model}" to sleep'):
            async with self._wire.kept():
                await self._put_to_sleep(level, mode)

    async def rouse(self, level: SleepLevel) -> None:
        with cannot(f'rouse "{self._model}"'):
            async with self._wire.kept():
                await self._wake_weights(level)
                if not await self._sleeps(self.deadlines.check_s):
                    raise Lied("vLLM was to wake its weights alone, and is awake")

    async def wake(self, level: SleepLevel, *, frozen: bool, roused: bool = False) -> None:
        with cannot(f'wake "{self._model}"'):
            async with self._wire.kept():
                await self._wake_up(level, frozen=frozen, roused=roused)

    async def prove(self, proof: Proof) -> str:
        """The engine is awake, idle and nobody else's; so it is again after a proof that held."""
        match proof:
            case Proof.FREEZE:
                act, trial = "freeze answers of", prove_freeze
            case Proof.RELOAD:
                act, trial = "rely on reloading", prove_reload
            case _:
                assert_never(proof)
        with cannot(f'{act} "{self._model}"'):
            try:
                async with asyncio.timeout(self.deadlines.prove_s):
                    return await trial(await self._rig(proof))
            except TimeoutError:
                raise Hung(f"the trial did not end in {self.deadlines.prove_s:g} s") from None

    # --- the transactions

    async def _put_to_sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        self._must_survive(level, mode)
        if self._profile.dies_of_sleep_under_load:
            await self._see_it_empty()
        await self._order_sleep(level, mode)
        if not await self._sleeps(self.deadlines.check_s):
            raise Lied("vLLM answered 200 to /sleep and is awake")

    async def _order_sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        asked = {"level": str(level.value)}
        if self._profile.sleep_modes:
            asked["mode"] = mode.value
        try:
            answer = await self._ask("POST", "/sleep", self.deadlines.sleep_s, asked)
        except Hung as hung:
            if self._profile.sleep_modes and mode is SleepMode.WAIT:
                # A pending wait already shows as sleeping, so looking tells nothing. Aborting what
                # hangs in the drained engine lets both orders end (seen on 0.32).
                asked["mode"] = SleepMode.ABORT.value
                (await self._ask("POST", "/sleep", self.deadlines.settle_s, asked)).required()
                return
            await self._settle(hung, asleep=True)
            return
        answer.required()
        if self._profile.json_bodies and answer.pick("status") != "sleeping":
            raise Lied(f"vLLM answered /sleep with {answer.pick('status')!r}")

    async def _wake_up(self, level: SleepLevel, *, frozen: bool, roused: bool = False) -> None:
        by_halves = roused or level is SleepLevel.TWO
        if by_halves and not roused:
            await self._wake_weights(level)
        await self._order_wake(["kv_cache"] if by_halves else ())
        if level is SleepLevel.TWO:
            reset = await self._ask("POST", "/reset_prefix_cache", self.deadlines.ask_s)
            reset.required()
        if await self._sleeps(self.deadlines.check_s):
            raise Lied("vLLM answered 200 to /wake_up and still sleeps")
        kept = 1 if frozen else TOKENS_KEPT
        await self._sing(tokens=kept if level is SleepLevel.ONE else TOKENS)

    async def _wake_weights(self, level: SleepLevel) -> None:
        await self._order_wake(["weights"])
        if level is SleepLevel.TWO:
            await self._reload()

    async def _order_wake(self, tags: Iterable[str]) -> None:
        """Without tags, all of it. A 5xx (no memory) is retried once where that is safe."""
        asked = [("tags", tag) for tag in tags]
        part = bool(asked) and asked[-1][1] != "kv_cache"
        try:
            answer = await self._ask("POST", "/wake_up", self.deadlines.wake_s, asked)
            if answer.status >= 500 and self._profile.idempotent_wake:
                answer = await self._ask("POST", "/wake_up", self.deadlines.wake_s, asked)
        except Hung as hung:
            if part:
                raise
            await self._settle(hung, asleep=False)
            return
        answer.required()
        if self._profile.json_bodies:
            said, due = answer.pick("status"), "sleeping" if part else "awake"
            if said != due:
                raise Lied(f"vLLM answered /wake_up with {said!r} instead of {due!r}")

    async def _reload(self) -> None:
        answer = await self._wire.ask(
            "POST",
            "/collective_rpc",
            deadline_s=self.deadlines.reload_s,
            body={"method": "reload_weights"},
        )
        try:
            answer.required()
        except Broken as fault:
            hint = "this checkpoint cannot be reloaded in place: set sleep_level: 1 for this model"
            raise Broken(f"the weights were not reloaded: {fault.message}", hint=hint) from None

    async def _sing(self, tokens: int = TOKENS) -> None:
        """Compare with the reference, or record it at the first time.

        A wake from level 2 without a reference (an adopted sleeper) records too: that reload works
        was proved for this model and image before level 2 was ever used.
        """
        canary, deadline_s = await self._met(), self.deadlines.canary_s
        if self.canary_reference is None:
            self.canary_reference = await canary.sing(deadline_s=deadline_s)
        else:
            await canary.confirm(self.canary_reference, deadline_s=deadline_s, tokens=tokens)

    # --- looking

    async def _ask(self, method: str, path: str, deadline_s: float, params: Params = ()) -> Answer:
        return await self._wire.ask(method, path, deadline_s=deadline_s, params=params)

    async def _sleeps(self, deadline_s: float) -> bool:
        answer = await self._ask("GET", "/is_sleeping", deadline_s)
        return truth(answer)

    async def _settle(self, hung: Hung, *, asleep: bool) -> None:
        """After an order that was not answered in time: it may only have been slow.

        Raises `Hung` if the engine is not as ordered within another `settle_s`.
        """
        try:
            async with asyncio.timeout(self.deadlines.settle_s):
                while True:
                    if await self._sleeps(self.deadlines.settle_s) is asleep:
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            due = "asleep" if asleep else "awake"
            raise Hung(f"{hung.message}, and is still not {due}") from None

    async def _see_it_empty(self) -> None:
        """Wait until nothing runs in an engine that sleep under load would kill.

        Its gauges are written by engine steps only, so an aborted answer leaves them stale for
        ever: one token asked for in between makes the engine write them again.
        """
        canary = await self._met()
        try:
            async with asyncio.timeout(self.deadlines.idle_s):
                while await self._inside() > 0:
                    await canary.sing(deadline_s=self.deadlines.idle_s, tokens=1)
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unsafe(
                f"requests still run in it after {self.deadlines.idle_s:g} s, and before"
                " vLLM 0.17 sleep under load kills the engine",
                hint="use an image with vLLM 0.29 or later",
            ) from None

    async def _inside(self) -> float:
        """Requests that run or wait in the engine, as of its last step."""
        gauges = await self._gauges("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(gauges.values())

    async def _asleep_level(self) -> SleepLevel | None:
        """By the gauge of 0.12+, which knows no level 0 and errs after level 2 upon level 1."""
        gauges = await self._gauges("vllm:engine_sleep_state{")
        states = {"weights_offloaded": SleepLevel.ONE, "discard_all": SleepLevel.TWO}
        said = {states[s] for s in states for g in gauges if f'"{s}"' in g and gauges[g] == 1}
        return said.pop() if len(said) == 1 else None

    async def _gauges(self, *names: str) -> dict[str, float]:
        """Lines of /metrics that begin with one of the names: `name{labels}` to value."""
        text = (await self._ask("GET", "/metrics", self.deadlines.ask_s)).required().body.decode()
        lines = [line for line in text.splitlines() if line.startswith(names)]
        try:
            return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        except ValueError:
            raise Broken("vLLM's /metrics cannot be read") from None

    # --- knowing

    async def _met(self) -> Canary:
        """The canary of the model served here, by name and kind; the engine must be awake."""
        if self._canary is None:
            answer = await self._ask("GET", "/v1/models", self.deadlines.ask_s)
            card = answer.pick("data", 0)
            self._longest = int(card.get("max_model_len") or 0)
            self._canary = await self._recognised(str(answer.pick("data", 0, "id")))
            self._kind = self._canary.kind
        return self._canary

    async def _recognised(self, name: str) -> Canary:
        if self._kind is not None:
            return Canary(self._wire, name, self._kind)
        return await recognise(self._wire, name, deadline_s=self.deadlines.canary_s)

    def _must_survive(self, level: SleepLevel, mode: SleepMode) -> None:
        """Raises `Unsafe`."""
        levels, why = self._levels(has_sleep=True)
        if level not in levels:
            raise Unsafe(why or f"level {level.value} is not safe here", lasting=True)
        if mode is SleepMode.KEEP and not self._profile.sleep_modes:
            raise Unsafe("answers cannot be frozen before vLLM 0.17", lasting=True)
        if mode is SleepMode.KEEP and level is not SleepLevel.ONE:
            raise Unsafe("answers are frozen at level 1 only", lasting=True)

    def _levels(self, *, has_sleep: bool) -> tuple[frozenset[SleepLevel], str | None]:
        """What to trust it with, and why not with more."""
        if not has_sleep:
            return frozenset(), (
                "vLLM has no /sleep: VLLM_SERVER_DEV_MODE=1 is missing in its environment"
            )
        if not self._profile.sleeps:
            return frozenset(), "vLLM before 0.11 does not sleep safely"
        if self._kind is Kind.OTHER:
            return self._profile.levels - {SleepLevel.TWO}, (
                "level 2 needs a canary, and models of this kind have none"
            )
        return self._profile.levels, None

    def _traits(
        self, version: str, has_sleep: bool, *, asleep: bool, level: SleepLevel | None
    ) -> Traits:
        levels, why = self._levels(has_sleep=has_sleep)
        return Traits(
            version,
            levels,
            why,
            can_keep=bool(levels) and self._profile.sleep_modes and self._kind in _STREAM,
            can_rouse=bool(levels) and self._profile.takes_back,
            asleep=asleep,
            asleep_level=level,
        )

    async def _rig(self, proof: Proof) -> Rig:
        canary = await self._met()
        if canary.kind is not Kind.GENERATE and proof is Proof.FREEZE:
            raise Unsafe("only answers that stream can be frozen", lasting=True)
        return Rig(
            canary=canary,
            longest=self._longest,
            sleep=self._put_to_sleep,
            wake=self._wake_up,
            deadline_s=self.deadlines.prove_s,
        )
