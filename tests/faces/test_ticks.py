"""One timer for many."""

from __future__ import annotations

import asyncio

from homegptd.faces.ticks import Ticks


class Counter:
    def __init__(self) -> None:
        self.ticks = 0
        self.first = asyncio.Event()
        self.third = asyncio.Event()

    def tick(self) -> None:
        self.ticks += 1
        self.first.set()
        if self.ticks == 3:
            self.third.set()


async def heard(event: asyncio.Event) -> None:
    async with asyncio.timeout(5):
        await event.wait()


async def test_who_joins_is_told_until_it_leaves() -> None:
    ticks, one, two = Ticks(asyncio.get_running_loop()), Counter(), Counter()
    ticks.join(one, 0.01)
    await heard(one.first)
    ticks.join(two, 0.01)
    await heard(two.third)
    ticks.leave(one, 0.01)
    told, two.ticks = one.ticks, 0
    two.third.clear()
    await heard(two.third)
    assert one.ticks == told >= 3


async def test_each_length_has_its_own_pace() -> None:
    ticks, quick, slow = Ticks(asyncio.get_running_loop()), Counter(), Counter()
    ticks.join(slow, 60.0)
    ticks.join(quick, 0.01)
    await heard(quick.third)
    assert slow.ticks == 0


async def test_it_begins_again_after_nobody_was_there() -> None:
    ticks, one = Ticks(asyncio.get_running_loop()), Counter()
    ticks.join(one, 0.01)
    ticks.leave(one, 0.01)
    await asyncio.sleep(0.05)
    assert one.ticks == 0
    ticks.join(one, 0.01)
    await heard(one.third)


async def test_who_is_made_to_leave_by_another_is_not_told_any_more() -> None:
    ticks, left = Ticks(asyncio.get_running_loop()), []

    class Pusher(Counter):
        other: Pusher

        def tick(self) -> None:
            ticks.leave(self.other, 0.01)
            left.append(self)
            super().tick()

    one, two = Pusher(), Pusher()
    one.other, two.other = two, one
    ticks.join(one, 0.01)
    ticks.join(two, 0.01)
    await asyncio.sleep(0.1)
    assert len(set(left)) == 1
