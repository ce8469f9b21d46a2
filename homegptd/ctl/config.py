"""`homegptctl config check [FILE]`: every problem of a configuration file, without a daemon."""

from __future__ import annotations

import sys

from .asked import Stop, usage
from .render import print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .asked import Asked

DEFAULT = "/etc/homegpt/config.yaml"
CONFIG = 78


def run(asked: Asked) -> int:
    """Print the problems; exit code 78 if there are any. Raises: Stop (unreadable, usage)."""
    if asked.words[0] != "check":
        usage(f'config has no verb "{asked.words[0]}"', "homegptctl config check [FILE]")
    name = asked.words[1] if len(asked.words) > 1 else DEFAULT
    problems = _problems(name)
    if asked.json:
        print_json(
            {"file": name, "ok": not problems, "problems": [_fields(one) for one in problems]}
        )
    elif problems:
        for one in problems:
            print(one, file=sys.stderr)
    else:
        print(f"{name}: ok")
    return CONFIG if problems else 0


def _problems(name: str) -> list[Any]:
    parse, config_error = _parser()
    try:
        with open(name, encoding="utf-8") as file:  # noqa: PTH123 - pathlib is slow to import
            parse(file.read(), name)
    except OSError as exc:
        raise Stop(
            f'cannot read "{name}": {exc.strerror}', code=CONFIG, reason="bad-config"
        ) from None
    except UnicodeDecodeError as exc:
        message = f'cannot read "{name}": it is not UTF-8 text (byte {exc.start})'
        raise Stop(message, code=CONFIG, reason="bad-config") from None
    except config_error as exc:
        return list(getattr(exc, "problems", ()))
    return []


def _parser() -> tuple[Any, type[Exception]]:
    """The daemon's own parser; it needs PyYAML, so nothing else in here may wait for it."""
    from importlib import import_module

    module = import_module("homegptd.config.parse")
    return module.parse, module.ConfigError


def _fields(problem: Any) -> dict[str, object]:
    return {
        "line": getattr(problem, "line", None),
        "path": getattr(problem, "path", None),
        "message": getattr(problem, "message", str(problem)),
    }
