"""The file of API keys: one more, one less, with all comments kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path

from homegptd.config.keys import Key, digest, load, new_secret, parse
from homegptd.config.schema import Config

from . import edit
from .commands import HostFault
from .files import put
from .places import GROUP

_HEAD = "# API keys of homeGPT, by their SHA-256: homegptctl key add, key list, key remove.\n"


@dataclass(frozen=True, slots=True)
class Wish:
    """A key that is to be."""

    name: str
    models: tuple[str, ...] | None = None
    """Ids or aliases; None: all models."""
    may_switch: bool = True
    manage: bool = False
    max_wait_s: float | None = None
    concurrency: int | None = None


def there(path: Path) -> tuple[Key, ...]:
    """The keys of a file, none where there is none. Raises: ConfigError."""
    return load(path) if path.exists() else ()


def add(path: Path, wish: Wish, *, replace: bool = False) -> str:
    """Write a new key's hash and return the key, which nobody can find out again.

    `replace`: one of the same name goes. Raises: HostFault, ConfigError, OSError.
    """
    text = path.read_text() if path.exists() else _HEAD
    names = [key.name for key in parse(text, str(path))]
    if wish.name in names:
        if not replace:
            hint = f"homegptctl key add {wish.name} --replace gives it a new one"
            raise HostFault(f'there is a key "{wish.name}" already', hint)
        text = edit.without(text, wish.name, section="keys", by="name") or text
        names.remove(wish.name)
    secret = new_secret()
    text = _with(text, _entry(wish, secret), first=not names)
    parse(text, str(path))  # what would not be read is not written
    put(path, text, mode=0o640, group=GROUP)
    return secret


def remove(path: Path, name: str) -> int:
    """Take a key out; how many are left. Raises: HostFault, ConfigError, OSError."""
    keys = there(path)
    if name not in {key.name for key in keys}:
        raise HostFault(f'{path} has no key "{name}"', "homegptctl key list")
    text = edit.without(path.read_text(), name, section="keys", by="name")
    if text is not None:
        put(path, text)
    return len(keys) - 1


def unknown(models: Sequence[str], config: Config) -> str | None:
    """What is wrong with the first of these names that no model has."""
    known = [name for model in config.models for name in model.names]
    for name in models:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            return f'there is no model "{name}"; {hint}'
    return None


def _entry(wish: Wish, secret: str) -> dict[str, edit.Value]:
    entry: dict[str, edit.Value] = {"name": wish.name, "sha256": digest(secret).hex()}
    if wish.models is not None:
        entry["models"] = wish.models
    if not wish.may_switch:
        entry["switch"] = False
    if wish.manage:
        entry["manage"] = True
    if wish.max_wait_s is not None:
        entry["max_wait_s"] = wish.max_wait_s
    if wish.concurrency is not None:
        entry["concurrency"] = wish.concurrency
    entry["added"] = f"{datetime.now(UTC):%Y-%m-%d}"
    return entry


def _with(text: str, entry: dict[str, edit.Value], *, first: bool) -> str:
    if not first:
        return edit.added(text, entry, section="keys")
    rows = [row for row in text.splitlines() if row.partition("#")[0].strip() != "keys:"]
    return "\n".join([*rows, "keys:", *edit.item(entry, 2)]) + "\n"
