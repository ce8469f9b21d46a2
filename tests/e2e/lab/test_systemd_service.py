"""What the daemon's own unit needs of systemd: rights, its own job, sockets kept over a restart.

Here the adapter runs inside the machine, as the unprivileged user homegpt.
"""

import json
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .machine import Machine

ENGINE = (Path(__file__).parent / "units/vllm-alpha.container").read_text()
POLKIT = """\
polkit.addRule(function (action, subject) {
    if (action.id !== "org.freedesktop.systemd1.manage-units" || subject.user !== "homegpt")
        return polkit.Result.NOT_HANDLED;
    var units = ["vllm-alpha.service"];
    var verbs = ["start", "stop", "kill", "reset-failed"];
    if (units.indexOf(action.lookup("unit")) >= 0 && verbs.indexOf(action.lookup("verb")) >= 0)
        return polkit.Result.YES;
    return polkit.Result.NOT_HANDLED;
});
"""
ACT = """
import asyncio, json, sys, time
from homegptd.adapters.systemd import EngineUnit, SystemdUnits
from homegptd.core.refusals import Fault

async def main():
    given = {"alpha": EngineUnit("vllm-alpha.service"), "other": EngineUnit("vllm-other.service")}
    units, told = SystemdUnits(given), []
    for act, model in zip(sys.argv[1::2], sys.argv[2::2]):
        began = time.monotonic()
        try:
            found = await getattr(units, act)(*([model] if model else []))
            told.append([act, str(found), time.monotonic() - began])
        except Fault as fault:
            told.append([act, fault.message, fault.lasting])
    await units.close()
    print(json.dumps(told))

asyncio.run(main())
"""
DAEMON = """
import asyncio, json, os, signal, socket
from homegptd.adapters.inherited import inherited_sockets
from homegptd.adapters.notify import Notifier
from homegptd.adapters.systemd import SystemdUnits

async def main():
    kept = inherited_sockets(os.environ)
    notifier, units, asked = Notifier(), SystemdUnits({}), asyncio.Event()
    if not (socks := kept.get("http", [])):
        sock = socket.create_server(("127.0.0.1", 9000))
        notifier.store_fds("http", [sock.fileno()])
        socks = [sock]
    server = await asyncio.start_server(lambda r, w: (w.write(b"hello"), w.close()), sock=socks[0])
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    notifier.ready("up")
    await asked.wait()
    with open("/run/homegpt/told", "a") as file:
        print(json.dumps([await units.own_job_type(), sorted(kept)]), file=file)
    await units.close()

asyncio.run(main())
"""
SERVICE = """\
[Service]
Type=notify
NotifyAccess=main
User=homegpt
Environment=PYTHONPATH=/usr/src/homegpt PYTHONDONTWRITEBYTECODE=1
RuntimeDirectory=homegpt
RuntimeDirectoryPreserve=yes
ExecStart=/usr/bin/python3 /run/lab-daemon.py
FileDescriptorStoreMax=8
Restart=on-failure
"""


def _act(machine: Machine, *words: str, user: str = "homegpt") -> list[list[object]]:
    told = machine.run("python3", "-c", ACT, *words, user=user).out
    found: list[list[object]] = json.loads(told)
    return found


@pytest.fixture
def allowed(machine: Machine) -> Machine:
    machine.install("vllm-alpha.container", ENGINE)
    machine.install("vllm-other.service", "[Service]\nExecStart=/bin/sleep 1000\n")
    machine.write("/etc/polkit-1/rules.d/50-homegpt.rules", POLKIT)
    return machine


@pytest.fixture
def daemon(machine: Machine) -> Iterator[Machine]:
    machine.write("/run/lab-daemon.py", textwrap.dedent(DAEMON))
    machine.install("homegpt.service", SERVICE)
    machine.systemctl("start", "homegpt")
    yield machine
    machine.systemctl("stop", "homegpt")


def _told(machine: Machine) -> list[list[object]]:
    return [json.loads(line) for line in machine.read("/run/homegpt/told").splitlines()]


def _restarts(machine: Machine) -> int:
    return int(machine.show("homegpt", "NRestarts")["NRestarts"])


# ------------------------------------------------------------ rights


def test_the_daemons_user_runs_the_units_that_polkit_names(allowed: Machine) -> None:
    started, observed, stopped, after = _act(
        allowed, "start", "alpha", "observe", "", "stop", "alpha", "observe", ""
    )
    assert started[:2] == ["start", "None"]
    assert "alpha" in str(observed[1])
    assert stopped[:2] == ["stop", "None"]  # within its patience: SIGTERM again needs verb kill
    assert after[:2] == ["observe", "{}"]


def test_the_daemons_user_runs_no_other_unit(allowed: Machine) -> None:
    ((_, message, lasting),) = _act(allowed, "start", "other")
    assert message == 'cannot start "other": polkit does not let this user start vllm-other.service'
    assert lasting is True


def test_a_missing_image_is_told_in_podmans_words_to_whom_may_read_them(allowed: Machine) -> None:
    allowed.install("vllm-alpha.container", ENGINE.replace("homegpt-sim:1", "no-such-image:1"))
    ((_, closed, _),) = _act(allowed, "start", "alpha")
    assert closed == 'cannot start "alpha": podman refuses to run it (exit 125)'
    allowed.run("usermod", "-aG", "systemd-journal", "homegpt")
    try:
        ((_, told, lasting),) = _act(allowed, "start", "alpha")
    finally:
        allowed.run("gpasswd", "-d", "homegpt", "systemd-journal")
    assert str(told).startswith(closed)
    assert "localhost/no-such-image:1: image not known" in str(told)
    assert lasting is True


def test_a_failed_start_is_told_in_the_words_of_this_try(allowed: Machine) -> None:
    allowed.run("usermod", "-aG", "systemd-journal", "homegpt")
    try:
        allowed.install("vllm-alpha.container", ENGINE.replace("homegpt-sim:1", "no-such-image:1"))
        ((_, told, _),) = _act(allowed, "start", "alpha")
        assert "no-such-image" in str(told)
        folder = "ExecStartPre=/usr/bin/install -d"
        allowed.install("vllm-alpha.container", ENGINE.replace(folder, f"{folder} /dev/null/x"))
        ((_, told, lasting),) = _act(allowed, "start", "alpha")
    finally:
        allowed.run("gpasswd", "-d", "homegpt", "systemd-journal")
    assert "vllm-alpha.service failed before its engine began: install: cannot " in str(told)
    assert "Not a directory" in str(told)
    assert lasting is False  # a full disk is emptied again


# ------------------------------------------------------------ our own job


@pytest.mark.parametrize(
    ("command", "job"),
    [
        (("stop", "homegpt"), "stop"),
        (("restart", "homegpt"), "restart"),
        (("try-restart", "homegpt"), "restart"),
        (("kill", "--wait", "homegpt"), None),  # or the next job might come before it asks
    ],
)
def test_the_daemon_learns_why_it_ends(
    daemon: Machine, command: tuple[str, str], job: str | None
) -> None:
    daemon.systemctl(*command)
    daemon.systemctl("stop", "homegpt")  # waits for the end of the one before
    assert _told(daemon)[0] == [job, []]


# ------------------------------------------------------------ sockets kept


def test_no_connection_is_refused_over_a_restart(daemon: Machine) -> None:
    connect = (
        "import socket; s = socket.create_connection(('127.0.0.1', 9000), 5); print(s.recv(9))"
    )
    loop = f'for i in $(seq 40); do python3 -c "{connect}" || echo refused; done'
    clients = daemon.popen("sh", "-c", loop)
    for _ in range(3):
        daemon.systemctl("restart", "homegpt")
    out, err = clients.communicate(timeout=60)
    assert out.splitlines().count(b"b'hello'") == 40, err[-2000:]
    assert _told(daemon)[1:] == [["restart", ["http"]]] * 2


def test_sockets_are_kept_over_a_crash(daemon: Machine) -> None:
    pid = daemon.host_pid(int(daemon.show("homegpt", "MainPID")["MainPID"]))
    daemon.systemctl("kill", "--signal=KILL", "homegpt")
    until = time.monotonic() + 20
    while _restarts(daemon) == 0 and time.monotonic() < until:
        time.sleep(0.05)
    answer = "import socket; print(socket.create_connection(('127.0.0.1', 9000), 5).recv(9))"
    assert daemon.run("python3", "-c", answer).out == "b'hello'\n"
    assert not Path(f"/proc/{pid}").exists()
    daemon.systemctl("stop", "homegpt")
    assert _told(daemon) == [["stop", ["http"]]]
