"""Forecast error: what `plan` says before each switch, beside what the switch then takes.

Three simulated engines of different sizes behind a real daemon, on a card where only one fits. They
copy at PCIe-like bandwidths and vary their times by up to 10 percent. The first switches are
forecast by size alone, the later ones from the box's own history.

`--starts N`: as many starts of a real vLLM as well, on this machine's CPU (HOMEGPT_REAL_VLLM names
its Python, HOMEGPT_REAL_MODEL a small model; `.ci/real-vllm` makes both).
"""

import os
import random
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from bench.kit import Report, Rpc, arguments, p50, quantile, scratch_box
from tests.e2e.harness import SimModel

SIZES_GB = {"a": 8.0, "b": 16.0, "c": 28.0}
Taken = tuple[float, bool]
"""Error of the forecast in percent, and whether the time taken was inside its spread."""
REAL = """\
gpus: [{{index: 0, memory_mib: 81920}}]
switching: {{available_ram_gb: 256}}
models:
  - id: a
    gpu_memory_gb: 60
    weights_gb: 1
    startup_mode: disabled
    engine:
      command: ['{serve}', '{{socket}}', a, '{model}']
      env: {{HOMEGPT_REAL_VLLM: '{python}'}}
"""
SPEED = 10.0
"""The simulated seconds are ten times as quick."""


def main() -> None:
    asked = arguments(__doc__, switches=40, seed=1, starts=0)
    report = Report(
        "forecast", ("switches", "n", "mean error %", "p50 %", "p90 %", "in the spread")
    )
    taken = simulated(asked.switches, random.Random(asked.seed))
    warm = len(SIZES_GB) * 2
    add(report, "first", taken[:warm])
    add(report, "later", taken[warm:])
    if asked.starts:
        starts = real(asked.starts)
        add(report, "first real start", starts[:1])
        add(report, "later real starts", starts[1:])
    report.notes.append("Error: |forecast - taken| / taken of each; 80 % should be inside.")
    report.show(as_json=asked.json)


def simulated(switches: int, rng: random.Random) -> list[Taken]:
    models = [
        SimModel(name, "active" if name == "a" else "sleep", weights_gb=gb, flags=_flags(number))
        for number, (name, gb) in enumerate(SIZES_GB.items())
    ]
    taken: list[Taken] = []
    with ExitStack() as stack:
        box = stack.enter_context(scratch_box(*models, speed=SPEED))
        daemon = stack.enter_context(box.daemon())
        daemon.ready(60.0)
        rpc = Rpc(box.socket)
        stack.callback(rpc.close)
        awake = "a"
        for _ in range(switches):
            to = rng.choice([name for name in SIZES_GB if name != awake])
            taken.append(switched(rpc, to))
            awake = to
    return taken


def switched(rpc: Rpc, to: str) -> Taken:
    eta = rpc.call("plan", model=to)["eta"]
    began = perf_counter()
    view = rpc.call("switch", model=to)
    took = perf_counter() - began
    assert view["state"] == "done", view
    return abs(eta["mid_s"] - took) / took * 100, eta["low_s"] <= took <= eta["high_s"]


def real(starts: int) -> list[Taken]:
    python, model = os.environ["HOMEGPT_REAL_VLLM"], os.environ["HOMEGPT_REAL_MODEL"]
    serve = Path(__file__).parents[1] / ".ci/real-vllm/serve"
    taken: list[Taken] = []
    with ExitStack() as stack:
        box = stack.enter_context(scratch_box())
        box.config.write_text(REAL.format(serve=serve, python=python, model=model))
        daemon = stack.enter_context(box.daemon())
        daemon.ready(60.0)
        rpc = Rpc(box.socket)
        stack.callback(rpc.close)
        for _ in range(starts):
            taken.append(switched(rpc, "a"))
            rpc.call("stop", model="a")
    return taken


def _flags(seed: int) -> tuple[str, ...]:
    return ("--sim-seed", str(seed + 1), "--sim-imports-s", "1", "--sim-compile-s", "1")


def add(report: Report, name: str, taken: list[Taken]) -> None:
    errors, hits = [error for error, _ in taken], sum(inside for _, inside in taken)
    share = f"{100 * hits / len(taken):.0f} %"
    mean = sum(errors) / len(errors)
    report.add(name, len(errors), mean, p50(errors), quantile(errors, 0.9), share)


if __name__ == "__main__":
    main()
