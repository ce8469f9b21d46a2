"""`homegptctl status` against `python3 -c pass`, interleaved, with a daemon that runs four models.

Two installations: a plain `pip install` into an environment of its own, as a user has it, and the
editable one of developers. Each is divided by an empty program of the same interpreter in the
plain environment, so the divisor is one and the same.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree, ignore_patterns
from time import perf_counter

from bench.kit import MS, Report, arguments, p50, quantile, rush, scratch_box, spread
from tests.e2e.harness import SimModel

GOAL, STRETCH = 2.5, 1.3
ROOT = Path(__file__).parents[1]
DEV = Path(sys.executable).parent


@contextmanager
def plain_install(*, packages: bool = False) -> Iterator[Path]:
    """The `bin` of a scratch environment with the package installed by pip, not editable.

    `packages`: with those of the daemon too, from where this runs; homegptctl needs none.
    """
    with tempfile.TemporaryDirectory(prefix="homegpt-bench-cli-") as scratch:
        source, env = Path(scratch, "source"), Path(scratch, "env")
        skip = ignore_patterns("__pycache__")
        copytree(ROOT / "homegptd", source / "homegptd", ignore=skip)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            source.joinpath(name).write_bytes(ROOT.joinpath(name).read_bytes())
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        pip = [env / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, source], check=True)
        if packages:
            ours, theirs = (sysconfig.get_path("purelib", vars={"base": str(base)})
                            for base in (env, sys.prefix))  # fmt: skip
            Path(ours, "packages.pth").write_text(theirs)
        yield env / "bin"


def wall_s(argv: Sequence[str | Path]) -> float:
    """Seconds from spawn to end. `posix_spawn`: no fork of a large parent is measured with it."""
    words = [str(word) for word in argv]
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    began = perf_counter()
    pid = os.posix_spawn(words[0], words, os.environ, file_actions=quiet)
    _, status = os.waitpid(pid, 0)
    took = perf_counter() - began
    if status:
        raise RuntimeError(f"{' '.join(words)} ended with status {status}")
    return took


def main() -> None:
    asked = arguments(__doc__, runs=40)
    models = (SimModel("a", "active", flags=rush()), *(SimModel(n, flags=rush()) for n in "bcd"))
    with plain_install() as plain, scratch_box(*models) as box, box.daemon() as daemon:
        daemon.ready()
        call = ["--socket", box.socket, "status"]
        programs = {
            "python3 -c pass": [plain / "python3", "-c", "pass"],
            "homegptctl status": [plain / "homegptctl", *call],
            "python3 -c pass, editable": [DEV / "python3", "-c", "pass"],
            "homegptctl status, editable": [DEV / "homegptctl", *call],
        }
        found: dict[str, list[float]] = {name: [] for name in programs}
        for run in range(asked.runs + 2):
            for name, argv in programs.items():
                took = wall_s(argv)
                if run > 1:  # the first two fill the page cache and __pycache__
                    found[name].append(took)
    report = Report("cli", ("program", "n", "p50 ms", "min ms", "÷ pass (middle half)"))
    base = found["python3 -c pass"]
    for name, values in found.items():
        ratios = [value / one for value, one in zip(values, base, strict=True)]
        report.add(name, len(values), p50(values) * MS, min(values) * MS, spread(ratios))
    goal = quantile([v / b for v, b in zip(found["homegptctl status"], base, strict=True)], 0.5)
    report.notes.append(
        f"Goal: at most {GOAL} x, stretch {STRETCH} x; this run {goal:.2f} x."
        " Ratios are taken inside each round."
    )
    report.show(as_json=asked.json)


if __name__ == "__main__":
    main()
