"""Files that are to be as rendered: what differs, and putting it there so that it can be undone."""

import difflib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .commands import HostFault
from .render import MARK

KINDS = (".container", ".network")


@dataclass(frozen=True, slots=True)
class Changes:
    """What it takes to make a folder hold exactly the rendered files."""

    folder: Path
    writes: Mapping[str, str]
    """Names and texts of the files that are new or differ."""
    removals: tuple[str, ...]
    """Files of ours that are not rendered any more."""
    before: Mapping[str, str]
    """Texts of the files that are there and are written or removed."""

    def __bool__(self) -> bool:
        return bool(self.writes or self.removals)

    def diff(self) -> list[str]:
        """As `diff -u` shows it, one line each."""
        rows: list[str] = []
        for name in sorted({*self.writes, *self.removals}):
            old, new = self.before.get(name, ""), self.writes.get(name, "")
            rows += difference(str(self.folder / name), old, new)
        return rows


def difference(path: str, old: str, new: str) -> list[str]:
    """As `diff -u` shows it."""
    sides = (path if old else "/dev/null", path if new else "/dev/null")
    return list(difflib.unified_diff(old.splitlines(), new.splitlines(), *sides, lineterm=""))


def changes(folder: Path, rendered: Mapping[str, str]) -> Changes:
    """Raises: HostFault where a file of another hand is in the way."""
    there = _ours(folder)
    for name in rendered:
        if name not in there and (folder / name).exists():
            raise HostFault(
                f"{folder / name} was not rendered by homegptctl, so it is not overwritten",
                f"mv {folder / name} {folder.parent}/",
            )
    writes = {name: text for name, text in rendered.items() if there.get(name) != text}
    removals = tuple(sorted(set(there) - set(rendered)))
    before = {name: there[name] for name in (*writes, *removals) if name in there}
    return Changes(folder, writes, removals, before)


def _ours(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in KINDS and path.is_file():
            text = path.read_text(errors="replace")
            if text.startswith(MARK):
                found[path.name] = text
    return found


def put(path: Path, text: str, *, mode: int = 0o644, group: str | None = None) -> None:
    """Write a file whole or not at all; one that is there keeps mode and owner. Raises: OSError.

    A new one belongs to `group`, where there is such a group and root writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.new")
    try:
        with part.open("w") as file:
            if path.exists():
                now = path.stat()
                os.fchown(file.fileno(), now.st_uid, now.st_gid)
                mode = now.st_mode & 0o7777
            elif group is not None and os.geteuid() == 0:
                with suppress(LookupError):
                    shutil.chown(part, group=group)
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def put_back(changed: Changes) -> None:
    """Undo `writes`; removed files come back as well."""
    for name in changed.writes:
        if name not in changed.before:
            (changed.folder / name).unlink(missing_ok=True)
    for name, text in changed.before.items():
        put(changed.folder / name, text)
