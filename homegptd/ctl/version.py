"""`homegptctl version`: this command's version and the daemon's."""

from __future__ import annotations

import sys

from homegptd import __version__

from .asked import Stop
from .client import ask
from .render import clean, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from homegptd.wire.control import VersionView

    from .asked import Asked


def run(asked: Asked) -> int:
    """Print both; a difference is worth a warning. Raises: Stop if there is no daemon."""
    if not asked.json:
        print(f"homegptctl {__version__}")
    try:
        view: VersionView = ask(asked.socket, "version")
    except Stop:
        sys.stdout.flush()
        raise
    same = view["version"] == __version__
    if asked.json:
        print_json({"client": __version__, "daemon": view["version"], "same": same})
        return 0
    print(
        f"homegptd   {clean(view['version'])} (pid {view['pid']}, Python {clean(view['python'])})"
    )
    if not same:
        text = "homegptctl: the daemon has another version than this command"
        print(f"{text}\nhint: systemctl restart homegpt", file=sys.stderr)
    return 0
