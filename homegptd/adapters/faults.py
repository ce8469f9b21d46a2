"""What engines do wrong, one class for each way.

The message is one lower-case sentence without a full stop, for the person who must act:
`cannot wake "coder": vLLM answered 500 to /wake_up after 4.2 s`. The machine treats every fault of
a control call as a poisoned engine; the classes are for logs, tests and hints.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from homegptd.core.refusals import Fault


class EngineFault(Fault):
    """A vLLM server did not do as told."""


class Unreachable(EngineFault):
    """Nobody listens: dead, or a zombie that has closed its listener and will never exit."""


class Hung(EngineFault):
    """No answer within the deadline."""

    unsettled = True


class Broken(EngineFault):
    """It answered with an error, with nonsense, or hung up."""

    status: int | None = None
    """Of an answer that was an error."""


class Lied(EngineFault):
    """It said it did as told, and did not."""


class Garbled(EngineFault):
    """The model behind a healthy server no longer says what it should."""


class Unsafe(EngineFault):
    """The order was not given, because this version would not survive it."""


@contextmanager
def cannot(act: str) -> Iterator[None]:
    """Put `cannot {act}: ` before the message of any engine fault from within."""
    try:
        yield
    except EngineFault as fault:
        message = f"cannot {act}: {fault.message}"
        raise type(fault)(message, hint=fault.hint, lasting=fault.lasting) from fault
