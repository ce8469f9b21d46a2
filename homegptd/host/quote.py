"""Words for unit files, so that what comes out at the other end is what went in.

A word of a Quadlet passes two readers: podman's generator, which splits and unquotes as systemd
does, and systemd itself, which then expands `%` and `$` in ExecStart= (systemd.service(5), "Command
Lines"). The generator touches neither sign, so both are doubled here.
"""

import re
from collections.abc import Iterable

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")


def expanded(text: str) -> str:
    """Text in which systemd expands nothing, for values that are taken as a whole."""
    return text.replace("%", "%%").replace("$", "$$")


def word(text: str) -> str:
    """One word, in double quotes where it needs them.

    Control characters are not for unit files. Of an empty word podman's generator makes the end of
    the line, and drops what follows; a lone semicolon it leaves bare, which systemd takes for the
    end of the command (5.4). Raises: ValueError.
    """
    if text in {"", ";"} or not text.isprintable():
        raise ValueError(f"cannot stand in a unit file: {text!r}")
    if _PLAIN.fullmatch(text):
        return text
    inner = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{expanded(inner)}"'


def lines(words: Iterable[str], *, indent: str = "    ") -> str:
    """Words as a value over several lines: each flag begins one, its values beside it."""
    rows: list[list[str]] = []
    for one in _without_empty(words):
        if not rows or re.match(r"--?[A-Za-z]", one):
            rows.append([])
        rows[-1].append(word(one))
    return f" \\\n{indent}".join(" ".join(row) for row in rows)


def _without_empty(words: Iterable[str]) -> list[str]:
    """`--flag ""` as `--flag=`, which says the same."""
    kept: list[str] = []
    for one in words:
        if not one and kept and kept[-1].startswith("--") and "=" not in kept[-1]:
            kept[-1] += "="
        else:
            kept.append(one)
    return kept
