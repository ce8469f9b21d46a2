"""`homegptctl events` and `homegptctl logs`: what happens, and what was said."""

from __future__ import annotations

import os
import sys
from time import localtime, monotonic, sleep, strftime

from .asked import Stop, usage, usage_line
from .client import Client, Lost, Refusal, ask
from .models import with_near_model
from .render import clean, out, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from homegptd.wire.control import EventNotice, LogsView

    from .asked import Asked

RECONNECT_S = 15.0
_PROBES = ("health", "is_sleeping", "metrics", "version")
_MOST = 10000  # lines that the daemon gives at once


def run(asked: Asked) -> int:
    """Print events until interrupted, or the last lines of a log. Raises: Stop."""
    return _logs(asked) if asked.verb == "logs" else _events(asked)


def _logs(asked: Asked) -> int:
    wanted = _count(asked)
    asks_all = "all" in asked.options
    # most lines may be the daemon's own doing: enough of them for the others to be among them
    lines = wanted if asks_all else min(_MOST, max(1000, 20 * wanted))
    try:
        view: LogsView = ask(asked.socket, "logs", {"model": asked.words[0], "lines": lines})
    except Refusal as refusal:
        raise with_near_model(asked, refusal) from None
    shown = [line for line in view["lines"] if asks_all or not _is_probe(line)]
    shown = shown[len(shown) - wanted :] if len(shown) > wanted else shown
    if asked.json:
        print_json({"lines": shown})
        return 0
    out()
    for line in shown:
        print(clean(line))
    if "f" in asked.options or "follow" in asked.options:
        return _follow(view["follow"])
    if view["lines"] and not shown and wanted:
        text = "homegptctl: nothing but the daemon's own questions; --all shows them"
        print(text, file=sys.stderr)
    return 0


def _follow(argv: list[str]) -> int:
    """Become the command that the daemon named: the caller may read what the caller may read."""
    if not argv:
        print("homegptctl: nothing is known that follows this log", file=sys.stderr)
        return 1
    sys.stdout.flush()
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - no shell
    except OSError as error:
        print(f"homegptctl: cannot run {argv[0]}: {error.strerror}", file=sys.stderr)
        return 1


def _count(asked: Asked) -> int:
    """How many lines. Raises: Stop."""
    name = "-n" if "n" in asked.options else "--lines"
    count = asked.options.get("n") or asked.options.get("lines") or "50"
    if not (count.isascii() and count.isdigit()):
        usage(f'logs: {name} wants a number, not "{count}"', usage_line("logs"))
    return int(count)


def _is_probe(line: str) -> bool:
    """Whether it is a line of the access log of vLLM for a question that the daemon asks often."""
    _, found, rest = line.partition('"GET /')
    return bool(found) and rest.partition(" ")[0].partition("?")[0] in _PROBES


def _events(asked: Asked) -> int:
    """Over restarts of the daemon; with --json one object per line."""
    out()
    client = _subscribed(asked.socket)
    try:
        while True:
            try:
                message = client.next(None)
            except Lost:
                client.close()
                client = _subscribed_again(asked.socket)
                continue
            if message.get("method") == "event":
                _print(message["params"], as_json=asked.json)
    finally:
        client.close()


def _print(event: EventNotice, *, as_json: bool) -> None:
    if as_json:
        from json import dumps

        print(dumps(event), flush=True)
        return
    clock = strftime("%H:%M:%S", localtime(event["time"]))
    model = f"{clean(event['model'])}: " if event["model"] else ""
    fields = " ".join(f"{key}={clean(value)}" for key, value in event["fields"].items())
    print(f"{clock} {model}{clean(event['message'])} {fields}".rstrip(), flush=True)


def _subscribed(path: str) -> Client:
    """Raises: Stop."""
    client = Client(path)
    try:
        client.call("events")
    except BaseException:
        client.close()
        raise
    return client


def _subscribed_again(path: str) -> Client:
    """Raises: Stop when the daemon does not come back."""
    until = monotonic() + RECONNECT_S
    while True:
        try:
            return _subscribed(path)
        except Stop:
            if monotonic() > until:
                raise
        sleep(0.1)  # nothing tells a client that a socket has come
