"""Forecast error: what `plan` says before each switch, beside what the switch then takes.

Three simulated engines of different sizes behind a real daemon, on a card where only one fits. They
copy at PCIe-like bandwidths and vary their times by up to 10 percent. The first switches are
forecast by size alone, the later ones from the box's own history.
"""

import random
from contextlib import ExitStack
from time import perf_counter

from bench.kit import Report, Rpc, arguments, p50, quantile, scratch_box
from tests.e2e.harness import SimModel

SIZES_GB = {"a": 8.0, "b": 16.0, "c": 28.0}
SPEED = 10.0
"""The simulated seconds are ten times as quick."""


def main() -> None:
    asked = arguments(__doc__, switches=40, seed=1)
    rng = random.Random(asked.seed)
    models = [
        SimModel(name, "active" if name == "a" else "sleep", weights_gb=gb, flags=_flags(number))
        for number, (name, gb) in enumerate(SIZES_GB.items())
    ]
    errors: list[float] = []
    inside: list[bool] = []
    with ExitStack() as stack:
        box = stack.enter_context(scratch_box(*models, speed=SPEED))
        daemon = stack.enter_context(box.daemon())
        daemon.ready(60.0)
        rpc = Rpc(box.socket)
        stack.callback(rpc.close)
        awake = "a"
        for _ in range(asked.switches):
            to = rng.choice([name for name in SIZES_GB if name != awake])
            eta = rpc.call("plan", model=to)["eta"]
            began = perf_counter()
            view = rpc.call("switch", model=to)
            took = perf_counter() - began
            assert view["state"] == "done", view
            errors.append(abs(eta["mid_s"] - took) / took * 100)
            inside.append(eta["low_s"] <= took <= eta["high_s"])
            awake = to
    show(errors, inside, as_json=asked.json)


def _flags(seed: int) -> tuple[str, ...]:
    return ("--sim-seed", str(seed + 1), "--sim-imports-s", "1", "--sim-compile-s", "1")


def show(errors: list[float], inside: list[bool], *, as_json: bool) -> None:
    report = Report(
        "forecast", ("switches", "n", "mean error %", "p50 %", "p90 %", "in the spread")
    )
    warm = len(SIZES_GB) * 2
    for name, part in (("first", slice(0, warm)), ("later", slice(warm, None))):
        some, hits = errors[part], inside[part]
        share = f"{100 * sum(hits) / len(hits):.0f} %"
        mean = sum(some) / len(some)
        report.add(name, len(some), mean, p50(some), quantile(some, 0.9), share)
    report.notes.append("Error: |forecast - taken| / taken of each switch; 80 % should be inside.")
    report.show(as_json=as_json)


if __name__ == "__main__":
    main()
