"""What the machine costs a request: a lease on an awake model, and events through `step`.

The real scheduler and the real `step`, no engine behind them. A lease is two events (arrived,
closed) and no turn of the event loop. The rows for `step` alone are those of `bench/step.py`.
"""

import asyncio
from time import perf_counter

import uvloop

from bench import step as steps
from bench.kit import US, Report, arguments, spread
from homegptd.core.commands import Order, Probe, Watch
from homegptd.core.model import ModelId, State
from homegptd.runtime.scheduler import Scheduler

ROUNDS = 9


class Nobody:
    """Nothing is ordered while requests for an awake model come and go."""

    def carry_out(self, command: Order | Watch | Probe, group: asyncio.TaskGroup) -> None:
        raise AssertionError(f"{command} was not to be expected")


async def leases(state: State, count: int) -> list[float]:
    """Seconds of one lease, the mean of each of several rounds."""
    scheduler = Scheduler(state, Nobody(), max_wait_s=600.0)
    model, took = ModelId("m0"), []
    async with scheduler.running():
        for _ in range(ROUNDS):
            began = perf_counter()
            for _ in range(count):
                async with scheduler.lease(model, freezable=True) as lease:
                    lease.served()
            took.append((perf_counter() - began) / count)
    return took


def events(state: State, count: int, *, mixed: bool) -> list[float]:
    told = steps.mixed(count) if mixed else steps.come_and_go(count)
    return [steps.run(state, told, told=True) / len(told) for _ in range(ROUNDS)]


def main() -> None:
    asked = arguments(__doc__, count=500)
    report = Report("lease", ("act", "µs (middle half)", "best µs", "per second at best"))
    alone, busy, full = steps.box(1, 0), steps.box(100, 0), steps.box(100, 100)
    with asyncio.Runner(loop_factory=uvloop.Loop) as runner:
        for name, took in {
            "lease, awake, nobody else": runner.run(leases(alone, asked.count)),
            "lease, awake, 100 others": runner.run(leases(busy, asked.count)),
            "step + story, nobody else": events(alone, asked.count, mixed=False),
            "step + story, 100 leases": events(busy, asked.count, mixed=False),
            "step + story, 100 leases, 100 waiting": events(full, asked.count // 5, mixed=False),
            "step + story, mixed models, 100 + 100": events(full, asked.count // 5, mixed=True),
        }.items():
            report.add(name, spread(took, US), min(took) * US, 1 / min(took))
    report.notes.append("8 engines. A lease is two events.")
    report.show(as_json=asked.json)


if __name__ == "__main__":
    main()
