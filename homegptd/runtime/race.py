"""Two coroutines, of which the first to end counts."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


async def first(one: Coroutine[None, None, A], other: Coroutine[None, None, B]) -> A | B:
    """The result of whichever ends first; the other one is cancelled. Errors pass through.

    No task of the group ever fails: before Python 3.13 a failing one can make its parent forget
    that it was cancelled meanwhile.
    """
    found: list[A | B | Exception] = []

    async def run(race: Coroutine[None, None, A | B]) -> None:
        try:
            found.append(await race)
        except Exception as error:  # noqa: BLE001  # raised again below
            found.append(error)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(run(one), name="one"),
                group.create_task(run(other), name="other"),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
    finally:  # one that was cancelled before its first turn was never awaited
        one.close()
        other.close()
    result = found[0]
    if isinstance(result, Exception):
        raise result
    return result
