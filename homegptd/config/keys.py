"""API keys: a file of names, hashes and rights.

A key is 32 random bytes, so its SHA-256 gives nothing away: there is no list of likely keys to try
against it. bcrypt and its kin are made slow for passwords that people think up; here they would
cost every request, and every stranger who asks, a tenth of a second of CPU.
"""

import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from .nodes import Document, compose
from .parse import read_text
from .sections import SECONDS_ABOVE_0
from .table import Table
from .values import Item, flag, listing, matching, one_or_more, text, whole

PREFIX = "hg-"
"""How a key begins, so that people and scanners for leaked secrets know one when they see it."""
LONGEST = 512
"""Characters of what a client may show as its key."""
_MOST = 1000
_NAME = matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", "letters, digits, dots, dashes, underscores")
_SHA256 = matching(r"[0-9a-f]{64}", "64 hexadecimal digits in small letters")


@dataclass(frozen=True, slots=True)
class Key:
    """Who holds it, and what that allows."""

    name: str
    """Of its holder; in logs and counts. The key itself is nowhere."""
    digest: bytes = field(repr=False)
    """SHA-256 of the key."""
    models: frozenset[str] | None = None
    """Ids and aliases; None: all models."""
    may_switch: bool = True
    """Whether its requests may bring up a model that is not awake."""
    manage: bool = False
    """Whether it may manage the box over HTTP."""
    max_wait_s: float | None = None
    """Seconds its requests wait at most; None: router.max_wait_s alone counts."""
    concurrency: int | None = None
    """Requests that it may have under way at once, waiting ones included; None: any number."""
    added: str = ""
    """When, for people."""


def new_secret() -> str:
    """A key that nobody can guess: 256 bits from the kernel."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def load(path: Path | str) -> tuple[Key, ...]:
    """Raises: ConfigError, also for a file that cannot be read."""
    return parse(read_text(Path(path)), str(path))


def parse(source: str, name: str) -> tuple[Key, ...]:
    """The keys in a file's text. Raises: ConfigError with all problems at once."""
    document = Document(name)
    node = compose(source, document)
    keys: dict[str, Key] = {}
    if node is not None:
        root = Table(Item(node, "", document))
        for table in root.get("keys", listing(Table, most=_MOST), ()):
            key = _key(table)
            if key.name in keys and key.name:
                table.problem("name", f'"{key.name}" is the name of another key already')
            keys[key.name] = key
        root.finish()
    if document.problems:
        raise document.problems.error()
    return tuple(keys.values())


def _key(table: Table) -> Key:
    key = Key(
        name=table.need("name", _NAME, ""),
        digest=bytes.fromhex(table.need("sha256", _SHA256, "")),
        models=table.get("models", _names, None),
        may_switch=table.get("switch", flag, True),
        manage=table.get("manage", flag, False),
        max_wait_s=table.get("max_wait_s", SECONDS_ABOVE_0, None),
        concurrency=table.get("concurrency", whole(1, 1_000_000), None),
        added=table.get("added", text, ""),
    )
    table.finish()
    return key


def _names(item: Item) -> frozenset[str]:
    return frozenset(one_or_more(text)(item))
