"""Against real datagram sockets, by path and abstract."""

import logging
import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from homegptd.adapters.notify import Notifier, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def systemd(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    name = f"homegpt-{os.getpid()}"
    address, told = {
        "path": (str(tmp_path / "notify"), str(tmp_path / "notify")),
        "abstract": ("\0" + name, "@" + name),
    }[request.param]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", told)
        yield sock


@pytest.fixture
def notifier(systemd: socket.socket) -> Iterator[Notifier]:
    notifier = Notifier()
    yield notifier
    notifier.close()


def test_ready_and_its_status_are_one_message(systemd: socket.socket, notifier: Notifier) -> None:
    notifier.ready("qwen3-8b awake")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=qwen3-8b awake"


def test_every_state_in_its_words(systemd: socket.socket, notifier: Notifier) -> None:
    notifier.status("waking")
    notifier.extend(30)
    notifier.watchdog()
    notifier.stopping("2 answers left")
    assert [systemd.recv(4096) for _ in range(4)] == [
        b"STATUS=waking",
        b"EXTEND_TIMEOUT_USEC=30000000",
        b"WATCHDOG=1",
        b"STOPPING=1\nSTATUS=2 answers left",
    ]


def test_reloading_carries_the_monotonic_time(systemd: socket.socket, notifier: Notifier) -> None:
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    first, second = systemd.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        ("waking → awake…", "waking -> awake..."),
        ("Grüße 模型 ok", "Grusse ok"),
        ("one\nMAINPID=1\r\ttwo\x1b[31m\x00", "one MAINPID=1 two[31m"),
        ("", ""),
    ],
)
def test_a_status_can_not_lose_its_ready(
    systemd: socket.socket, notifier: Notifier, status: str, sent: str
) -> None:
    notifier.ready(status)
    assert systemd.recv(4096) == b"READY=1\nSTATUS=" + sent.encode()


def test_a_long_status_stays_far_below_systemds_limit(
    systemd: socket.socket, notifier: Notifier
) -> None:
    notifier.ready("…" * 5000)
    message = systemd.recv(65536)
    assert len(message) < 600
    assert message.endswith(b"...")


def test_a_full_queue_blocks_nobody_and_is_told_once(
    systemd: socket.socket, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    for _ in range(2000):
        notifier.watchdog()
    assert time.monotonic() - began < 1
    assert len(caplog.records) == 1
    while select.select([systemd], [], [], 0)[0]:
        systemd.recv(4096)
    notifier.status("back")
    assert systemd.recv(4096) == b"STATUS=back"


def test_stored_descriptors_arrive_under_their_name(
    systemd: socket.socket, notifier: Notifier
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        notifier.store_fds("http:9000 →", [server.fileno()])
        message, fds, _, _ = socket.recv_fds(systemd, 4096, 4)
        with socket.socket(fileno=fds[0]) as received:
            assert received.getsockname() == server.getsockname()
    assert message == b"FDSTORE=1\nFDNAME=http-9000--"
    assert len(fds) == 1


def test_a_dropped_descriptor_goes_under_the_name_it_came_by(
    systemd: socket.socket, notifier: Notifier
) -> None:
    notifier.drop_fds("http-127.0.0.1:9000")
    assert systemd.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=http-127.0.0.1-9000"


def test_without_systemd_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    notifier.ready("up")
    notifier.store_fds("x", [0])
    notifier.close()
    assert not caplog.records


def test_a_socket_that_is_not_there_is_told_once_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with caplog.at_level(logging.WARNING):
        notifier = Notifier()
        notifier.ready("up")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_systemd_that_went_away_is_told_once(
    systemd: socket.socket, notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    systemd.close()
    notifier.ready("up")
    notifier.status("still up")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_pinged_at_half_its_time(
    environ: dict[str, str], interval_s: float | None
) -> None:
    assert watchdog_interval_s(environ) == interval_s
