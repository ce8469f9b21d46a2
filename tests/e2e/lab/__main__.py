"""`python -m tests.e2e.lab`: make what the lab needs, boot it once, and say how long that took.

With `shell`: a root shell in a fresh machine with the engine's image, gone when it ends.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from . import roots
from .images import IMAGE, load_engine
from .machine import booted


@contextmanager
def _timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"lab: {what} in {time.monotonic() - began:.1f} s", flush=True)


def main() -> int:
    if why := roots.why_not():
        print(f"lab: {why}", file=sys.stderr)
        return 1
    with _timed(f"Debian {roots.SUITE} with systemd and podman"):
        roots.prepare(roots.BASE)
    began = time.monotonic()
    with booted() as machine:
        print(f"lab: booted in {time.monotonic() - began:.1f} s")
        with _timed(f"image {IMAGE}"):
            load_engine(machine)
        if sys.argv[1:] == ["shell"]:
            subprocess.run(machine.entering("bash", "-l"), cwd="/", check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
