"""From the start of the process to the first answers.

The package is installed by pip, so it is compiled.
"adopted": an earlier daemon was killed (SIGKILL), its engines run, the next one takes them over.
"nothing to start": all models disabled, so there is no bootstrap.
"""

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from bench.cli import plain_install, wall_s
from bench.kit import MS, Http, Report, arguments, p50, patient_door, rush, scratch_box, spread
from tests.e2e.harness import Box, SimModel

GOAL_MS = 600.0
CHAT = {"model": "a", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}


def health(door: Http) -> None:
    """Any status: with nothing up it says 503."""
    door.request("GET", "/health")
    door.getresponse().read()


def chat(door: Http) -> None:
    door.ask("POST", "/v1/chat/completions", CHAT)


def first_answer(box: Box, ask: Callable[[Http], None], *, keep: bool) -> float:
    """Seconds from spawn to the answer. `keep`: SIGKILL the daemon, so that its engines stay."""
    began = perf_counter()
    with box.daemon() as daemon:
        daemon.sweep = False
        door = patient_door(box.port)
        ask(door)
        took = perf_counter() - began
        door.close()
        daemon.ready()  # adopting has ended: a kill in its middle is another story
        if keep:
            daemon.kill()
    return took


def adopted(runs: int, programs: Path) -> tuple[list[float], list[float]]:
    with scratch_box(SimModel("a", "active", flags=rush()), programs=programs) as box:
        with box.daemon() as daemon:
            daemon.sweep = False
            daemon.ready()
            daemon.kill()
        first, talk = [], []
        for _ in range(runs):
            first.append(first_answer(box, health, keep=True))
            talk.append(first_answer(box, chat, keep=True))
        first_answer(box, health, keep=False)  # this one ends the engine
    return first, talk


def nothing(runs: int, programs: Path) -> list[float]:
    with scratch_box(SimModel("a", "disabled", flags=rush()), programs=programs) as box:
        return [first_answer(box, health, keep=False) for _ in range(runs)]


def main() -> None:
    asked = arguments(__doc__, runs=7)
    os.environ.pop("PYTHONPATH", None)  # or the sources would be loaded, compiled or not
    with plain_install(packages=True) as programs:
        bare, loaded = (
            [wall_s([programs / "python3", "-P", "-c", code]) for _ in range(asked.runs)]
            for code in ("pass", "import homegptd.app.cli")
        )
        plain = nothing(asked.runs, programs)
        first, talk = adopted(asked.runs, programs)
    report = Report("start", ("to", "n", "p50 ms (middle half)", "÷ import"))
    for name, values in {
        "python3 -c pass": bare,
        "import homegptd.app.cli": loaded,
        "first /health, nothing to start": plain,
        "first /health, an adopted engine": first,
        "first chat answer, an adopted engine": talk,
    }.items():
        report.add(name, len(values), spread(values, MS), p50(values) / p50(loaded))
    report.notes.append(f"Goal: first chat answer within {GOAL_MS:g} ms on a quiet machine.")
    report.show(as_json=asked.json)


if __name__ == "__main__":
    main()
