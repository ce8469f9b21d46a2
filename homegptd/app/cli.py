"""`homegptd`: arguments, and exit codes that tell systemd whether another try makes sense."""

import argparse
import asyncio
import logging
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from homegptd import __version__
from homegptd.adapters.journal import configure_logging
from homegptd.adapters.sockets import parse_listen
from homegptd.config.parse import ConfigError, load
from homegptd.config.schema import Config
from homegptd.core.refusals import Fault
from homegptd.wire.paths import socket_to_offer

from .daemon import Daemon, Options
from .demo import Demo
from .doors import CannotServe

log = logging.getLogger("homegptd")

SYSTEM_CONFIG = Path("/etc/homegpt/config.yaml")
OK, FAILED, USAGE, UNAVAILABLE, DEFECT, BAD_CONFIG = 0, 1, 2, 69, 70, 78

_EXIT_CODES = f"""\
exit codes:
  {OK}   stopped in good order
  {FAILED}   an engine could not be ended at the stop
  {USAGE}   wrong usage
  {UNAVAILABLE}  something it needs is taken: port, control socket or state directory
  {DEFECT}  a defect; the engines are left running and the next start adopts them
  {BAD_CONFIG}  the configuration has errors, each is printed as file:line: path: problem
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    configure_logging("debug" if args.verbose else "info", os.environ)
    try:
        if args.command == "demo":
            return _run_demo(args)
        config = load(args.config)
        config = replace(config, backend=args.backend or config.backend)
        return _run(config, _options(args, config))
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)  # noqa: T201 - whoever starts us reads this
        return BAD_CONFIG


def _run_demo(args: argparse.Namespace) -> int:
    if args.config != SYSTEM_CONFIG:
        log.error("the demo brings its own models; run `homegptd --config %s`", args.config)
        return USAGE
    with Demo(args.models, args.speed, state_dir=args.state_dir) as demo:
        config = replace(demo.config(), backend="process")
        options = _options(args, config, demo)
        return _run(config, options, demo)


def _run(config: Config, options: Options, demo: Demo | None = None) -> int:
    _raise_descriptor_limit()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(config, options, demo))
    except ConfigError:
        raise  # of the API keys, which are read with the rest
    except CannotServe as error:
        return _cannot_serve(error)
    except Fault as fault:
        log.error("%s", fault)  # noqa: TRY400
        return FAILED
    except Exception as error:
        cause = _leaf(error)
        if isinstance(cause, CannotServe):
            return _cannot_serve(cause)
        log.exception("a defect ends the daemon; engines go on, the next start adopts them")
        return DEFECT


def _raise_descriptor_limit() -> None:
    """systemd's soft limit is 1024 for select(2)'s sake, which nobody here uses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _cannot_serve(error: CannotServe) -> int:
    log.error("%s", error)
    if error.hint:
        log.error("hint: %s", error.hint)
    return UNAVAILABLE


def _leaf(error: BaseException) -> BaseException:
    """What went wrong first, out of the groups that task groups put around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _serve(config: Config, options: Options, demo: Demo | None) -> int:
    daemon = await Daemon.prepared(config, options)
    if demo is not None:
        demo.follow(daemon)
    await daemon.serve()
    return OK


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


def _options(args: argparse.Namespace, config: Config, demo: Demo | None = None) -> Options:
    socket = args.socket or config.control.socket or (demo.socket() if demo else socket_to_offer())
    state_dir = demo.state_dir if demo else args.state_dir or config.state_dir
    return Options(
        config=demo.path if demo else args.config,
        socket=socket,
        state_dir=Path(state_dir or _default_state_dir()),
        listen=tuple(args.listen or config.http.listen),
        may_leave_engines=demo is None,
        card_file=demo.card if demo else args.card_file,
    )


def _default_state_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/homegpt")
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(home) / "homegpt"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, default=SYSTEM_CONFIG, metavar="FILE")
    common.add_argument(
        "--listen",
        action="append",
        type=_listen,
        metavar="ADDR:PORT",
        help="HTTP; may be repeated",
    )
    common.add_argument("--socket", metavar="PATH", help="the control socket")
    common.add_argument("--state-dir", type=Path, metavar="DIR", help="what survives a restart")
    common.add_argument("--backend", choices=("process", "systemd"), help="who runs the engines")
    common.add_argument(
        "--card-file", type=Path, metavar="FILE", help="measure a simulated box, see homegptd.sim"
    )
    common.add_argument("-v", "--verbose", action="store_true", help="log more")
    parser = argparse.ArgumentParser(
        prog="homegptd",
        description="Runs many large language models on one GPU box.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"homegptd {__version__}")
    parser.set_defaults(command="serve")
    demo = parser.add_subparsers(metavar="[demo]").add_parser(
        "demo",
        parents=[common],
        help="simulated models on a simulated card: no GPU, no root, no network",
        description="Runs simulated models on a simulated 80 GB card and shows what to try.",
    )
    demo.add_argument("--models", type=_number_of_models, default=4, metavar="N")
    demo.add_argument(
        "--speed", type=_speed, default=10.0, metavar="X", help="simulated seconds per second"
    )
    demo.set_defaults(command="demo")
    return parser


def _listen(text: str) -> str:
    try:
        parse_listen(text, 9000)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _number_of_models(text: str) -> int:
    number = int(text)
    if not 1 <= number <= Demo.MOST:
        raise argparse.ArgumentTypeError(f"{number} is not from 1 to {Demo.MOST}")
    return number


def _speed(text: str) -> float:
    speed = float(text)
    if not 0.1 <= speed <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.1 to 1000")
    return speed
