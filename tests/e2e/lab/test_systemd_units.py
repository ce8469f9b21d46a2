"""`SystemdUnits` against a real systemd, a real podman and Quadlet containers.

The adapter runs in the test's own loop and talks to the machine's bus through /proc.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from homegptd.adapters.systemd import EngineUnit, SystemdUnits
from homegptd.core.model import ModelId
from homegptd.core.refusals import Fault

from .machine import Machine

UNITS = Path(__file__).parent / "units"
ALPHA = ModelId("alpha")
ENGINE = (UNITS / "vllm-alpha.container").read_text()
SOCKET = "/run/homegpt/engines/alpha/engine.sock"

PATIENCE_S = 10.0


@pytest.fixture
async def units(machine: Machine) -> AsyncIterator[SystemdUnits]:
    machine.install("vllm-alpha.container", ENGINE)
    async with _units(machine) as units:
        yield units


@asynccontextmanager
async def _units(machine: Machine, **given: float) -> AsyncIterator[SystemdUnits]:
    names = {ALPHA: EngineUnit("vllm-alpha.service", machine.path(SOCKET))}
    for name in ("deaf", "brief", "missing", "other"):
        names[ModelId(name)] = EngineUnit(f"vllm-{name}.service")
    units = SystemdUnits(names, address=machine.bus, **given)
    try:
        yield units
    finally:
        await units.close()


async def _until(true: Callable[[], object]) -> None:
    """Other processes tell us nothing: look again."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _engine_pid(machine: Machine) -> int:
    """The host's pid of the process in the container, not of conmon."""
    found = machine.run("podman", "inspect", "--format={{.State.Pid}}", "vllm-alpha").out
    return machine.host_pid(int(found))


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.connect(str(path))
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        return sock.recv(64).startswith(b"HTTP/1.1 200")
    return False


class Gone:
    """A watcher that is in place before the end comes."""

    def __init__(self, units: SystemdUnits, model: ModelId = ALPHA) -> None:
        self._units, self._model = units, model

    async def __aenter__(self) -> "Gone":
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self.task = self._group.create_task(self._watch())
        await self._units.observe()  # answered after what the watcher asked first
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()
        await self._group.__aexit__(None, None, None)

    async def _watch(self) -> None:
        self.exit = await self._units.gone(self._model)
        self.at = time.monotonic()

    async def told(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.shield(self.task)


# ------------------------------------------------------------ life


async def test_an_engine_starts_serves_is_observed_and_leaves_nothing(
    machine: Machine, units: SystemdUnits
) -> None:
    assert await units.observe() == {}
    before = time.time()
    await units.start(ALPHA)
    await _until(lambda: _answers(machine.path(SOCKET)))
    running = (await units.observe())[ALPHA]
    assert running.pid == int(machine.show("vllm-alpha", "MainPID")["MainPID"])
    assert before - 1 < running.started_at < time.time()
    engine = int(machine.run("podman", "inspect", "--format={{.State.Pid}}", "vllm-alpha").out)
    assert {running.pid, engine} <= await units.pids(ALPHA)  # conmon's and the engine's
    await units.stop(ALPHA)
    assert await units.pids(ALPHA) == frozenset()
    assert await units.observe() == {}
    assert machine.run("podman", "ps", "-aq").out == ""
    assert machine.show("vllm-alpha", "ActiveState") == {"ActiveState": "inactive"}


async def test_a_second_start_changes_nothing(machine: Machine, units: SystemdUnits) -> None:
    await units.start(ALPHA)
    first = await units.observe()
    await units.start(ALPHA)
    assert await units.observe() == first


async def test_a_start_after_a_crash_removes_the_stale_socket(
    machine: Machine, units: SystemdUnits
) -> None:
    await units.start(ALPHA)
    await _until(lambda: _answers(machine.path(SOCKET)))
    os.kill(_engine_pid(machine), signal.SIGKILL)
    await units.gone(ALPHA)
    assert machine.path(SOCKET).is_socket()
    await units.start(ALPHA)
    await _until(lambda: _answers(machine.path(SOCKET)))


async def test_an_engine_found_running_is_adopted_by_the_next_daemon(machine: Machine) -> None:
    machine.install("vllm-alpha.container", ENGINE)
    async with _units(machine) as one:
        await one.start(ALPHA)
        found = await one.observe()
    async with _units(machine) as two:
        assert await two.observe() == found
        async with Gone(two) as gone:
            os.kill(_engine_pid(machine), signal.SIGKILL)
            await gone.told()


# ------------------------------------------------------------ ends


async def test_a_killed_engine_is_known_within_half_a_second(
    machine: Machine, units: SystemdUnits, record_property: Callable[[str, object], None]
) -> None:
    took = []
    for _ in range(5):
        await units.start(ALPHA)
        pid = _engine_pid(machine)
        async with Gone(units) as gone:
            at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            await gone.told()
        took.append(gone.at - at)
        assert gone.exit.code == -signal.SIGKILL
        assert gone.exit.detail == "was killed by SIGKILL"
    print("SIGKILL to gone():", ", ".join(f"{s * 1000:.0f} ms" for s in took))
    record_property("kill_to_gone_s", took)
    assert sorted(took)[2] < 0.5


async def test_an_engine_that_exits_with_0_has_ended_too(
    machine: Machine, units: SystemdUnits
) -> None:
    await units.start(ALPHA)
    await _until(lambda: _answers(machine.path(SOCKET)))
    async with Gone(units) as gone:
        os.kill(_engine_pid(machine), signal.SIGTERM)
        await gone.told()
    assert gone.exit.code == 0
    assert gone.exit.detail == "exited with code 0"
    assert machine.show("vllm-alpha", "Result") == {"Result": "success"}


async def test_a_killed_supervisor_ends_the_engine(machine: Machine, units: SystemdUnits) -> None:
    await units.start(ALPHA)
    conmon = machine.host_pid((await units.observe())[ALPHA].pid)
    async with Gone(units) as gone:
        os.kill(conmon, signal.SIGKILL)
        await gone.told()
    assert gone.exit.code == -signal.SIGKILL
    await units.start(ALPHA)
    await _until(lambda: _answers(machine.path(SOCKET)))


async def test_what_a_killed_supervisor_left_behind_stops_no_start(
    machine: Machine, units: SystemdUnits
) -> None:
    """podman's --replace fails over such a container, once."""
    stray = (
        "systemd-run -qG --unit=lab-stray -pType=forking -pDelegate=yes podman run -d "
        "--network=none --cgroups=split --name=vllm-alpha localhost/homegpt-sim:1 x"
    )
    machine.run("sh", "-c", stray)
    machine.run("systemctl", "kill", "--signal=KILL", "lab-stray")
    await units.start(ALPHA)
    await _until(lambda: _answers(machine.path(SOCKET)))


@pytest.mark.parametrize(
    "command", [("podman", "stop", "vllm-alpha"), ("systemctl", "stop", "vllm-alpha")]
)
async def test_an_engine_stopped_by_somebody_else_is_gone(
    machine: Machine, units: SystemdUnits, command: tuple[str, ...]
) -> None:
    await units.start(ALPHA)
    await _until(lambda: _answers(machine.path(SOCKET)))  # a PID 1 without handlers is deaf
    async with Gone(units) as gone:
        await asyncio.to_thread(machine.run, *command, service=True)
        await gone.told()


async def test_an_engine_restarted_by_somebody_else_is_gone(
    machine: Machine, units: SystemdUnits
) -> None:
    await units.start(ALPHA)
    await _until(lambda: _answers(machine.path(SOCKET)))
    async with Gone(units) as gone:
        await asyncio.to_thread(machine.systemctl, "restart", "vllm-alpha")
        await gone.told()
    assert list(await units.observe()) == [ALPHA]


async def test_nobody_waits_for_an_engine_that_does_not_run(units: SystemdUnits) -> None:
    assert (await units.gone(ALPHA)).detail == "was not running"


async def test_an_engine_that_ends_before_anybody_watches_is_not_missed(machine: Machine) -> None:
    machine.install("vllm-brief.service", "[Service]\nExecStart=/bin/sh -c 'exit 3'\n")
    async with _units(machine) as units:
        for _ in range(20):  # more often than systemd's own StartLimitBurst= of 5
            await units.start(ModelId("brief"))
            ended = await units.gone(ModelId("brief"))
            assert (ended.code, ended.detail) == (3, "exited with code 3")


async def test_systemds_own_limit_of_starts_does_not_count_ours(machine: Machine) -> None:
    text = "[Unit]\nStartLimitBurst=2\n[Service]\nExecStart=/bin/sh -c 'exit 3'\n"
    machine.install("vllm-brief.service", text)
    async with _units(machine) as units:
        for _ in range(5):
            await units.start(ModelId("brief"))
            assert (await units.gone(ModelId("brief"))).code == 3


async def test_an_engine_keeps_its_unit_until_it_ends_though_the_configuration_names_another(
    machine: Machine, units: SystemdUnits
) -> None:
    machine.install("vllm-other.service", "[Service]\nExecStart=/bin/sleep 1000\n")
    await units.start(ALPHA)
    units.replace({ALPHA: EngineUnit("vllm-other.service")})
    await units.stop(ALPHA)
    assert machine.show("vllm-alpha", "ActiveState") == {"ActiveState": "inactive"}
    await units.start(ALPHA)
    assert machine.show("vllm-other", "ActiveState") == {"ActiveState": "active"}
    await units.stop(ALPHA)


# ------------------------------------------------------------ stops


async def test_a_starting_engine_that_swallows_its_first_sigterm_stops_soon(
    machine: Machine, units: SystemdUnits
) -> None:
    slow = "--sim-speed 1 --sim-imports-s 60 --sim-fault swallowed-sigterm"
    machine.install("vllm-alpha.container", ENGINE.replace("--sim-speed 1000", slow))
    since = machine.mark()
    await units.start(ALPHA)
    await _until(
        lambda: any("API server" in entry["MESSAGE"] for entry in machine.journal(since=since))
    )
    began = time.monotonic()
    await units.stop(ALPHA)
    took = time.monotonic() - began
    print(f"stopped after {took:.1f} s")
    assert 2.0 <= took < 8.0  # podman itself would wait for 10 s
    assert machine.show("vllm-alpha", "ActiveState") == {"ActiveState": "inactive"}
    assert machine.run("podman", "ps", "-aq").out == ""


async def test_a_deaf_engine_is_killed(machine: Machine) -> None:
    machine.install("vllm-deaf.service", (UNITS / "vllm-deaf.service").read_text())
    deaf = ModelId("deaf")
    async with _units(machine, term_again_s=0.1, kill_after_s=0.2) as units:
        await units.start(deaf)
        await units.stop(deaf)
        assert await units.observe() == {}
    assert machine.show("vllm-deaf", "ActiveState") == {"ActiveState": "inactive"}


async def test_a_stop_replaces_a_start_that_was_given_up(machine: Machine) -> None:
    text = "[Service]\nType=notify\nExecStart=/bin/sleep 1000\n"
    machine.install("vllm-other.service", text)
    other = ModelId("other")
    async with _units(machine) as units:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await units.start(other)
        assert list(await units.observe()) == [other]
        await units.stop(other)
        assert await units.observe() == {}


async def test_all_stop_at_the_same_time(machine: Machine) -> None:
    machine.install("vllm-deaf.service", (UNITS / "vllm-deaf.service").read_text())
    machine.install("vllm-alpha.container", ENGINE)
    async with _units(machine, term_again_s=0.1, kill_after_s=0.2) as units:
        await units.start(ALPHA)
        await units.start(ModelId("deaf"))
        await units.stop_all()
        assert await units.observe() == {}


# ------------------------------------------------------------ faults


async def test_a_missing_image_is_a_lasting_fault(machine: Machine, units: SystemdUnits) -> None:
    machine.install("vllm-alpha.container", ENGINE.replace("homegpt-sim:1", "no-such-image:1"))
    with pytest.raises(
        Fault, match=r'cannot start "alpha": podman refuses to run it \(exit 125\)'
    ) as at:
        await units.start(ALPHA)
    assert at.value.lasting
    assert at.value.hint == "journalctl -u vllm-alpha.service -n 20"


async def test_a_journal_that_comes_late_is_looked_at_again(
    machine: Machine, units: SystemdUnits, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.install("vllm-alpha.container", ENGINE.replace("homegpt-sim:1", "no-such-image:1"))
    looks = [(), ("Error: no-such-image:1: image not known",)]

    async def newest_lines(*_: object) -> tuple[str, ...]:
        return looks.pop(0)

    monkeypatch.setattr("homegptd.adapters.systemd.newest_lines", newest_lines)
    with pytest.raises(Fault, match=r"\(exit 125\): no-such-image:1: image not known"):
        await units.start(ALPHA)


async def test_a_missing_gpu_is_a_lasting_fault(machine: Machine, units: SystemdUnits) -> None:
    machine.install("vllm-alpha.container", ENGINE.replace("gpu=all", "gpu=7"))
    with pytest.raises(Fault, match=r"its container cannot be started \(exit 126\)") as at:
        await units.start(ALPHA)
    assert at.value.lasting


async def test_an_unknown_unit_is_a_lasting_fault(units: SystemdUnits) -> None:
    with pytest.raises(Fault, match=r"systemd has no unit vllm-missing\.service") as at:
        await units.start(ModelId("missing"))
    assert at.value.lasting
    await units.stop(ModelId("missing"))


async def test_a_quadlet_with_a_mistake_is_a_lasting_fault(
    machine: Machine, units: SystemdUnits
) -> None:
    machine.install("vllm-other.container", "[Container]\nImage=x\nNoSuchKey=1\n")
    with pytest.raises(Fault, match="systemd has no unit") as at:
        await units.start(ModelId("other"))
    assert "quadlet -dryrun" in (at.value.hint or "")


async def test_a_start_cut_short_by_a_kill_may_be_tried_again(
    machine: Machine, units: SystemdUnits
) -> None:
    text = "[Service]\nType=notify\nExecStart=/bin/sh -c 'kill -KILL $$$$'\n"
    machine.install("vllm-other.service", text)
    with pytest.raises(Fault, match="was killed by SIGKILL") as at:
        await units.start(ModelId("other"))
    assert not at.value.lasting


async def test_a_dependency_that_fails_is_named_as_such(machine: Machine) -> None:
    machine.install("vllm-brief.service", "[Service]\nType=oneshot\nExecStart=/bin/false\n")
    text = "[Unit]\nRequires=vllm-brief.service\nAfter=vllm-brief.service\n"
    machine.install("vllm-other.service", f"{text}[Service]\nExecStart=/bin/sleep 1000\n")
    async with _units(machine) as units:
        with pytest.raises(Fault, match=r"a unit that vllm-other\.service needs did not start"):
            await units.start(ModelId("other"))


# ------------------------------------------------------------ a bus that comes and goes


@pytest.mark.parametrize("trouble", ["daemon-reexec", "daemon-reload", "restart dbus.service"])
async def test_a_watcher_survives(machine: Machine, units: SystemdUnits, trouble: str) -> None:
    await units.start(ALPHA)
    pid = _engine_pid(machine)
    async with Gone(units) as gone:
        await asyncio.to_thread(machine.systemctl, *trouble.split(), check=False)
        assert list(await units.observe()) == [ALPHA]
        assert not gone.task.done()
        os.kill(pid, signal.SIGKILL)
        await gone.told()
    assert gone.exit.code == -signal.SIGKILL


async def test_an_end_while_the_bus_is_away_is_told_when_it_is_back(
    machine: Machine, units: SystemdUnits
) -> None:
    await units.start(ALPHA)
    pid = _engine_pid(machine)
    async with Gone(units) as gone:
        await asyncio.to_thread(machine.systemctl, "stop", "dbus.socket", "dbus.service")
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(machine.systemctl, "start", "dbus.socket", "dbus.service")
        await gone.told()
    assert gone.exit.code == -signal.SIGKILL


async def test_a_job_in_flight_survives_a_systemd_that_executes_itself_anew(
    machine: Machine, units: SystemdUnits
) -> None:
    text = ENGINE.replace("[Service]\n", "[Service]\nExecStartPre=/bin/sleep 1\n")
    machine.install("vllm-alpha.container", text)
    async with asyncio.TaskGroup() as group:
        started = group.create_task(units.start(ALPHA))
        await _until(
            lambda: machine.show("vllm-alpha", "ActiveState")["ActiveState"] == "activating"
        )
        await asyncio.to_thread(machine.systemctl, "daemon-reexec")
        await started
    assert list(await units.observe()) == [ALPHA]
