"""One soak: clients and weather over one box, until the time is up, and the books closed."""

import asyncio
import random
import time
from pathlib import Path

import aiohttp

from tests.e2e.harness import Box

from .books import Books, Breach, Kind, Wish
from .clients import Client, others
from .weather import ALIASES, EMBEDDER, MODELS, Weather

CLIENTS = 48
_LEAVES = ("in its head", "in its body", "at once", "while it waits", "after words")
_DEFECT = ("Traceback", "this is a defect", "Task exception was never", "never awaited")


class Soak:
    def __init__(self, root: Path, seed: int, minutes: float) -> None:
        self.seed, self.minutes = seed, minutes
        self.books = Books()
        self.box = Box(root)
        self.weather = Weather(self.box, self.books, random.Random(f"{seed} weather"))
        self._until = 0.0

    def run(self) -> None:
        """Raises: Breach."""
        try:
            asyncio.run(self._run())
        except BaseExceptionGroup as group:
            breaches = group.subgroup(Breach)
            if breaches is None:
                raise
            raise _first(breaches) from None
        finally:
            self.weather.abandon()

    async def _run(self) -> None:
        await self.weather.begin()
        self._until = time.monotonic() + 60 * self.minutes
        async with asyncio.TaskGroup() as group:
            storm = group.create_task(self.weather.blow(self._until))
            async with asyncio.TaskGroup() as clients:
                for number in range(CLIENTS):
                    clients.create_task(self._client(number))
            await storm
        await self.weather.quiet()
        await self.weather.end()
        self._close()

    async def _client(self, number: int) -> None:
        dice = random.Random(f"{self.seed} client {number}")
        urls = [self.box.url] * 3 + [f"http://127.0.0.1:{self.weather.door}"]
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(urls[0], timeout=timeout) as front,
            aiohttp.ClientSession(urls[3], timeout=timeout) as door,
        ):
            while time.monotonic() < self._until:
                await asyncio.sleep(dice.expovariate(1 / 0.1))
                if dice.random() < 0.05:
                    await others(front, set(MODELS), dice)
                    continue
                wish = self._wish(dice)
                self.books.wishes.append(wish)
                at_door = wish.model == "c" and dice.random() < 0.3
                session, port = (door, self.weather.door) if at_door else (front, self.box.port)
                await Client(session, self.books, port, dice).ask(wish)

    def _wish(self, dice: random.Random) -> Wish:
        model = dice.choice(MODELS)
        name = ALIASES.get(model, model) if dice.random() < 0.3 else model
        stream, tokens = dice.random() < 0.6, dice.randrange(1, 40)
        if stream and dice.random() < 0.15:
            tokens = dice.randrange(100, 500)
        protocol = dice.choice(("chat", "chat", "completions", "messages"))
        if model == EMBEDDER:
            protocol, stream, tokens = "embeddings", False, 0
        leaves = dice.choice(_LEAVES) if dice.random() < 0.25 else None
        if leaves == "after words" and not stream:
            leaves = "while it waits"
        wanted = None if name == "a" and dice.random() < 0.1 else name
        number = len(self.books.wishes)
        return Wish(number, protocol, model, wanted, tokens, stream, leaves, self.seed)

    def _close(self) -> None:
        """Raises: Breach where the books do not balance, or nothing was shown."""
        open_ones = [wish for wish in self.books.wishes if wish.outcome == "open"]
        if open_ones:
            raise Breach("nobody knows what became of it", open_ones[0])
        log = self.box.log()
        for word in _DEFECT:
            if word in log:
                at = log.index(word)
                raise Breach(f"the daemon's log tells of a defect:\n{log[at - 500 : at + 2000]}")
        seen = {trouble.kind for trouble in self.books.troubles}
        if self.minutes >= 1.5 and (missing := set(Kind) - seen):
            raise Breach(f"shows little: there was no {', '.join(kind.value for kind in missing)}")
        if self.minutes >= 1.5 and not self.frozen:
            raise Breach("shows little: no answer was frozen")

    @property
    def frozen(self) -> int:
        """How often answers were frozen, as the daemon tells."""
        return sum("frozen, falling asleep" in line for line in self.box.log().splitlines())


def _first(group: BaseExceptionGroup[Breach]) -> Breach:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, Breach)
    return found
