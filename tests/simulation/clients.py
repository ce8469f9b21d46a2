"""Who asks: requests that hang up, habits that make them, and a router as simple as can be."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

from homegptd.core.model import Awake, ModelId, TicketId
from homegptd.runtime.lease import Lease, Refused
from homegptd.runtime.scheduler import Scheduler

from .engines import Machines
from .promises import Count

HOUR = 3600.0
_LOST = "its engine died"


@dataclass(eq=False)
class Request:
    """One request of one client, and how it is to go."""

    model: ModelId
    work_s: float
    stream: bool
    priority: int = 0
    hangs_up_after_s: float | None = None
    hangs_up_when_granted: bool = False
    ends_slowly_s: float = 0.0
    """How long it goes on reading after it was told that its answer is cut."""
    fate: str | None = None
    """Why it was cancelled."""
    task: asyncio.Task[None] | None = None

    def hang_up(self, why: str = "hung up") -> None:
        if self.task is not None and self.fate is None:
            self.fate = why
            self.task.cancel()


class Clients:
    """All clients of one box. Each request ends in exactly one outcome, which is counted."""

    def __init__(
        self,
        machines: Machines,
        count: Count,
        *,
        door: Callable[[], Awaitable[Scheduler]],
        told: Callable[[str], None],
        violated: Callable[[str], None],
        group: asyncio.TaskGroup,
    ) -> None:
        self.machines = machines
        self.open: dict[int, Request] = {}
        self._count = count
        self._door = door
        self._told = told
        self._violated = violated
        self._group = group
        self._loop = machines.loop
        self._by_ticket: dict[TicketId, Request] = {}

    def send(self, request: Request) -> asyncio.Task[None]:
        self._count.requests += 1
        number = self._count.requests
        self.open[number] = request
        request.task = self._group.create_task(self._life(number, request), name=f"client {number}")
        return request.task

    def granted(self, ticket: TicketId) -> None:
        """Some clients leave in the very turn in which their grant arrives."""
        request = self._by_ticket.get(ticket)
        if request is not None and request.hangs_up_when_granted:
            self._loop.call_soon(request.hang_up)

    def daemon_was_killed(self) -> None:
        self._by_ticket.clear()
        for request in list(self.open.values()):
            request.hang_up("lost with the daemon")

    async def _life(self, number: int, request: Request) -> None:
        outcome, timer = "nobody answered", None
        if request.hangs_up_after_s is not None:
            timer = self._loop.call_later(request.hangs_up_after_s, request.hang_up)
        try:
            outcome = await self._serve(request)
        except asyncio.CancelledError:
            if request.fate is None:
                raise  # the run itself is over
            outcome = request.fate
        except Exception as error:
            self._violated(f"request {number} ended in {error!r}")
            raise
        finally:
            if timer is not None:
                timer.cancel()
            del self.open[number]
            self._count.outcomes[outcome] += 1
            self._told(f"request {number} for {request.model}: {outcome}")

    async def _serve(self, request: Request) -> str:
        """Once, and once more where the engine was lost before the answer began."""
        for replay in (False, True):
            scheduler = await self._door()
            try:
                async with self._lease(scheduler, request, replay=replay) as lease:
                    outcome = await self._relay(lease, request)
                    if outcome == "answered":
                        lease.served()
            except Refused as refused:
                return f"refused: {refused.refusal.reason.value}"
            if outcome != "again" or replay:
                break
            await self._until_noticed(scheduler, request.model)
        return _LOST if outcome == "again" else outcome

    def _lease(self, scheduler: Scheduler, request: Request, *, replay: bool) -> Lease:
        lease = scheduler.lease(
            request.model, freezable=request.stream, priority=request.priority, replay=replay
        )
        self._by_ticket[lease.ticket.id] = request
        return lease

    async def _relay(self, lease: Lease, request: Request) -> str:
        process = self.machines.live(lease.model)
        if process is None:
            return "again"  # connection refused
        answer = process.submit(request.work_s, lease)
        try:
            wanted = asyncio.FIRST_COMPLETED
            await asyncio.wait([answer.done, lease.cut], return_when=wanted)
            if not answer.done.done():
                if request.ends_slowly_s:
                    await asyncio.wait([answer.done], timeout=request.ends_slowly_s)
                return "cut"
            match answer.done.result():
                case "complete":
                    if answer.was_frozen:
                        self._count.outcomes["(answered after a freeze)"] += 1
                    return "answered"
                case "aborted" if not lease.cut.done():
                    self._violated(f"an answer of {lease.model} is aborted, and nobody told why")
                case _ if lease.cut.done():
                    return "cut"
            return _LOST if answer.begun else "again"
        finally:
            process.leave(answer)

    async def _until_noticed(self, scheduler: Scheduler, model: ModelId) -> None:
        """Until the scheduler knows, too, that the engine is lost; or a while."""
        for _ in range(5):
            engine = scheduler.state.engines.get(model)
            if engine is None or not isinstance(engine.phase, Awake):
                return
            await asyncio.sleep(0.4)


# ---------------------------------------------------------------- habits


class Habits:
    """Endless behaviours of clients. `models` is asked each time: a reload may change them."""

    def __init__(self, clients: Clients, rng: Random, models: Callable[[], list[ModelId]]) -> None:
        self._clients = clients
        self._rng = rng
        self._models = models

    def request(self, model: ModelId, work_s: float, *, stream: bool) -> Request:
        rng = self._rng
        request = Request(model, work_s, stream)
        if rng.random() < 0.06:
            request.hangs_up_after_s = rng.choice((rng.uniform(0, 5), rng.expovariate(1 / 60)))
        if rng.random() < 0.01:
            request.hangs_up_when_granted = True
        if rng.random() < 0.1:
            request.ends_slowly_s = rng.uniform(0.1, 12.0)
        if rng.random() < 0.1:
            request.priority = rng.randint(1, 3)
        return request

    def chat(self, model: ModelId) -> Request:
        rng = self._rng
        work = min(rng.lognormvariate(1.5, 1.2), 300.0)
        return self.request(model, work, stream=rng.random() < 0.7)

    def long(self, model: ModelId) -> Request:
        rng = self._rng
        return self.request(model, rng.uniform(60.0, 900.0), stream=rng.random() < 0.8)

    def short(self, model: ModelId) -> Request:
        return self.request(model, self._rng.uniform(0.02, 0.5), stream=False)

    def pick(self) -> ModelId:
        return self._rng.choice(self._models())

    async def live(self) -> None:
        """One client with changing habits, and long pauses."""
        rng = self._rng
        while True:
            await asyncio.sleep(rng.expovariate(1 / (0.5 * HOUR)))
            habit = rng.choice(
                (self._bursts, self._bursts, self._agent, self._crowd, self._author, self._embeds)
            )
            await habit(asyncio.get_running_loop().time() + rng.expovariate(1 / (0.2 * HOUR)))

    async def _bursts(self, until: float) -> None:
        """Poisson, several at once, anything."""
        rng, loop = self._rng, asyncio.get_running_loop()
        pace_s = rng.choice((5.0, 30.0, 120.0))
        while loop.time() < until:
            model = self.pick()
            for _ in range(rng.choice((1, 1, 2, 5))):
                self._clients.send(self.chat(model))
            await asyncio.sleep(rng.expovariate(1 / pace_s))

    async def _agent(self, until: float) -> None:
        """Alternates between two models, each time waiting for the answer."""
        one, other = self.pick(), self.pick()
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            for model in (one, other):
                await asyncio.wait([self._clients.send(self.chat(model))])
                await asyncio.sleep(self._rng.uniform(0.0, 3.0))

    async def _crowd(self, until: float) -> None:
        """Two overlapping streams keep one model busy while others wait for another."""
        busy, other = self.pick(), self.pick()
        loop, rng = asyncio.get_running_loop(), self._rng
        while loop.time() < until:
            self._clients.send(self.request(busy, rng.uniform(10.0, 20.0), stream=True))
            if rng.random() < 0.2:
                self._clients.send(self.chat(other))
            await asyncio.sleep(8.0)

    async def _author(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        model = self.pick()
        while loop.time() < until:
            await asyncio.wait([self._clients.send(self.long(model))])
            await asyncio.sleep(self._rng.expovariate(1 / 20.0))

    async def _embeds(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        model = self.pick()
        while loop.time() < until:
            self._clients.send(self.short(model))
            await asyncio.sleep(self._rng.expovariate(1 / 20.0))

    async def insist(self, model: ModelId) -> None:
        """Wants this model all the time: at least one request runs or waits, mostly two."""
        while True:
            work_s = self._rng.uniform(5.0, 25.0)
            await asyncio.wait([self._clients.send(Request(model, work_s, stream=True))])
            await asyncio.sleep(0.05)
