"""`homegptctl key add|list|remove`: who may use the models over HTTP."""

from __future__ import annotations

import sys
from contextlib import suppress

from .asked import Stop, usage
from .host import daemon_runs, faults, host, places, reload_daemon
from .render import out, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from .asked import Asked

UNKNOWN = 5
_MONTH_S = 30 * 86400


def run(asked: Asked) -> int:
    """Raises: Stop."""
    verbs = {"add": _add, "list": _list, "remove": _remove}
    verb = asked.words[0]
    if verb not in verbs:
        usage(f'key has no verb "{verb}"', "homegptctl key add|list|remove")
    if (verb == "list") == (len(asked.words) > 1):
        usage("key list takes no name" if verb == "list" else f"key {verb}: NAME is missing")
    with faults():
        return verbs[verb](asked, _Where(asked))


class _Where:
    """The file of keys, and whether the daemon's configuration names it."""

    def __init__(self, asked: Asked) -> None:
        from importlib import import_module
        from pathlib import Path

        self.config: Any = None
        parse = import_module("homegptd.config.parse")
        with suppress(parse.ConfigError):  # a file may be given before there is a configuration
            self.config = parse.load(places().config)
        named = self.config.http.keys if self.config is not None else None
        self.file: Path = Path(asked.options.get("file") or named or host("places").KEYS)
        self.counts = str(self.file) == named


def _add(asked: Asked, where: _Where) -> int:
    keys = host("keys")
    given = asked.options.get("models")
    models = None if given is None else tuple(filter(None, given.split(",")))
    if models and where.config is not None and (wrong := keys.unknown(models, where.config)):
        raise Stop(wrong, code=UNKNOWN, reason="unknown-model")
    wish = keys.Wish(
        name=asked.words[1],
        models=models,
        may_switch="no-switch" not in asked.options,
        manage="manage" in asked.options,
        max_wait_s=_number(asked, "max-wait"),
        concurrency=_count(asked, "concurrency"),
    )
    secret = keys.add(where.file, wish, replace="replace" in asked.options)
    if asked.json:
        print_json({"name": wish.name, "key": secret, "file": str(where.file)})
    else:
        print(secret)  # alone on standard output, for pipes
        _say(f"{where.file} has its hash; the key itself is shown only here")
    sys.stdout.flush()
    _tell_daemon(asked, where)
    return 0


def _remove(asked: Asked, where: _Where) -> int:
    left = host("keys").remove(where.file, asked.words[1])
    if asked.json:
        print_json({"name": asked.words[1], "file": str(where.file), "left": left})
    if not left:
        _say("no key is left: nobody gets in over HTTP until one is added, or http.keys is gone")
    _tell_daemon(asked, where)
    return 0


def _list(asked: Asked, where: _Where) -> int:
    keys = host("keys").there(where.file)
    if asked.json:
        print_json({"file": str(where.file), "keys": [_fields(key) for key in keys]})
        return 0
    if not keys:
        _say(f"{where.file} has no keys")
        return 0
    rows = [("NAME", "MODELS", "LIMITS", "ADDED"), *map(_row, keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    style = out()
    for at, row in enumerate(rows):
        text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(style.paint(text.rstrip(), "dim" if at == 0 else ""))
    return 0


def _row(key: Any) -> tuple[str, ...]:
    limits = [
        "manages" if key.manage else "",
        "" if key.may_switch else "no switch",
        f"waits {key.max_wait_s:g} s" if key.max_wait_s is not None else "",
        f"{key.concurrency} at once" if key.concurrency is not None else "",
    ]
    models = "all" if key.models is None else ", ".join(sorted(key.models)) or "none"
    return key.name, models, ", ".join(filter(None, limits)) or "-", key.added or "-"


def _fields(key: Any) -> dict[str, object]:
    return {
        "name": key.name,
        "models": None if key.models is None else sorted(key.models),
        "switch": key.may_switch,
        "manage": key.manage,
        "max_wait_s": key.max_wait_s,
        "concurrency": key.concurrency,
        "added": key.added or None,
    }


def _tell_daemon(asked: Asked, where: _Where) -> None:
    """It may have been started with another configuration than ours, which names that file.

    Raises: Stop.
    """
    told = daemon_runs(asked)
    if told:
        _say(reload_daemon(asked))
    if not where.counts:
        more = "" if told else ": homegptctl reload"
        _say(f"it counts once http.keys is {where.file}{more}")


def _say(text: str) -> None:
    print(f"homegptctl: {text}", file=sys.stderr)


def _number(asked: Asked, name: str) -> float | None:
    text = asked.options.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _MONTH_S:
        usage(f"--{name} wants a number of seconds, not {text}")
    return value


def _count(asked: Asked, name: str) -> int | None:
    text = asked.options.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1_000_000):
        usage(f"--{name} wants a whole number above 0, not {text}")
    return int(text)
