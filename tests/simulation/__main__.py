"""Hundreds of virtual hours of homeGPT in about a minute: `python -m tests.simulation --help`."""

import argparse
import random
import sys
import time

from .town import BrokenPromise, Result, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="default: a fresh one, which is printed")
    parser.add_argument("--hours", type=float, default=200.0, help="virtual hours (default 200)")
    parser.add_argument("--box", type=int, help="only this box of the run")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}, {options.hours:g} virtual hours")
    began = time.perf_counter()
    try:
        result = simulate(seed, options.hours, options.box)
    except BrokenPromise as broken:
        print("\n".join(broken.tail))
        print(f"broken promise {', '.join(broken.__notes__)}: {broken}")
        print(f"replay with: make simulate SEED={seed} HOURS={options.hours:g}")
        return 1
    print(table(result))
    print(f"{time.perf_counter() - began:.1f} s")
    return 0


def table(result: Result) -> str:
    count = result.count
    rows = [
        ("boxes", result.fleets),
        ("requests", count.requests),
        *((f"  {how}", number) for how, number in sorted(count.outcomes.items())),
        *((name, getattr(count, name)) for name in _SHOWN),
        ("worst wait", f"{count.worst_wait_s:.0f} s"),
        ("digest", result.digest),
    ]
    return "\n".join(f"{name:<32}{value:>18}" for name, value in rows)


_SHOWN = ("switches", "freezes", "cuts", "deaths", "operations", "reloads", "restarts", "steps")

if __name__ == "__main__":
    sys.exit(main())
