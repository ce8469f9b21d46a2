"""What a box shows for itself before the machine relies on it: freezing, and reloading.

Both are tried on the live engine, by the same transactions that will be used later.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from homegptd.adapters.faults import Broken, EngineFault, Garbled, Lied
from homegptd.adapters.vllm_canary import Canary, differ, likely, same
from homegptd.core.model import SleepLevel, SleepMode

STORY = "Tell a long story about three models that share one card and take turns"
STORY_TOKENS = 64
"""To begin with: a second or two at home. Doubled while the story ends before the freeze lands."""
STORY_TOKENS_AT_MOST = 2048
FREEZE_AFTER = 16
"""Tokens heard before the freeze is ordered."""
MIDDLE = 0.4
"""Of the time that the unfrozen story took: the latest moment to freeze the second one."""
SILENCE_S = 0.5
"""How long a frozen answer is watched. A token already written to the socket when vLLM answered
/sleep may still come within the first half of it."""
RELOAD_TOKENS = 32


class Wake(Protocol):
    def __call__(self, level: SleepLevel, *, frozen: bool) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class Rig:
    """What a trial works with. The engine's transactions come without their prefix."""

    canary: Canary
    longest: int
    """Tokens that prompt and answer may have together; 0 if the server does not say."""
    sleep: Callable[[SleepLevel, SleepMode], Awaitable[None]]
    wake: Wake
    deadline_s: float


@dataclass(slots=True)
class Story:
    """A greedy answer as it arrived; token ids where the server gives them (0.10.2+)."""

    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    under_way: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def hear(self, event: Mapping[str, Any]) -> None:
        for choice in event.get("choices") or ():
            self.pieces.append(str(choice.get("text") or ""))
            self.ids += choice.get("token_ids") or ()
            self.prompt_ids += choice.get("prompt_token_ids") or ()
            self.finish = choice.get("finish_reason") or self.finish
        if len(self.pieces) >= FREEZE_AFTER or self.finish:
            self.under_way.set()


async def prove_reload(rig: Rig) -> str:
    """Level 2, reload, and the model must say to the letter what it said before."""
    before = await rig.canary.sing(deadline_s=rig.deadline_s, tokens=RELOAD_TOKENS)
    await rig.sleep(SleepLevel.TWO, SleepMode.WAIT)
    await rig.wake(SleepLevel.TWO, frozen=False)
    after = await rig.canary.sing(deadline_s=rig.deadline_s, tokens=RELOAD_TOKENS)
    equal = after == before if isinstance(before, str) else same(after, before)
    if not equal:
        raise Garbled(f"after level 2 and reload {differ(after, before)}")
    said = f"{RELOAD_TOKENS} greedy tokens" if isinstance(before, str) else "the answer"
    return f"level 2 and reload: {said} equal to before"


async def prove_freeze(rig: Rig) -> str:
    """A greedy answer, whole; and again, put to sleep in its middle. They must agree."""
    tokens = STORY_TOKENS
    most = min(STORY_TOKENS_AT_MOST, rig.longest - 64 if rig.longest else STORY_TOKENS_AT_MOST)
    while True:
        tokens = min(tokens, most)
        whole, began = Story(), time.monotonic()
        await _tell(rig, whole, tokens)
        middle_s = (time.monotonic() - began) * MIDDLE
        frozen, at = await _tell_frozen(rig, tokens, middle_s=middle_s)
        if at is not None:
            return await _compare(rig, whole, frozen, at=at)
        if tokens >= most:
            raise Broken(f"{tokens} tokens were over before a freeze could take hold")
        tokens *= 2


async def _tell(rig: Rig, story: Story, tokens: int) -> None:
    body = {
        "model": rig.canary.served_name,
        "prompt": STORY,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    try:
        await rig.canary.wire.follow(
            "/v1/completions", body, deadline_s=rig.deadline_s, heard=story.hear
        )
    finally:
        story.under_way.set()  # whoever waits for the middle must not wait for ever


async def _tell_frozen(rig: Rig, tokens: int, *, middle_s: float) -> tuple[Story, int | None]:
    """The story, and how many characters had come when it froze; None if it ended before.

    Frozen once some tokens were heard, or after `middle_s` where they come in one burst at the end
    (a starved API server, seen on two CPU cores).
    """
    story = Story()
    at: int | None = None
    try:
        async with asyncio.TaskGroup() as group:
            telling = group.create_task(_tell(rig, story, tokens), name="proof story")
            with suppress(TimeoutError):
                async with asyncio.timeout(middle_s):
                    await story.under_way.wait()
            if story.finish is None:
                await rig.sleep(SleepLevel.ONE, SleepMode.KEEP)
                at = await _silence(story)
                await rig.wake(SleepLevel.ONE, frozen=at is not None)
            await telling
    except* EngineFault as faults:
        raise _first(faults) from None
    return story, at


async def _silence(story: Story) -> int | None:
    """Raises `Lied` if tokens come from an engine that says it sleeps."""
    await asyncio.sleep(SILENCE_S / 2)
    if story.finish is not None:
        return None
    heard = len(story.pieces)
    await asyncio.sleep(SILENCE_S / 2)
    if len(story.pieces) != heard:
        raise Lied(f"{len(story.pieces) - heard} events came from an engine that sleeps")
    return len(story.text)


async def _compare(rig: Rig, whole: Story, frozen: Story, *, at: int) -> str:
    if frozen.finish != "length":
        raise Broken(f"the frozen answer ended with {frozen.finish!r} instead of 'length'")
    where = f"an answer frozen after {at} of {len(whole.text)} characters"
    if frozen.text == whole.text:
        return f"{where} equal to the unfrozen one"
    if frozen.text[:at] != whole.text[:at]:
        raise Garbled(f"{where} differs from the unfrozen one before the freeze")
    gaps = await _gaps_after(rig, frozen, at)
    worst = max(gaps, default=float("inf"))
    if not likely(gaps):
        raise Garbled(f"{where} went on wrong: a token lies {worst:.1f} nats off the likeliest")
    return f"{where} likely after it: no token more than {worst:.2f} nats off the likeliest"


async def _gaps_after(rig: Rig, story: Story, at: int) -> Sequence[float]:
    """The healthy model's view of what was said after the freeze."""
    if story.ids and story.prompt_ids:
        begin = _tokens_until(story, at)
        asked = [*story.prompt_ids, *story.ids[:begin]], story.ids[begin:]
        return await rig.canary.gaps(*asked, deadline_s=rig.deadline_s)
    text = story.text
    return await rig.canary.gaps(STORY + text[:at], text[at:], deadline_s=rig.deadline_s)


def _tokens_until(story: Story, at: int) -> int:
    """One token an event, as long as vLLM streams with an interval of 1."""
    heard = 0
    for number, piece in enumerate(story.pieces):
        if heard >= at:
            return min(number, len(story.ids))
        heard += len(piece)
    return len(story.ids)


def _first(group: BaseExceptionGroup[EngineFault]) -> EngineFault:
    fault = group.exceptions[0]
    return _first(fault) if isinstance(fault, BaseExceptionGroup) else fault
