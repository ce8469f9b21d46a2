"""The router beside nginx, HAProxy, vllm-router and LiteLLM, in front of the same engine.

The targets take turns in random order, round by round: the engine's socket itself ("direct"), the
daemon with everything on, and each peer that is found (`bench/peers.py`). "added" is what a target
takes more than direct in the same round. The CPU of a proxy is the kernel's own account
(schedstat). Requests over one connection and 64 streams share one core with everything else; for
more streams and for large bodies a proxy has a core of its own.
"""

import json
import os
import random
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import load, peers
from bench.kit import (
    MS,
    US,
    Http,
    Report,
    arguments,
    engine_socket,
    p50,
    quantile,
    scratch_box,
)
from bench.peers import Engine, Target
from bench.upstream import EVENTS_PER_S
from tests.e2e.harness import SimModel, free_port

ROOT = Path(__file__).parents[1]
OURS = "homegptd"
HEAD = "router: {on_deadline: wait, max_body_mib: 128}\n"
TURNS = 10
"""Of small requests in a round: the machine's pace changes within seconds, and by more than what is
to be told. Streams have two."""
Rounds = dict[str, list[float]]
"""By target, a figure for each round."""


class Streams(NamedTuple):
    """So many at once, each of so many events."""

    count: int
    events: int
    rate: int = EVENTS_PER_S
    in_step: bool = False

    def __str__(self) -> str:
        pace = " in step" * self.in_step + f" at {self.rate}/s" * (self.rate != EVENTS_PER_S)
        return f"{self.count} streams{pace}"


STREAMS = (
    Streams(64, 75),
    Streams(256, 100),
    Streams(256, 100, in_step=True),
    Streams(1000, 60, rate=20),
    Streams(1000, 150),
)
"""An engine makes a token for each of its streams in one step, so they come in step. 1000 with 50
events a second fill a core, and their delay is that of a queue; with 20 they leave room."""


@dataclass
class Measure:
    """One column of figures; `goals` is what the daemon's may be at most, beside which peer."""

    name: str
    unit: str
    goals: dict[str, float] = field(default_factory=dict)
    least: bool = False
    """The goals are at least, not at most."""
    added: bool = False
    """Less what "direct" takes in the same round."""
    found: Rounds = field(default_factory=dict)

    def note(self, target: Target, value: float) -> None:
        self.found.setdefault(target.name, []).append(value)

    def of(self, name: str) -> list[float]:
        mine, direct = self.found.get(name, []), self.found.get("direct", [])
        if not self.added:
            return mine
        return [a - b for a, b in zip(mine, direct, strict=False)] if name != "direct" else []


class Bench:
    def __init__(
        self, targets: list[Target], asked: Namespace, cores: list[int], door: Http
    ) -> None:
        self.targets, self.asked, self.cores, self.door = targets, asked, cores, door
        self.lost: dict[str, int] = {}
        self.wrong = 0
        self.measures: dict[str, Measure] = {}

    def run(self) -> None:
        self._idle_and_per_stream()
        for number in range(self.asked.rounds):
            small, streams = [self._small] * TURNS, [self._streams(each) for each in STREAMS]
            for step in (*small, *streams[:-1], *streams, self._bodies, self._leaving):
                for target in random.sample(self.targets, len(self.targets)):
                    step(target)
            print(f"round {number + 1} of {self.asked.rounds}", file=sys.stderr)

    def _measure(
        self,
        name: str,
        unit: str,
        goals: dict[str, float] | None = None,
        *,
        least: bool = False,
        added: bool = False,
    ) -> Measure:
        return self.measures.setdefault(name, Measure(name, unit, goals or {}, least, added))

    def _idle_and_per_stream(self) -> None:
        """First, while no proxy has had a reason to keep memory."""
        idle = self._measure("idle memory", "MB")
        each = self._measure("memory per stream", "kB")
        for target in self.targets:
            if target.pid is None or target.slow:
                continue
            before = target.rss_mb()
            idle.note(target, before)
            found = load.streams(target, 1000, 150)
            each.note(target, (found.rss_mb - before) * 1e6 / 1000 / 1e3)

    def _small(self, target: Target) -> None:
        self._pin(own_core=False)
        count = self.asked.requests // TURNS // (10 if target.slow else 1)
        before = target.cpu_s()
        took = load.small(target, count)
        cpu = (target.cpu_s() - before) / (count + 20)
        name = "small POST, added p50"
        goals = {"nginx": 6.0, "vllm-router": 1.5, "litellm": 1 / 200}
        self._measure(name, "µs", goals, added=True).note(target, p50(took) * US)
        self._measure("small POST, CPU", "µs").note(target, cpu * US)

    def _streams(self, asked: Streams) -> Callable[[Target], None]:
        many = asked.count > 64
        goals = {"nginx": 1.3, "vllm-router": 0.9} if many else {"nginx": 2.0}
        delay = {"nginx": 1.3} if many else {}

        def run(target: Target) -> None:
            self._pin(own_core=many)
            if target.slow and many:
                return
            count, events, rate, in_step = asked
            events //= 5 if target.slow else 1
            before = target.cpu_s()
            found = load.streams(target, count, events, rate, in_step=in_step)
            if target.slow:  # its streams hardly ever run at once; their begin is little of it
                found.cpu_us = (target.cpu_s() - before) * US / max(found.events, 1)
            self._measure(f"{asked}, CPU per event", "µs", goals).note(target, found.cpu_us)
            if found.delays_ns:
                late = self._measure(f"{asked}, added delay p50", "µs", delay, added=True)
                late.note(target, p50(found.delays_ns) / 1e3)
                self._measure(f"{asked}, delay p90", "µs").note(
                    target, quantile(found.delays_ns, 0.9) / 1e3
                )
            lost = count * events - found.events + count - found.complete
            self.lost[target.name] = self.lost.get(target.name, 0) + lost
            if asked == STREAMS[-1]:
                goal = {"direct": 0.99}
                self._measure(f"{asked}, events/s", "1/s", goal, least=True).note(
                    target, found.rate
                )

        return run

    def _bodies(self, target: Target) -> None:
        self._pin(own_core=True)
        for mb, most in ((10, 0.9), (100, 0.7)):
            if target.slow and mb == 100:
                continue
            took = []
            for _ in range(3 if mb == 10 else 1):
                with suppress(ConnectionError):  # that it fails is told by the missing figure
                    seconds, served = load.big(target, mb)
                    took.append(seconds)
                    self.wrong += served != "a"
            if target.name == OURS:
                _, served = load.big(target, mb, "b")
                self.wrong += served != "b"
            if took:
                name = f"{mb} MB body, added"
                measure = self._measure(name, "ms", {"vllm-router": most}, added=True)
                measure.note(target, min(took) * MS)

    def _leaving(self, target: Target) -> None:
        self._pin(own_core=False)
        if target.pid is None or target.slow:
            return
        took = []
        for _ in range(10):
            left = load.hang_up(target)
            heard: list[int] = []
            while not heard:
                heard = _left(self.door)
            took.append((heard[0] - left) / 1e6)
        self._measure("client leaves, engine knows", "ms").note(target, p50(took))

    def _pin(self, *, own_core: bool) -> None:
        """Everything on the last core, or the proxies on the first."""
        for target in self.targets:
            for task in Path(f"/proc/{target.pid}/task").glob("*") if target.pid else ():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task.name), {self.cores[0 if own_core else -1]})

    def report(self) -> Report:
        names = [target.name for target in self.targets if target.name != "direct"]
        beside = ("direct", "nginx", "vllm-router", "litellm")
        report = Report("proxies", ("", *names, *(f"÷ {peer}" for peer in beside)))
        for measure in self.measures.values():
            medians = [_median(measure.of(name)) for name in names]
            cells = ["-" if isnan(each) else each for each in medians]
            ratios = [_shown(measure, peer) for peer in beside]
            report.add(f"{measure.name}, {measure.unit}", *cells, *ratios)
        report.add("events and streams lost", *(self.lost.get(name, 0) for name in names), *"----")
        versions = ", ".join(target.version for target in self.targets if target.version)
        report.notes += [
            f"{self.asked.rounds} rounds: medians; ratios are of those of {OURS}, with the smallest"
            " and the largest inside a turn.",
            f"{EVENTS_PER_S} events a second and stream, where no other rate is named. CPU is for"
            " one request or one event."
            f" Bodies answered by the wrong model: {self.wrong}.",
            f"{versions}.",
        ]
        report.notes += self._missed()
        return report

    def _missed(self) -> list[str]:
        found = []
        for measure in self.measures.values():
            for peer, goal in measure.goals.items():
                ratio = _ratio(measure, peer)
                if isnan(ratio) and measure.of(peer):
                    found.append(f"cannot be told: {measure.name}, beside {peer}")
                elif ratio < goal if measure.least else ratio > goal:
                    text = f"{measure.name}: {ratio:.3g} times {peer}, goal {goal:.3g}"
                    found.append(f"missed: {text}")
        return found


def _left(door: Http) -> list[int]:
    door.request("GET", "/bench/left")
    return list(json.loads(door.getresponse().read()))


def _median(values: list[float]) -> float:
    known = [value for value in values if not isnan(value)]
    return median(known) if known else nan


def _ratio(measure: Measure, peer: str) -> float:
    """Of the medians. That of a single round says little where what is added is next to nothing."""
    other = _median(measure.of(peer))
    return _median(measure.of(OURS)) / other if other > 0 else nan


def _shown(measure: Measure, peer: str) -> str:
    """The ratio, with the smallest and the largest of a single round."""
    pairs = zip(measure.of(OURS), measure.of(peer), strict=False)
    each = sorted(a / b for a, b in pairs if b > 0 and not isnan(a))
    return f"{_ratio(measure, peer):.2g} ({each[0]:.2g}-{each[-1]:.2g})" if each else "-"


def main() -> None:
    asked = arguments(__doc__, rounds=3, requests=1000)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})  # the engine, which the daemon starts, inherits it
    os.environ["PYTHONPATH"] = str(ROOT)
    with ExitStack() as stack:
        port = free_port()
        models = [
            SimModel(name, "active", awake_gb=30, command=_command(name, more))
            for name, more in (("a", ("--port", str(port))), ("b", ()))
        ]
        box = stack.enter_context(scratch_box(*models, head=HEAD))
        daemon = stack.enter_context(box.daemon())
        daemon.ready()
        engine = Engine(engine_socket(box, "a"), port)
        targets = [Target("direct", engine.socket, None)]
        for peer in peers.ALL.values():
            target = stack.enter_context(peer(box.root, engine))
            targets += [target] if target else []
        targets.append(Target(OURS, box.port, daemon.process.pid))
        bench = Bench(targets, asked, cores, Http(engine.socket))
        bench.run()
        report = bench.report()
    report.show(as_json=asked.json)


def _command(model: str, more: tuple[str, ...]) -> str:
    words = [sys.executable, "-m", "bench.upstream", "{socket}", "--model", model, *more]
    return "[" + ", ".join(f"'{word}'" for word in words) + "]"


if __name__ == "__main__":
    main()
