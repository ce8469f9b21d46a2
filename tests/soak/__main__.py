"""A real daemon, four simulated models, clients of every kind, and all the trouble there is:
`python -m tests.soak --help`, or `make soak MINUTES=60 SEED=7`.

The seed fixes what each client asks for and which troubles come in which order; how they meet is
up to the machine. A breach prints the story of the request and leaves the box's files.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from .books import Breach
from .run import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="default 2")
    parser.add_argument("--seed", type=int, help="default: a fresh one, which is printed")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}, {options.minutes:g} minutes", flush=True)
    root = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))  # short: sockets lie below
    soak = Soak(root, seed, options.minutes)
    try:
        soak.run()
    except Breach as breach:
        print(_told(soak, breach, root))
        print(f"again: make soak SEED={seed} MINUTES={options.minutes:g}")
        return 1
    print(soak.books.table())
    print(f"{'answers frozen':<58}{soak.frozen:>20}")
    print(f"{'engines adopted after a kill -9':<58}{soak.weather.adopted:>20}")
    print(f"every request accounted for in {time.monotonic() - soak.books.began:.0f} s")
    shutil.rmtree(root, ignore_errors=True)
    return 0


def _told(soak: Soak, breach: Breach, root: Path) -> str:
    lines = [soak.books.table(), "", f"BREACH: {breach}"]
    if breach.wish is not None:
        lines += ["", soak.books.story(breach.wish)]
    log = root / "daemon.log"
    tail = log.read_text().splitlines()[-80:] if log.exists() else []
    lines += ["", f"the end of the daemon's log ({log}; everything of the box lies beside it):"]
    return "\n".join([*lines, *tail])


if __name__ == "__main__":
    sys.exit(main())
