"""What must survive a restart, in one SQLite file.

Memory is the truth while the daemon runs and the file follows each change, so a full disk, a
read-only directory or a corrupt file costs durability, never service: one warning, and another
line when writing works again.

A write is one WAL commit without fsync (`synchronous=NORMAL`): about 0.1 ms, and 1 to 30 ms every
hundred-odd writes, when the WAL is checkpointed with an fsync. It survives `kill -9` at any point;
a power cut may cost the newest commits, not the file. The file is held exclusively: a second daemon
finds it locked, and no shared memory is mapped that a full disk could turn into a SIGBUS.
"""

import json
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from homegptd.core.memory import Figure, Figures, Gpu, Kind, Source
from homegptd.core.model import ModelId, Proof

log = logging.getLogger(__name__)

DURATIONS_KEPT = 50
"""Per model and act."""
BUSY_S = 0.1
"""The longest a write waits for a lock, blocking the loop."""
RETRY_S = 5.0
"""After a failure the file is left alone for so long; changes stay in memory meanwhile."""
CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
MAYBE_READABLE = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}
)

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE canaries (model TEXT, key TEXT, said TEXT NOT NULL,
                           PRIMARY KEY (model, key)) WITHOUT ROWID;
    CREATE TABLE proofs (model TEXT, key TEXT, proof TEXT, holds INTEGER NOT NULL,
                         detail TEXT NOT NULL, at REAL NOT NULL,
                         PRIMARY KEY (model, key, proof)) WITHOUT ROWID;
    CREATE TABLE durations (id INTEGER PRIMARY KEY, model TEXT NOT NULL, act TEXT NOT NULL,
                            seconds REAL NOT NULL, at REAL NOT NULL);
    CREATE INDEX durations_of ON durations (model, act, id);
    """,
    "CREATE TABLE notes (name TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;",
    """
    CREATE TABLE figures (model TEXT, key TEXT, kind TEXT, place INTEGER, mib INTEGER NOT NULL,
                          margin_mib INTEGER NOT NULL, at REAL NOT NULL,
                          PRIMARY KEY (model, key, kind, place)) WITHOUT ROWID;
    """,
)
"""Script n brings a file from schema version n to n + 1 (`user_version`), in one transaction."""

Canary = str | tuple[float, ...]
"""What a healthy model said to its canary's question: text, or a vector or scores."""
Lasted = deque[tuple[float, float]]
"""Seconds and when (Unix seconds), oldest first."""


class Unusable(Exception):
    """The file cannot be used as it is, and must not be touched."""


@dataclass(slots=True)
class _Memory:
    canaries: dict[tuple[ModelId, str], Canary] = field(default_factory=dict)
    proofs: dict[tuple[ModelId, str, Proof], tuple[bool, str, float]] = field(default_factory=dict)
    """Whether it holds, what was compared, when (Unix seconds)."""
    durations: dict[tuple[ModelId, str], Lasted] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    figures: dict[tuple[ModelId, str], Figures] = field(default_factory=dict)

    def lasted(self, model: ModelId, act: str) -> Lasted:
        return self.durations.setdefault((model, act), deque(maxlen=DURATIONS_KEPT))

    def absorb(self, older: "_Memory") -> None:
        """Fill in what a file knew that could not be read until now."""
        self.canaries = older.canaries | self.canaries
        self.proofs = older.proofs | self.proofs
        self.notes = older.notes | self.notes
        self.figures = older.figures | self.figures
        for of, values in older.durations.items():
            newer = self.durations.get(of, ())
            self.durations[of] = deque((*values, *newer), maxlen=DURATIONS_KEPT)


class Store:
    """Fits `StorePort`. Never raises; use it from one thread, `close` it at the end."""

    def __init__(self, path: Path, *, retry_s: float = RETRY_S) -> None:
        self._path = path
        self._retry_s = retry_s
        self._memory = _Memory()
        self._loaded = False
        self._db: sqlite3.Connection | None = None
        self._behind = False
        """The file lacks something that memory has."""
        self._failing = False
        self._retry_at = 0.0
        self._save(())

    def canary(self, model: ModelId, key: str) -> Canary | None:
        return self._memory.canaries.get((model, key))

    def remember_canary(self, model: ModelId, key: str, said: Canary) -> None:
        """`key` as for proofs."""
        if self._memory.canaries.get((model, key)) != said:
            self._memory.canaries[model, key] = said
            self._save([_canary_row(model, key, said)])

    def proofs(self, model: ModelId, key: str) -> Mapping[Proof, bool]:
        found = {
            proof: holds
            for (of, with_key, proof), (holds, _, _) in self._memory.proofs.items()
            if (of, with_key) == (model, key)
        }
        return MappingProxyType(found)

    def remember_proof(
        self, model: ModelId, key: str, proof: Proof, *, holds: bool, detail: str
    ) -> None:
        """`key` stands for all that the proof depends on: image, flags, driver."""
        value = (holds, detail, time.time())
        self._memory.proofs[model, key, proof] = value
        self._save([_proof_row(model, key, proof, value)])

    def note(self, name: str) -> str | None:
        """What was noted under this name; None if nothing was."""
        return self._memory.notes.get(name)

    def remember_note(self, name: str, text: str) -> None:
        self._memory.notes[name] = text
        self._save([_note_row(name, text)])

    def figures(self, model: ModelId, key: str) -> Figures:
        return self._memory.figures.get((model, key), {})

    def newest_figures(self, model: ModelId, fingerprint: str) -> tuple[str, Figures]:
        """Of this configuration, with the version of vLLM they were measured with last."""
        found = [
            (max((f.at or 0.0 for f in figures.values()), default=0.0), version, figures)
            for (of, key), figures in self._memory.figures.items()
            for with_, _, version in [key.rpartition("/")]
            if (of, with_) == (model, fingerprint)
        ]
        _, version, figures = max(found, key=lambda one: one[0], default=(0.0, "", {}))
        return version, figures

    def remember_figures(self, model: ModelId, key: str, figures: Figures) -> None:
        """`key` as for proofs: fingerprint and version, with a slash between."""
        before = self.figures(model, key)
        rows = [
            _figure_row(model, key, *of, figure)
            for of, figure in figures.items()
            if before.get(of) != figure
        ]
        if rows:
            self._memory.figures[model, key] = {**before, **figures}
            self._save(rows)

    def durations(self) -> Mapping[tuple[ModelId, str], Sequence[float]]:
        """Oldest first, at most `DURATIONS_KEPT` each."""
        return {
            of: tuple(seconds for seconds, _ in lasted)
            for of, lasted in self._memory.durations.items()
        }

    def remember_duration(self, model: ModelId, act: str, seconds: float) -> None:
        value = (seconds, time.time())
        self._memory.lasted(model, act).append(value)
        self._save([_duration_row(model, act, value), _forget_durations(model, act)])

    def close(self) -> None:
        """Writes what could not be written before, if that works now."""
        self._retry_at = 0.0
        if self._behind:
            self._save(())
        self._disconnect()

    # The file

    def _save(self, rows: "Sequence[_Row]") -> None:
        if self._failing and time.monotonic() < self._retry_at:
            self._behind = True
            return
        try:
            self._write(rows)
        except (sqlite3.Error, OSError, Unusable) as error:
            self._fail(error)
        else:
            self._behind = False
            if self._failing:
                self._failing = False
                log.warning("state is written to %s again; nothing was lost", self._path)

    def _write(self, rows: "Sequence[_Row]") -> None:
        try:
            self._commit(rows)
        except sqlite3.DatabaseError as error:
            if _code(error) not in CORRUPT:
                raise
            self._move_aside(error)
            self._behind = True
            self._commit(rows)

    def _commit(self, rows: "Sequence[_Row]") -> None:
        if self._db is None:
            self._db = self._connect()
        if self._behind:
            rows = _all_rows(self._memory)
        if not rows:
            return
        self._db.execute("BEGIN IMMEDIATE")
        for statement, values in rows:
            self._db.execute(statement, values)
        self._db.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_S)
        try:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA wal_autocheckpoint = 250")
            _check(db)
            _migrate(db)
            self._load(db)
        except BaseException:
            db.close()
            raise
        return db

    def _load(self, db: sqlite3.Connection) -> None:
        if not self._loaded:
            self._memory.absorb(_read(db))
            self._loaded = True

    def _peek(self) -> None:
        """A file in a directory where nothing can be written can still be read."""
        uri = f"{self._path.absolute().as_uri()}?mode=ro&immutable=1"
        with suppress(sqlite3.Error), closing(sqlite3.connect(uri, uri=True)) as db:
            self._load(db)

    def _move_aside(self, error: Exception) -> None:
        self._disconnect()
        mark = datetime.now(UTC).strftime("corrupt-%Y%m%dT%H%M%S%fZ")
        aside = self._path.with_name(f"{self._path.name}.{mark}")
        self._path.rename(aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        log.warning("state file %s is corrupt (%s): moved to %s", self._path, error, aside.name)

    def _fail(self, error: Exception) -> None:
        self._behind = True
        self._retry_at = time.monotonic() + self._retry_s
        self._disconnect()
        if not self._failing:
            self._failing = True
            if _code(error) in MAYBE_READABLE:
                self._peek()
            log.warning(
                "cannot write state to %s: %s; going on in memory, "
                "a restart would forget what is learned from now on",
                self._path, error,
            )  # fmt: skip

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            try:
                db.close()
            except sqlite3.Error as error:  # its last checkpoint; the WAL keeps what it holds
                log.debug("closing %s: %s", self._path, error)


_Row = tuple[str, tuple[object, ...]]


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 where it is somebody else's error."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF if isinstance(code, int) else 0


def _check(db: sqlite3.Connection) -> None:
    (line,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if line != "ok":
        error = sqlite3.DatabaseError(line)
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _migrate(db: sqlite3.Connection) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise Unusable(f"a newer homegptd wrote it (schema {version}, known {len(MIGRATIONS)})")
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")


def _read(db: sqlite3.Connection) -> _Memory:
    memory = _Memory()
    for model, key, said in db.execute("SELECT model, key, said FROM canaries"):
        told = json.loads(said)
        canary = told if isinstance(told, str) else tuple(map(float, told))
        memory.canaries[ModelId(model), key] = canary
    known = {proof.value: proof for proof in Proof}
    for model, key, name, holds, detail, at in db.execute("SELECT * FROM proofs"):
        if name in known:
            memory.proofs[ModelId(model), key, known[name]] = (bool(holds), detail, at)
    memory.notes.update(db.execute("SELECT name, text FROM notes"))
    kinds = {kind.value: kind for kind in Kind}
    for model, key, kind, place, mib, margin, at in db.execute("SELECT * FROM figures"):
        if kind in kinds:
            figure = Figure(mib, Source.MEASURED, margin, at)
            known_here = memory.figures.get((ModelId(model), key), {})
            memory.figures[ModelId(model), key] = {**known_here, (kinds[kind], Gpu(place)): figure}
    query = "SELECT model, act, seconds, at FROM durations ORDER BY id"
    for model, act, seconds, at in db.execute(query):
        memory.lasted(ModelId(model), act).append((seconds, at))
    return memory


def _all_rows(memory: _Memory) -> list[_Row]:
    rows: list[_Row] = [_canary_row(*of, said) for of, said in memory.canaries.items()]
    rows += [_proof_row(*of, value) for of, value in memory.proofs.items()]
    rows += [_note_row(name, text) for name, text in memory.notes.items()]
    rows += [
        _figure_row(*key, *of, figure)
        for key, figures in memory.figures.items()
        for of, figure in figures.items()
    ]
    rows.append(("DELETE FROM durations", ()))
    for (model, act), lasted in memory.durations.items():
        rows += [_duration_row(model, act, value) for value in lasted]
    return rows


def _canary_row(model: ModelId, key: str, said: Canary) -> _Row:
    return "INSERT OR REPLACE INTO canaries VALUES (?, ?, ?)", (model, key, json.dumps(said))


def _proof_row(model: ModelId, key: str, proof: Proof, value: tuple[bool, str, float]) -> _Row:
    put = "INSERT OR REPLACE INTO proofs VALUES (?, ?, ?, ?, ?, ?)"
    return put, (model, key, proof.value, *value)


def _note_row(name: str, text: str) -> _Row:
    return "INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, text)


def _figure_row(model: ModelId, key: str, kind: Kind, place: Gpu, figure: Figure) -> _Row:
    put = "INSERT OR REPLACE INTO figures VALUES (?, ?, ?, ?, ?, ?, ?)"
    return put, (model, key, kind.value, place, figure.mib, figure.margin_mib, figure.at or 0.0)


def _duration_row(model: ModelId, act: str, value: tuple[float, float]) -> _Row:
    put = "INSERT INTO durations (model, act, seconds, at) VALUES (?, ?, ?, ?)"
    return put, (model, act, *value)


def _forget_durations(model: ModelId, act: str) -> _Row:
    """Without numbered parameters, of which Python 3.12 warns."""
    kept = "SELECT id FROM durations WHERE model = ? AND act = ? ORDER BY id DESC LIMIT ?"
    return (
        f"DELETE FROM durations WHERE model = ? AND act = ? AND id NOT IN ({kept})",  # noqa: S608
        (model, act, model, act, DURATIONS_KEPT),
    )
