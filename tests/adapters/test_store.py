"""Real files, a really full disk, a really killed process."""

import logging
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from homegptd.adapters.store import DURATIONS_KEPT, MIGRATIONS, Store
from homegptd.core.memory import HOST, Figure, Gpu, Kind, Source
from homegptd.core.model import ModelId, Proof

A = ModelId("qwen3-8b")
B = ModelId("gpt-oss-20b")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "homegpt.db"


def reopened(path: Path) -> Store:
    store = Store(path)
    store.close()
    return store


PINNED = (Kind.PINNED, HOST)
FIGURES = {
    (Kind.AWAKE, Gpu(0)): Figure(60_000, Source.MEASURED, 600, 12.5),
    (Kind.AWAKE, Gpu(1)): Figure(59_000, Source.MEASURED, 590, 12.5),
    PINNED: Figure(24_000, Source.MEASURED, 480, 12.5),
}


def fill(store: Store) -> None:
    store.remember_canary(A, "image@1", "once upon a time")
    store.remember_canary(B, "image@1", (0.5, 0.25))
    store.remember_proof(A, "image@1", Proof.FREEZE, holds=True, detail="480 tokens equal")
    store.remember_proof(A, "image@2", Proof.FREEZE, holds=False, detail="differs at 17")
    store.remember_proof(A, "image@2", Proof.RELOAD, holds=True, detail="equal")
    store.remember_duration(A, "wake", 3.5)
    store.remember_duration(A, "wake", 3.25)
    store.remember_note("freed", "{}")
    store.remember_note("freed", '{"0": {}}')
    store.remember_figures(A, "flags/0.32.0", FIGURES)
    store.remember_figures(A, "flags/0.33.0", {PINNED: Figure(7, Source.MEASURED, 1, 99.0)})


def assert_filled(store: Store) -> None:
    assert store.canary(A, "image@1") == "once upon a time"
    assert store.canary(B, "image@1") == (0.5, 0.25)
    assert store.proofs(A, "image@1") == {Proof.FREEZE: True}
    assert store.proofs(A, "image@2") == {Proof.FREEZE: False, Proof.RELOAD: True}
    assert store.proofs(B, "image@1") == {}
    assert store.durations() == {(A, "wake"): (3.5, 3.25)}
    assert store.note("freed") == '{"0": {}}'
    assert store.note("wanted") is None
    assert store.figures(A, "flags/0.32.0") == FIGURES
    assert store.figures(B, "flags/0.32.0") == {}
    version, newest = store.newest_figures(A, "flags")
    assert (version, newest[PINNED].mib) == ("0.33.0", 7)
    assert store.newest_figures(A, "other flags") == ("", {})


def test_everything_survives_a_restart(path: Path) -> None:
    store = Store(path)
    assert (store.canary(A, "image@1"), store.durations()) == (None, {})
    fill(store)
    assert_filled(store)
    store.close()
    assert_filled(reopened(path))


def test_the_newest_word_counts(path: Path) -> None:
    store = Store(path)
    store.remember_canary(A, "k", "old")
    store.remember_canary(A, "k", "new")
    for holds in (True, False):
        store.remember_proof(A, "k", Proof.FREEZE, holds=holds, detail="")
    store.close()
    again = reopened(path)
    assert again.canary(A, "k") == "new"
    assert again.proofs(A, "k") == {Proof.FREEZE: False}


def test_only_the_newest_durations_are_kept(path: Path) -> None:
    store = Store(path)
    for number in range(DURATIONS_KEPT + 10):
        store.remember_duration(A, "wake", float(number))
        store.remember_duration(B, "wake", float(number))
    newest = tuple(float(number) for number in range(10, DURATIONS_KEPT + 10))
    assert store.durations() == {(A, "wake"): newest, (B, "wake"): newest}
    store.close()
    assert reopened(path).durations() == {(A, "wake"): newest, (B, "wake"): newest}
    with sqlite3.connect(path) as db:
        (rows,) = db.execute("SELECT count(*) FROM durations").fetchone()
    db.close()
    assert rows == 2 * DURATIONS_KEPT


def test_a_corrupt_file_is_moved_aside_and_told(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database at all " * 500)
    store = Store(path)
    fill(store)
    store.close()
    (aside,) = path.parent.glob("homegpt.db.corrupt-*")
    assert aside.read_bytes().startswith(b"not a database")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert_filled(reopened(path))


def test_a_file_with_a_damaged_middle_is_moved_aside(path: Path) -> None:
    store = Store(path)
    for number in range(DURATIONS_KEPT):
        store.remember_duration(ModelId(f"model-{number}"), "wake", 1.0)
    store.close()
    damaged = bytearray(path.read_bytes())
    damaged[4096:12288] = os.urandom(8192)
    path.write_bytes(damaged)
    fill(store := Store(path))
    store.close()
    assert len(list(path.parent.glob("*.corrupt-*"))) == 1
    assert_filled(reopened(path))


def test_a_file_of_a_newer_schema_is_left_alone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        db.execute("CREATE TABLE future (x)")
    db.close()
    before = path.read_bytes()
    store = Store(path)
    fill(store)
    assert_filled(store)
    store.close()
    assert path.read_bytes()[100:] == before[100:]
    assert "a newer homegptd wrote it" in caplog.text


def test_an_older_schema_is_migrated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store := Store(path))
    store.close()
    more = (*MIGRATIONS, "ALTER TABLE durations ADD COLUMN tokens INTEGER")
    monkeypatch.setattr("homegptd.adapters.store.MIGRATIONS", more)
    assert_filled(reopened(path))
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(more),)
        db.execute("SELECT tokens FROM durations")
    db.close()


def test_a_directory_that_cannot_be_written_costs_only_durability(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store(Path("/proc/nowhere/homegpt.db"), retry_s=0)
    fill(store)
    assert_filled(store)
    store.close()
    assert len(caplog.records) == 1
    assert "cannot write state to /proc/nowhere/homegpt.db" in caplog.text


@pytest.fixture
def ordinary_user(tmp_path: Path) -> Iterator[Path]:
    """A directory and the rights of somebody whom file modes bind: root is not."""
    for above in (tmp_path, *tmp_path.parents[:3]):  # with pytest-xdist one is a worker's own
        if (mode := above.stat().st_mode) & 0o055 != 0o055:
            above.chmod(mode | 0o055)
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield tmp_path
        os.seteuid(0)
    else:
        yield tmp_path


def test_what_a_read_only_directory_holds_is_still_known(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "state" / "homegpt.db"
    fill(store := Store(path))
    store.close()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    request.getfixturevalue("ordinary_user")
    store = Store(path)
    assert_filled(store)
    store.remember_canary(B, "image@1", "else")
    assert store.canary(B, "image@1") == "else"
    store.close()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def assert_survives_a_full_disk(path: Path, caplog: pytest.LogCaptureFixture) -> Store:
    """Fill until the disk is full, and beyond."""
    store = Store(path, retry_s=0)
    fill(store)
    for number in range(300):
        store.remember_proof(B, f"key {number}", Proof.FREEZE, holds=True, detail="x" * 500)
    assert len(store.proofs(B, "key 299")) == 1
    assert_filled_in_part(store)
    bad = ["cannot write state to" in line for line in told(caplog)]
    assert bad[0]
    assert not any(
        one and next_ for one, next_ in pairwise(bad)
    )  # a WAL that is cut frees a little
    return store


def assert_filled_in_part(store: Store) -> None:
    assert store.canary(A, "image@1") == "once upon a time"
    assert store.canary(B, "image@1") == (0.5, 0.25)
    assert store.durations() == {(A, "wake"): (3.5, 3.25)}
    assert store.note("freed") == '{"0": {}}'
    assert store.note("wanted") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_costs_only_durability(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", mount], check=True)
    try:
        store = assert_survives_a_full_disk(mount / "homegpt.db", caplog)
        subprocess.run(["mount", "-o", "remount,size=4m", mount], check=True)
        store.remember_duration(A, "wake", 3.0)
        assert "is written" in told(caplog)[-1]
        store.close()
        again = reopened(mount / "homegpt.db")
        assert again.proofs(B, "key 299") == {Proof.FREEZE: True}
        assert again.durations() == {(A, "wake"): (3.5, 3.25, 3.0)}
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)  # a store may be open


def test_a_file_that_may_not_grow_is_survived_and_caught_up(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        store = assert_survives_a_full_disk(path, caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.close()
    assert reopened(path).proofs(B, "key 299") == {Proof.FREEZE: True}


def test_a_second_daemon_goes_on_in_memory_until_the_first_has_ended(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(first := Store(path))
    second = Store(path, retry_s=0)
    second.remember_duration(A, "wake", 3.0)
    assert "locked" in caplog.text
    first.close()
    second.remember_duration(A, "wake", 2.75)
    assert second.durations() == {(A, "wake"): (3.5, 3.25, 3.0, 2.75)}
    second.close()
    again = reopened(path)
    assert again.canary(A, "image@1") == "once upon a time"
    assert again.durations() == second.durations()


WRITER = """
import sys
from pathlib import Path
from homegptd.adapters.store import Store
store = Store(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    store.remember_duration("a", "wake", float(number))
    store.remember_canary("a", "k", str(number))
    print(number, flush=True)
"""


def test_a_kill_in_the_middle_of_writes_loses_nothing_that_was_said(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for lines in (40, 700):
        argv = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(lines):
                writer.stdout.readline()
            writer.kill()
            said = int((writer.stdout.read().split() or ["0"])[-1])
        store = reopened(path)
        (durations,) = store.durations().values()
        assert len(durations) in {DURATIONS_KEPT, int(durations[-1])}
        assert durations[-1] >= max(said, lines)
        assert durations[-1] - int(store.canary("a", "k") or 0) in {0, 1}
    assert not caplog.records


def test_a_write_costs_the_loop_little(path: Path) -> None:
    logging.disable()
    store = Store(path)
    took = []
    for number in range(200):
        began = time.perf_counter()
        store.remember_duration(A, "wake", float(number))
        took.append(time.perf_counter() - began)
    store.close()
    logging.disable(logging.NOTSET)
    assert sorted(took)[100] < 0.01
