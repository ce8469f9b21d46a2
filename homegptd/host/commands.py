"""Other programs, run and waited for."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class HostFault(Exception):
    """Something on the host did not do as it was told; `hint` names the next command."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


@dataclass(frozen=True, slots=True)
class Done:
    """How a program ended; code 127 if there is none of that name."""

    code: int
    out: str
    err: str

    @property
    def why(self) -> str:
        """Its last words, on one line."""
        said = (self.err.strip() or self.out.strip()).splitlines()
        return said[-1].strip() if said else f"exit {self.code}"


def run(
    *argv: str, env: Mapping[str, str] | None = None, stdin: str = "", limit_s: float = 60.0
) -> Done:
    """Never raises: a program that is not there or hangs is an end like others."""
    try:
        done = subprocess.run(
            argv, input=stdin, env=env, capture_output=True, timeout=limit_s, check=False, text=True
        )
    except OSError as error:
        return Done(127, "", f"{argv[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Done(124, "", f"{argv[0]}: no answer after {limit_s:.0f} s")
    return Done(done.returncode, done.stdout, done.stderr)


def must(*argv: str, doing: str, limit_s: float = 60.0) -> str:
    """What it printed. Raises: HostFault, `cannot DOING: its last words`."""
    done = run(*argv, limit_s=limit_s)
    if done.code:
        raise HostFault(f"cannot {doing}: {done.why}", _hint(argv))
    return done.out


def _hint(argv: Sequence[str]) -> str:
    return " ".join(argv[:6])
