"""The Prometheus text of a simulated server: the gauges and counters that a manager may read.

The scheduler's gauges are written on engine steps, so they go stale while the engine sleeps; the
sleep gauge is written by the API server and believes what was asked. Both as in vLLM.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from homegptd.sim.engine import Engine

_BUCKETS = (0.01, 0.1, 1.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STATES = ("awake", "weights_offloaded", "discard_all")
OPERATIONS = ("sleep", "wake", "release_kv_cache_memory")


@dataclass(slots=True)
class Operation:
    """Durations of one kind of sleep-mode operation, in real seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BUCKETS) + 1))
    total_s: float = 0.0
    in_flight: int = 0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_BUCKETS, seconds)] += 1
        self.total_s += seconds


@dataclass(slots=True)
class Metrics:
    """What the API server itself keeps."""

    sleep_state: str | None = "awake"  # None: level 0, all three are zero
    rejected: int = 0
    operations: dict[str, Operation] = field(
        default_factory=lambda: {name: Operation() for name in OPERATIONS}
    )

    def slept(self, level: int) -> None:
        self.sleep_state = {1: "weights_offloaded", 2: "discard_all"}.get(level)

    def text(self, engine: Engine) -> str:
        return "\n".join(self._lines(engine)) + "\n"

    def _lines(self, engine: Engine) -> Iterator[str]:
        labels = f'engine="0",model_name="{engine.options.names[0]}"'
        running, waiting = engine.gauges
        cache = min(1.0, running / engine.options.max_num_seqs)
        yield from _gauge("vllm:num_requests_running", {labels: running})
        yield from _gauge("vllm:num_requests_waiting", {labels: waiting})
        reasons = {f'{labels},reason="capacity"': waiting, f'{labels},reason="deferred"': 0}
        yield from _gauge("vllm:num_requests_waiting_by_reason", reasons)
        yield from _gauge("vllm:kv_cache_usage_perc", {labels: cache})
        if engine.profile.old_cache_gauge:
            yield from _gauge("vllm:gpu_cache_usage_perc", {labels: cache})
        if engine.profile.sleep_gauge:
            states = {f'{labels},sleep_state="{s}"': int(s == self.sleep_state) for s in _STATES}
            yield from _gauge("vllm:engine_sleep_state", states)
        ends = {f'{labels},finished_reason="{r}"': n for r, n in engine.finished.items()}
        yield from _counter("vllm:request_success_total", ends)
        yield from _counter("vllm:prompt_tokens_total", {labels: engine.prompted})
        yield from _counter("vllm:generation_tokens_total", {labels: engine.generated})
        if engine.profile.queue_limit_flag:
            yield from _counter("vllm:admission_rejections_total", {labels: self.rejected})
        if engine.profile.json_bodies:
            yield from self._operations()

    def _operations(self) -> Iterator[str]:
        name = "vllm:sleep_mode_operation_duration_seconds"
        yield f"# HELP {name} Duration of one sleep-mode operation."
        yield f"# TYPE {name} histogram"
        for kind, operation in self.operations.items():
            if not any(operation.counts):
                continue
            below = 0
            for bound, count in zip((*map(str, _BUCKETS), "+Inf"), operation.counts, strict=True):
                below += count
                yield f'{name}_bucket{{le="{bound}",operation="{kind}"}} {float(below)}'
            yield f'{name}_count{{operation="{kind}"}} {float(below)}'
            yield f'{name}_sum{{operation="{kind}"}} {operation.total_s}'
        flights = {f'operation="{k}"': o.in_flight for k, o in self.operations.items()}
        yield from _gauge("vllm:sleep_mode_operations_in_flight", flights)


def _gauge(name: str, values: dict[str, int] | dict[str, float]) -> Iterator[str]:
    yield from _family(name, "gauge", values)


def _counter(name: str, values: dict[str, int]) -> Iterator[str]:
    yield from _family(name, "counter", values)


def _family(name: str, kind: str, values: dict[str, int] | dict[str, float]) -> Iterator[str]:
    yield f"# HELP {name} See vLLM."
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{{{labels}}} {float(value)}"
