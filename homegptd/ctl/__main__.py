"""`homegptctl`: reads the command line, calls the verb's module, says what went wrong."""

from __future__ import annotations

import sys

from .asked import Asked, Stop, read, row_of

INTERRUPTED = 130
BROKEN_PIPE = 141
_ALONE = ("help", "completion", "config")  # they need no daemon


def main(argv: list[str] | None = None) -> int:
    """Carry out one command; the exit codes are in `homegptd.wire.codes`."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = _run(read(arguments))
        sys.stdout.flush()
    except Stop as stop:
        return _say(stop, as_json="--json" in arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _deaf()
    return code


def _run(asked: Asked) -> int:
    if asked.verb == "--version":
        from homegptd import __version__

        print(f"homegptctl {__version__}")
        return 0
    module = row_of(asked.verb)[0]
    if module not in _ALONE and sys.stderr.isatty():
        _tell_which(asked)
    if module == "status":  # the one that is asked most often
        from .status import run
    else:
        from importlib import import_module

        run = import_module(f".{module}", __package__).run
    code: int = run(asked)
    return code


def _tell_which(asked: Asked) -> None:
    """Say which daemon is asked, where an ordinary user has one beside the system's."""
    import os

    from homegptd.wire.paths import SYSTEM_SOCKET, user_socket

    own = user_socket()
    if asked.chosen or asked.socket != SYSTEM_SOCKET or os.geteuid() == 0:
        return
    if os.path.exists(own):  # noqa: PTH110 - pathlib is slow to import
        from .render import err

        text = f"asking the system's daemon; for your own: --socket {own}"
        print(err().paint(text, "dim"), file=sys.stderr)


def _say(stop: Stop, *, as_json: bool) -> int:
    """Message and hint on stderr; with --json the same on stdout, for who reads that."""
    from .render import complain

    complain(stop.message, stop.hint)
    if as_json:
        from json import dumps

        words = {"message": stop.message, "hint": stop.hint, "reason": stop.reason}
        print(dumps({"error": words}, indent=2))
    return stop.code


def _deaf() -> int:
    """Whoever read our output has left (`| head`): end as if SIGPIPE had done it."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
