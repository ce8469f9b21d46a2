"""`python -m homegptd.sim [serve] MODEL …`: one simulated vLLM server as a process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys

from homegptd.sim import card
from homegptd.sim.options import Options, parse_options


class _Json(logging.Formatter):
    """One object a line, where VLLM_LOGGING_CONFIG_PATH asks the real one for a configuration."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "timestamp": self.formatTime(record),
            "level": record.levelname,
            "name": record.name,
            "message": record.getMessage(),
            "processName": record.processName,
        }
        return json.dumps(fields)


class _Lines(logging.Formatter):
    """vLLM's plain text."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "uvicorn.access":
            return f"(APIServer pid={os.getpid()}) INFO:     {record.getMessage()}"
        stamp = self.formatTime(record, "%m-%d %H:%M:%S")
        where = f"[{record.filename}:{record.lineno}]"
        text = f"{record.levelname} {stamp} {where} {record.getMessage()}"
        return f"(APIServer pid={os.getpid()}) {text}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    as_json = os.environ.get("VLLM_LOGGING_CONFIG_PATH")
    handler.setFormatter(_Json() if as_json else _Lines())
    for name in ("vllm", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


async def _serve(options: Options) -> int:
    from homegptd.sim.server import SimServer  # after the arguments: --help stays quick

    server = SimServer(options)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.terminate)
    return await server.serve()


def _end(code: int) -> int:
    """Exit as told; a negative code is the signal to die of."""
    if code >= 0:
        return code
    signal.signal(-code, signal.SIG_DFL) if code != -signal.SIGKILL else None
    os.kill(os.getpid(), -code)
    return 128 - code


def main(argv: list[str] | None = None) -> int:
    """The exit code of the process."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["card"]:
        return card.main(words[1:])
    options = parse_options(words)
    _log_to_stderr()
    if options.card is not None and not options.card.exists():
        sys.stderr.write(f"no card at {options.card}; make one: python -m homegptd.sim card PATH\n")
        return 1
    return _end(asyncio.run(_serve(options)))


if __name__ == "__main__":
    sys.exit(main())
