"""Switch overhead: what a switch takes beyond the engines' own sleep and wake.

Two simulated engines behind a real daemon. The engines' own time is read from their histogram
`vllm:sleep_mode_operation_duration_seconds` before and after each switch. "by hand" gives the same
orders to the same engines without the daemon, on kept connections: what their HTTP costs anyhow.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from time import perf_counter
from typing import NamedTuple

from bench.kit import (
    MS,
    Http,
    Report,
    Rpc,
    arguments,
    cpu_s,
    engine_socket,
    p50,
    quantile,
    rush,
    scratch_box,
)
from tests.e2e.harness import Box, SimModel

GOAL_MS = 15.0
_SUM = re.compile(rb'operation_duration_seconds_sum\{operation="(?:sleep|wake)"\} (\S+)')
CANARY = {
    "prompt": "Roses are red, violets are", "max_tokens": 2, "temperature": 0, "ignore_eos": True,
}  # fmt: skip


class Taken(NamedTuple):
    """Milliseconds of one switch."""

    over: float
    """Beyond the engines' own."""
    own: float
    cpu: float
    """Of the daemon: the figure that a busy machine changes least."""


class Bench:
    """A daemon with the engines "a" (awake first) and "b", and the ways to switch."""

    def __init__(self, box: Box, stack: ExitStack) -> None:
        daemon = stack.enter_context(box.daemon())
        daemon.ready()
        self.pid = daemon.process.pid
        self.engines = {name: Http(engine_socket(box, name)) for name in "ab"}
        self.rpc = Rpc(box.socket)
        self.door = Http(box.port)
        for end in (*self.engines.values(), self.rpc, self.door):
            stack.callback(end.close)
        self.awake = "a"

    def own_s(self) -> float:
        """What both engines spent so far in sleeps and wakes."""
        texts = [engine.ask("GET", "/metrics") for engine in self.engines.values()]
        return sum(float(value) for text in texts for value in _SUM.findall(text))

    def by_rpc(self, to: str) -> None:
        view = self.rpc.call("switch", model=to)
        assert view["state"] == "done", view

    def by_http(self, to: str) -> None:
        self.door.ask("POST", "/switch", {"model_id": to})

    def by_hand(self, to: str) -> None:
        before, after = self.engines[self.awake], self.engines[to]
        before.ask("POST", "/sleep?level=1&mode=wait")
        before.ask("GET", "/is_sleeping")
        after.ask("POST", "/wake_up")
        after.ask("GET", "/is_sleeping")
        after.ask("POST", "/v1/completions", {"model": to, **CANARY})

    def timed(self, switch: Callable[[str], None]) -> Taken:
        to = "b" if self.awake == "a" else "a"
        own, cpu = self.own_s(), cpu_s(self.pid)
        began = perf_counter()
        switch(to)
        took = perf_counter() - began
        cpu = cpu_s(self.pid) - cpu
        own = self.own_s() - own
        self.awake = to
        return Taken(over=(took - own) * MS, own=own * MS, cpu=cpu * MS)


def main() -> None:
    asked = arguments(__doc__, switches=50)
    with ExitStack() as stack:
        models = SimModel("a", "active", flags=rush()), SimModel("b", flags=rush())
        box = stack.enter_context(scratch_box(*models))
        bench = Bench(box, stack)
        ways = {
            "control socket": bench.by_rpc, "HTTP /switch": bench.by_http, "by hand": bench.by_hand,
        }  # fmt: skip
        found: dict[str, list[Taken]] = {name: [] for name in ways}
        for way in ways.values():  # warm: the first canary, caches, connections
            for _ in range(2):
                bench.timed(way)
        for name in cycle(ways):  # in pairs: by hand, the daemon must find its engines as it left
            if len(found[name]) >= asked.switches:
                break
            found[name] += [bench.timed(ways[name]) for _ in range(2)]
        show(found, as_json=asked.json)


def show(found: dict[str, list[Taken]], *, as_json: bool) -> None:
    report = Report(
        "switch",
        ("way", "n", "p50 ms", "p90 ms", "min ms", "÷ by hand", "CPU ms of the daemon", "own ms"),
    )
    hand = p50([one.over for one in found["by hand"]])
    for name, taken in found.items():
        over = [one.over for one in taken]
        cpu, own = p50([one.cpu for one in taken]), p50([one.own for one in taken])
        report.add(
            name, len(over), p50(over), quantile(over, 0.9), min(over), p50(over) / hand, cpu, own
        )
    report.notes.append(f"Goal: control socket p50 below {GOAL_MS:g} ms.")
    report.show(as_json=as_json)


if __name__ == "__main__":
    main()
