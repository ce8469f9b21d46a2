"""The systemd backend as far as it goes without root; the rest is in tests/e2e/lab."""

import asyncio
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from jeepney import DBusAddress

from homegptd.adapters import systemd_manager
from homegptd.adapters.dbus import Bus, BusError, BusLost, Signal
from homegptd.adapters.inherited import inherited_sockets
from homegptd.adapters.systemd import EngineUnit, SystemdUnits
from homegptd.adapters.systemd_manager import End, NoSystemd, Unit, escaped, exit_of
from homegptd.core.model import ModelId

DRIVER = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
CONFIG = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={path}</listen>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""


class PrivateBus:
    """A dbus-daemon of the test's own, which can be ended and started again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "bus"
        self._config = folder / "bus.conf"
        self._config.write_text(CONFIG.format(path=self._path))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix:path={self._path}"

    def start(self) -> None:
        told, told_here = os.pipe()
        command = [f"--config-file={self._config}", "--nofork", f"--print-address={told_here}"]
        words = ["dbus-daemon", "--nosyslog", *command]
        self._process = subprocess.Popen(words, pass_fds=[told_here], stderr=subprocess.DEVNULL)
        os.close(told_here)
        with os.fdopen(told) as ready:
            assert ready.readline().startswith("unix:path=")

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._path.unlink(missing_ok=True)


@pytest.fixture
def private_bus(tmp_path: Path) -> Iterator[PrivateBus]:
    if shutil.which("dbus-daemon") is None:
        pytest.skip("needs dbus-daemon")
    bus = PrivateBus(tmp_path)
    bus.start()
    yield bus
    bus.end()


@asynccontextmanager
async def _connected(bus: PrivateBus) -> AsyncIterator[tuple[Bus, list[Signal], asyncio.Event]]:
    signals: list[Signal] = []
    lost = asyncio.Event()
    connected = await Bus.connect(bus.address, on_signal=signals.append, on_lost=lost.set)
    try:
        yield connected, signals, lost
    finally:
        connected.close()


# ------------------------------------------------------------ the bus


async def test_calls_get_their_own_answers(private_bus: PrivateBus) -> None:
    async with _connected(private_bus) as (bus, _, _):
        first = bus.send(DRIVER, "NameHasOwner", "s", "org.freedesktop.DBus")
        second = bus.send(DRIVER, "NameHasOwner", "s", "no.body")
        assert (await second, await first) == ((False,), (True,))


async def test_an_error_has_its_name_and_words(private_bus: PrivateBus) -> None:
    async with _connected(private_bus) as (bus, _, _):
        with pytest.raises(BusError, match="no such name") as error:
            await bus.call(DRIVER, "GetNameOwner", "s", "no.body")
    assert error.value.name == "org.freedesktop.DBus.Error.NameHasNoOwner"


async def test_signals_come_before_the_answer_that_follows_them(private_bus: PrivateBus) -> None:
    async with _connected(private_bus) as (bus, signals, _):
        await bus.match("type='signal',member='NameOwnerChanged',arg0='a.b'")
        await bus.call(DRIVER, "RequestName", "su", "a.b", 0)
        assert [signal.body[0] for signal in signals if signal.member == "NameOwnerChanged"] == [
            "a.b"
        ]


async def test_a_lost_bus_fails_calls_on_their_way_and_later_ones(private_bus: PrivateBus) -> None:
    async with _connected(private_bus) as (bus, _, lost):
        answer = bus.send(DRIVER, "ListNames")
        private_bus.end()
        await lost.wait()
        assert bus.lost
        await asyncio.wait([answer])
        with pytest.raises(BusLost):
            await bus.call(DRIVER, "ListNames")


async def test_a_closed_bus_says_nothing_to_its_owner(private_bus: PrivateBus) -> None:
    async with _connected(private_bus) as (bus, _, lost):
        answer = bus.send(DRIVER, "ListNames")
        bus.close()
        with pytest.raises(BusLost):
            await answer
        assert not lost.is_set()


async def test_nobody_there_is_told_with_the_path(tmp_path: Path) -> None:
    address = f"unix:path={tmp_path}/none"
    with pytest.raises(BusLost, match="none: no such file or directory"):
        await Bus.connect(address, on_signal=lambda _: None, on_lost=lambda: None)


async def test_a_bus_without_systemd_is_a_fault_that_passes(
    private_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd_manager, "PAUSES_S", (0.01,))
    monkeypatch.setattr(systemd_manager, "MEND_S", 0.02)
    units = SystemdUnits({ModelId("a"): EngineUnit("vllm-a.service")}, address=private_bus.address)
    with pytest.raises(NoSystemd, match="cannot reach systemd") as fault:
        await units.observe()
    assert not fault.value.lasting
    await units.close()


def test_the_image_is_what_root_noted(tmp_path: Path) -> None:
    noted, other = ModelId("a"), ModelId("b")
    note = tmp_path / "a"
    units = SystemdUnits(
        {noted: EngineUnit("vllm-a.service", image_note=note), other: EngineUnit("vllm-b.service")}
    )
    assert (units.image(noted), units.image(other)) == ("", "")
    note.write_text("sha256:4f1e\n")
    assert units.image(noted) == "sha256:4f1e"
    note.write_bytes(b"\xff")
    assert units.image(noted) == ""


# ------------------------------------------------------------ the mirror


def _running() -> Unit:
    unit = Unit("vllm-a.service")
    unit.take({"ActiveState": "active", "SubState": "running", "MainPID": 7, "InvocationID": b"1"})
    return unit


def test_a_unit_that_is_loaded_tells_an_old_failure_that_is_no_news() -> None:
    unit = Unit("vllm-a.service")
    unit.take({"ActiveState": "failed", "SubState": "failed", "Result": "exit-code"})
    assert (unit.up, unit.ends) == (False, 0)


def test_the_end_is_told_once_though_its_signals_come_several_times() -> None:
    unit = _running()
    unit.take({"MainPID": 0, "Result": "exit-code", "ExecMainCode": 1, "ExecMainStatus": 137})
    for sub in ("stop-post", "stop-post"):
        unit.take({"ActiveState": "deactivating", "SubState": sub})
    unit.take({"ActiveState": "failed", "SubState": "failed"})
    assert unit.ends == 1
    assert unit.last == End("exit-code", 1, 137)


def test_a_unit_being_stopped_is_up_until_its_process_has_ended() -> None:
    unit = _running()
    unit.take({"ActiveState": "deactivating", "SubState": "stop"})
    assert unit.up
    unit.take({"MainPID": 0})
    assert (unit.up, unit.ends) == (False, 1)


def test_a_unit_that_systemd_will_start_again_has_ended() -> None:
    unit = _running()
    unit.take({"MainPID": 0, "ActiveState": "activating", "SubState": "auto-restart"})
    assert (unit.up, unit.ends) == (False, 1)


def test_another_invocation_is_another_engine() -> None:
    unit = _running()
    unit.take({"ActiveState": "active", "MainPID": 8, "InvocationID": b"2"})
    assert unit.ends == 1
    assert unit.last is not None
    assert unit.last.restarted


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        (End("success", 1, 0), 0, "exited with code 0"),
        (End("exit-code", 1, 3), 3, "exited with code 3"),
        (End("exit-code", 1, 137), -9, "was killed by SIGKILL"),
        (End("exit-code", 1, 255), 255, "exited with code 255"),
        (End("signal", 2, 9), -9, "was killed by SIGKILL"),
        (End("core-dump", 3, 11), -11, "was killed by SIGSEGV"),
        (End("oom-kill", 2, 9), -9, "was killed: the host ran out of memory"),
        (End("timeout", 2, 9), -9, "was killed by systemd: it took too long"),
        (End("success", 0, 0), None, "ended; nobody knows how"),
        (End("success", 0, 0, restarted=True), None, "was restarted by somebody else"),
    ],
)
def test_ends_are_told_in_words(end: End, code: int | None, words: str) -> None:
    told = exit_of(end)
    assert (told.code, told.detail) == (code, words)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("vllm-a.service", "vllm_2da_2eservice"),
        ("0x.slice", "_30x_2eslice"),
        ("vllm@ü.service", "vllm_40_c3_bc_2eservice"),
    ],
)
def test_names_are_spelled_as_object_paths(name: str, path: str) -> None:
    assert escaped(name) == path


# ------------------------------------------------------------ inherited sockets


INHERIT = """
import json, os, sys
from homegptd.adapters.inherited import inherited_sockets
if "--other" not in sys.argv:
    os.environ["LISTEN_PID"] = str(os.getpid())
found = inherited_sockets(os.environ)
names = {name: [sock.getsockname() for sock in socks] for name, socks in found.items()}
flags = [sock.get_inheritable() or sock.getblocking() for s in found.values() for sock in s]
print(json.dumps([names, any(flags), "LISTEN_FDS" in os.environ]))
for socks in found.values():
    for sock in socks:
        sock.close()
"""


def _inherit(*words: str) -> Any:
    """What a process finds that starts with two sockets and a file, at 3, 4 and 5."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in "12")
        file = stack.enter_context(Path(os.devnull).open())
        fds = [fcntl.fcntl(part.fileno(), fcntl.F_DUPFD, 200) for part in (one, two, file)]
        for fd in fds:
            stack.callback(os.close, fd)
        moves = " ".join(f"{to}<&{fd} {fd}<&-" for to, fd in zip((3, 4, 5), fds, strict=True))
        told = {"LISTEN_PID": "1", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "http:http:x"}
        done = subprocess.run(
            [
                "bash",
                "-c",
                f'exec {moves}; exec "$@"',
                "bash",
                sys.executable,
                "-c",
                INHERIT,
                *words,
            ],
            env={**os.environ, **told},
            pass_fds=fds,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout), [list(one.getsockname()), list(two.getsockname())]


def test_stored_sockets_come_back_by_name_and_what_is_no_socket_is_dropped() -> None:
    (names, flags, left), ports = _inherit()
    assert names == {"http": ports}
    assert (flags, left) == (False, False)


def test_sockets_for_another_process_are_left_alone() -> None:
    (names, _, left), _ = _inherit("--other")
    assert (names, left) == ({}, False)


def test_nothing_was_stored() -> None:
    assert inherited_sockets({}) == {}
