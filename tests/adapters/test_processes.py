"""Real processes, real signals; no engine needs more than a shell or a few lines of Python."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import uvloop

from homegptd.adapters.engine_log import cap_log
from homegptd.adapters.processes import Launch, Processes, clean_environ
from homegptd.adapters.sessions import Record
from homegptd.core.model import ModelId
from homegptd.core.refusals import Fault

A = ModelId("qwen3-8b")
B = ModelId("org/gpt-oss:20b")
QUICK = {"term_again_s": 0.2, "kill_after_s": 0.3, "give_up_after_s": 5.0}
PATIENT = {"term_again_s": 0.2, "kill_after_s": 20.0, "give_up_after_s": 5.0}

Make = Callable[..., Processes]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Processes] = []

    def build(
        *, a: Launch | None = None, b: Launch | None = None, timings: Mapping[str, float] = QUICK
    ) -> Processes:
        known = {model: launch for model, launch in ((A, a), (B, b)) if launch is not None}
        made.append(Processes(known, tmp_path / "state", **timings))
        return made[-1]

    yield build
    for processes in made:
        await processes.close()


def shell(tmp_path: Path, script: str, *args: str, name: str = "a", **env: str) -> Launch:
    argv = ("/bin/sh", "-c", script, "sh", *args)
    return Launch(argv, env, None, tmp_path / f"{name}.log")


async def says(log: Path, word: str) -> None:
    """Wait until the engine has written `word`; a limit, not a length of sleep."""
    async with asyncio.timeout(10):
        while word not in read(log):  # noqa: ASYNC110  # a file tells nobody that it grew
            await asyncio.sleep(0.005)


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ""


async def run(processes: Processes, launch: Launch, *, until: str = "up") -> int:
    await processes.start(A)
    await says(launch.log, until)
    return (await processes.observe())[A].pid


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def ends(pid: int) -> None:
    async with asyncio.timeout(5):
        while lives(pid):  # noqa: ASYNC110  # not our child
            await asyncio.sleep(0.005)


async def test_an_engine_runs_in_a_session_of_its_own(make: Make, tmp_path: Path) -> None:
    launch = shell(tmp_path, "echo up; exec sleep 60")
    pid = await run(make(a=launch), launch)
    assert (os.getsid(pid), os.getpgid(pid)) == (pid, pid)


async def test_stop_ends_it_and_gone_says_how(make: Make, tmp_path: Path) -> None:
    launch = shell(tmp_path, "echo up; exec sleep 60")
    processes = make(a=launch)
    pid = await run(processes, launch)
    async with asyncio.TaskGroup() as group:
        waiters = [group.create_task(processes.gone(A)) for _ in range(3)]
        await asyncio.sleep(0)
        await processes.stop(A)
    assert not lives(pid)
    assert await processes.observe() == {}
    assert {waiter.result().code for waiter in waiters} == {-signal.SIGTERM}
    assert waiters[0].result().detail.startswith("killed by SIGTERM")
    assert not list((tmp_path / "state/engines").glob("*.json"))


async def test_a_record_that_found_no_room_is_written_when_there_is_some(
    make: Make, tmp_path: Path
) -> None:
    launch = shell(tmp_path, "echo up; exec sleep 60")
    processes = make(a=launch)
    records = tmp_path / "state/engines"
    records.parent.mkdir(exist_ok=True)
    records.write_text("in the way")
    await run(processes, launch)
    processes._look()
    records.unlink()
    processes._look()
    assert [path.name for path in records.iterdir()] == [f"{A}.json"]


async def test_the_first_sigterm_may_be_swallowed(make: Make, tmp_path: Path) -> None:
    launch = shell(tmp_path, 'trap "trap - TERM; echo once" TERM; echo up; while :; do read x; done'
                   " < /dev/ptmx")  # fmt: skip
    processes = make(a=launch, timings=PATIENT)
    await run(processes, launch)
    await processes.stop(A)
    assert (await processes.gone(A)).code == -signal.SIGTERM
    assert "once" in launch.log.read_text()


async def test_ordinary_news_is_not_why_an_engine_ended(make: Make, tmp_path: Path) -> None:
    news = r"""(APIServer pid=7) INFO:     - "GET /is_sleeping HTTP/1.1" 200 OK"""
    launch = shell(tmp_path, f"echo 'out of memory'; echo '{news}'; kill -9 $$")
    processes = make(a=launch)
    await processes.start(A)
    assert (await processes.gone(A)).detail == "killed by SIGKILL: out of memory"
    launch = shell(tmp_path, f"echo '{news}'; kill -9 $$")
    processes = make(a=launch)
    await processes.start(A)
    assert (await processes.gone(A)).detail == "killed by SIGKILL"


async def test_what_ignores_sigterm_is_killed(make: Make, tmp_path: Path) -> None:
    launch = shell(tmp_path, 'trap "" TERM; echo up; sleep 60; sleep 60')
    processes = make(a=launch)
    await run(processes, launch)
    await processes.stop(A)
    assert (await processes.gone(A)).detail == "killed by SIGKILL: up"


async def test_a_frozen_process_is_stopped_too(make: Make, tmp_path: Path) -> None:
    launch = shell(tmp_path, "echo up; exec sleep 60")
    processes = make(a=launch)
    os.kill(await run(processes, launch), signal.SIGSTOP)
    await processes.stop(A)
    assert (await processes.gone(A)).code == -signal.SIGTERM


async def test_stop_waits_for_grandchildren_and_kills_the_stubborn(
    make: Make, tmp_path: Path
) -> None:
    worker = 'trap "" TERM; echo worker $$; while :; do sleep 60; done'
    launch = shell(tmp_path, f"sh -c '{worker}' & wait; echo bye")
    processes = make(a=launch)
    await run(processes, launch, until="worker")
    worker_pid = int(launch.log.read_text().split()[1])
    await processes.stop(A)
    assert not lives(worker_pid)


async def test_orphans_of_a_killed_leader_go_with_it(make: Make, tmp_path: Path) -> None:
    launch = shell(tmp_path, "sleep 60 & echo worker $!; wait")
    processes = make(a=launch)
    leader = await run(processes, launch, until="worker")
    worker_pid = int(launch.log.read_text().split()[1])
    os.kill(leader, signal.SIGKILL)
    exit_ = await processes.gone(A)
    assert exit_.code == -signal.SIGKILL
    assert not lives(worker_pid)


async def test_a_bad_flag_is_told_with_the_last_words(make: Make, tmp_path: Path) -> None:
    processes = make(a=shell(tmp_path, "echo vllm: error: unrecognized arguments: --x >&2; exit 2"))
    await processes.start(A)
    exit_ = await processes.gone(A)
    assert exit_.code == 2
    assert exit_.detail == "exited with code 2: vllm: error: unrecognized arguments: --x"


async def test_a_clean_end_needs_no_words(make: Make, tmp_path: Path) -> None:
    processes = make(a=shell(tmp_path, "echo bye"))
    await processes.start(A)
    assert (await processes.gone(A)).detail == "exited with code 0"


async def test_gone_of_what_never_ran_returns_at_once(make: Make, tmp_path: Path) -> None:
    assert (await make(a=shell(tmp_path, ":")).gone(A)).code is None


async def test_stop_of_what_does_not_run_changes_nothing(make: Make, tmp_path: Path) -> None:
    processes = make(a=shell(tmp_path, ":"))
    await processes.stop(A)
    await processes.start(A)
    await processes.gone(A)
    await processes.stop(A)


async def test_start_twice_is_one_engine_and_after_stop_a_new_one(
    make: Make, tmp_path: Path
) -> None:
    launch = shell(tmp_path, "echo up; exec sleep 60")
    processes = make(a=launch)
    first = await run(processes, launch)
    assert await run(processes, launch) == first
    async with asyncio.TaskGroup() as group:
        group.create_task(processes.stop(A))
        group.create_task(processes.stop(A))
    assert await run(processes, launch) != first
    assert launch.log.with_name("a.log.1").read_text() == "up\n"


async def test_a_cancelled_stop_leaves_a_state_that_can_be_stopped(
    make: Make, tmp_path: Path
) -> None:
    launch = shell(tmp_path, 'trap "" TERM; echo up; sleep 60; sleep 60')
    processes = make(a=launch)
    pid = await run(processes, launch)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await processes.stop(A)
    assert lives(pid)
    await processes.stop(A)
    assert not lives(pid)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (None, 0, "command not found: "),
        ("#!/bin/sh\n", 0o644, "permission denied"),
        ("#!/no/such/python\n", 0o755, "the interpreter in its first line is missing"),
        ("\x7fELFnonsense", 0o755, "exec format error"),
    ],
)
async def test_a_wrong_command_is_a_lasting_fault_that_names_it(
    make: Make, tmp_path: Path, content: str | None, mode: int, words: str
) -> None:
    command = tmp_path / "vllm"
    if content is not None:
        command.write_text(content)
        command.chmod(mode)
    processes = make(a=Launch((str(command), "serve"), {}, None, tmp_path / "a.log"))
    with pytest.raises(Fault) as caught:
        await processes.start(A)
    assert caught.value.lasting
    assert caught.value.message.startswith('cannot start "qwen3-8b": ')
    assert words in caught.value.message
    assert str(command) in caught.value.message
    assert await processes.observe() == {}


async def test_without_descriptors_left_nothing_is_started_that_nobody_watches(
    make: Make, tmp_path: Path
) -> None:
    launch = shell(tmp_path, "echo up; exec sleep 60")
    processes = make(a=launch)
    await processes.observe()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    started = 0
    for spare in range(8):
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + next_descriptor(), before[1]))
        try:
            await processes.start(A)
            started += 1
            await processes.stop(A)
        except Fault as fault:
            assert not fault.lasting  # noqa: PT017  # which of them fail is the kernel's business
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        await processes.stop(A)
        assert await processes.observe() == {}
    assert 0 < started < 8


def next_descriptor() -> int:
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd


async def test_a_model_without_a_command_is_a_lasting_fault(make: Make) -> None:
    with pytest.raises(Fault, match='cannot start "qwen3-8b": it has no command') as caught:
        await make().start(A)
    assert caught.value.lasting


async def test_the_socket_directory_is_made_and_a_stale_socket_removed(
    make: Make, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "a.sock"
    path.parent.mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    launch = Launch(("/bin/sh", "-c", ":"), {}, path, tmp_path / "a.log")
    await make(a=launch).start(A)
    assert not path.exists()
    assert path.parent.stat().st_mode & 0o7777 == 0o700


async def test_a_shared_socket_directory_gives_the_group_its_sockets(tmp_path: Path) -> None:
    launch = Launch(("/bin/sh", "-c", "umask"), {}, tmp_path / "run/s", tmp_path / "a.log")
    processes = Processes({A: launch}, tmp_path / "state", directory_mode=0o2770)
    await processes.start(A)
    await processes.gone(A)
    assert (tmp_path / "run").stat().st_mode & 0o7777 == 0o2770
    assert await processes.log_tail(A, 1) == ("0007",)
    await processes.close()


async def test_a_file_in_the_place_of_the_socket_is_not_removed(make: Make, tmp_path: Path) -> None:
    precious = tmp_path / "run" / "precious"
    precious.parent.mkdir()
    precious.write_text("mine")
    launch = Launch(("/bin/sh", "-c", ":"), {}, precious, tmp_path / "a.log")
    with pytest.raises(Fault, match="is not a socket"):
        await make(a=launch).start(A)
    assert precious.read_text() == "mine"


async def test_a_socket_path_beyond_the_kernels_limit_is_told(make: Make, tmp_path: Path) -> None:
    launch = Launch(("/bin/sh", "-c", ":"), {}, tmp_path / ("x" * 120), tmp_path / "a.log")
    with pytest.raises(Fault, match="longer than 107 bytes"):
        await make(a=launch).start(A)


async def test_an_engine_inherits_no_secret_of_the_daemon(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "CREDENTIALS_DIRECTORY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    processes = make(a=shell(tmp_path, "env", VLLM_SERVER_DEV_MODE="1"))
    await processes.start(A)
    await processes.gone(A)
    seen = "\n".join(await processes.log_tail(A, 100))
    assert "secret" not in seen
    assert "CUDA_VISIBLE_DEVICES=0,1" in seen
    assert "VLLM_SERVER_DEV_MODE=1" in seen


def test_the_clean_environment_keeps_what_engines_need() -> None:
    assert clean_environ({"PATH": "/bin", "HF_HOME": "/hf", "WATCHDOG_USEC": "1"}) == {
        "PATH": "/bin",
        "HF_HOME": "/hf",
    }


async def test_log_tail_gives_the_newest_lines(make: Make, tmp_path: Path) -> None:
    launch = shell(tmp_path, r'seq 100000; printf "load 1%%\rload 99%%\n\nlast\n"')
    processes = make(a=launch)
    assert await processes.log_tail(A, 5) == ()
    await processes.start(A)
    await processes.gone(A)
    assert await processes.log_tail(A, 4) == ("99999", "100000", "load 99%", "last")
    assert len(await processes.log_tail(A, 20000)) == 20000
    assert await processes.log_tail(B, 4) == ()


async def test_a_log_past_its_cap_is_cut_while_the_engine_writes(
    make: Make, tmp_path: Path
) -> None:
    launch = shell(tmp_path, "seq 1000; echo up; read x < $1; echo more", str(tmp_path / "fifo"))
    os.mkfifo(tmp_path / "fifo")
    processes = make(a=launch)
    await run(processes, launch)
    cap_log(launch.log, 10_000)
    assert launch.log.stat().st_size > 0
    cap_log(launch.log, 1000)
    assert launch.log.stat().st_size == 0
    (tmp_path / "fifo").write_text("\n")
    await processes.gone(A)
    assert launch.log.read_bytes() == b"more\n"
    assert launch.log.with_name("a.log.1").read_text().endswith("up\n")


async def test_an_engine_runs_without_its_log(make: Make, tmp_path: Path) -> None:
    launch = Launch(("/bin/sh", "-c", "echo hi"), {}, None, Path("/proc/nowhere/a.log"))
    processes = make(a=launch)
    await processes.start(A)
    assert (await processes.gone(A)).code == 0


async def test_all_are_stopped_at_the_same_time(make: Make, tmp_path: Path) -> None:
    """Each ends by itself only once the other was told to end as well."""
    script = """
        trap ': > $0.told; until [ -e $1.told ]; do sleep 0.01; done; exit 0' TERM
        echo up; while :; do sleep 0.01; done
    """
    launches = [
        Launch(("/bin/sh", "-c", script, str(tmp_path / me), str(tmp_path / other)), {}, None,
               tmp_path / f"{me}.log")
        for me, other in (("a", "b"), ("b", "a"))
    ]  # fmt: skip
    processes = make(a=launches[0], b=launches[1], timings=PATIENT)
    for model, launch in zip((A, B), launches, strict=True):
        await processes.start(model)
        await says(launch.log, "up")
    await processes.stop_all()
    assert await processes.observe() == {}
    assert [(await processes.gone(model)).code for model in (A, B)] == [0, 0]


DAEMON = """
import asyncio, sys
from pathlib import Path
from homegptd.adapters.processes import Launch, Processes

async def main(root):
    launch = Launch(("/bin/sh", "-c", sys.argv[2], "sh"), {}, None, root / "a.log")
    processes = Processes({"qwen3-8b": launch}, root / "state")
    await processes.start("qwen3-8b")
    running = (await processes.observe())["qwen3-8b"]
    print(running.pid, running.started_at, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1])))
"""


def left_by_a_killed_daemon(tmp_path: Path, script: str) -> tuple[int, float]:
    """Start an engine under another daemon and `kill -9` that daemon."""
    argv = [sys.executable, "-c", DAEMON, str(tmp_path), script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        pid, started_at = daemon.stdout.readline().split()
        daemon.kill()
    return int(pid), float(started_at)


async def test_after_a_kill_of_the_daemon_engines_go_on_and_are_adopted(
    make: Make, tmp_path: Path
) -> None:
    script = "echo up; exec sleep 60"
    pid, started_at = left_by_a_killed_daemon(tmp_path, script)
    processes = make(a=shell(tmp_path, script))
    running = (await processes.observe())[A]
    assert (running.pid, running.started_at) == (pid, started_at)
    await processes.start(A)
    assert (await processes.observe())[A].pid == pid
    await processes.stop(A)
    await ends(pid)
    assert (await processes.gone(A)).code is None


async def test_the_death_of_an_adopted_engine_is_seen(make: Make, tmp_path: Path) -> None:
    script = "echo last words; exec sleep 60"
    pid, _ = left_by_a_killed_daemon(tmp_path, script)
    launch = shell(tmp_path, script)
    processes = make(a=launch)
    await processes.observe()
    await says(launch.log, "words")
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(processes.gone(A))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
    assert waiting.result().code is None
    assert waiting.result().detail.endswith("had started it: last words")


@pytest.mark.parametrize("now", [None, "echo something else; exec sleep 60"])
async def test_what_cannot_be_adopted_is_ended(make: Make, tmp_path: Path, now: str | None) -> None:
    pid, _ = left_by_a_killed_daemon(tmp_path, "echo up; exec sleep 60")
    processes = make() if now is None else make(a=shell(tmp_path, now))
    assert await processes.observe() == {}
    await ends(pid)
    assert not list((tmp_path / "state/engines").iterdir())


async def test_orphans_whose_leader_died_with_the_daemon_are_ended(
    make: Make, tmp_path: Path
) -> None:
    launch = shell(tmp_path, "sleep 60 & echo worker $!; wait")
    leader, _ = left_by_a_killed_daemon(tmp_path, launch.argv[2])
    await says(launch.log, "worker")
    worker = int(launch.log.read_text().split()[1])
    os.kill(leader, signal.SIGKILL)
    await ends(leader)
    assert lives(worker)
    assert await make(a=launch).observe() == {}
    await ends(worker)


async def test_a_pid_that_means_another_process_now_is_left_alone(
    make: Make, tmp_path: Path
) -> None:
    launch = shell(tmp_path, "echo up; exec sleep 60")
    left, _ = left_by_a_killed_daemon(tmp_path, launch.argv[2])
    (record,) = (tmp_path / "state/engines").iterdir()
    told = json.loads(record.read_text())
    record.write_text(json.dumps(told | {"start_ticks": told["start_ticks"] - 1}))
    assert await make(a=launch).observe() == {}
    assert lives(left)
    os.killpg(left, signal.SIGKILL)


def test_it_works_on_uvloop_as_well(tmp_path: Path) -> None:
    async def journey() -> int | None:
        launch = shell(tmp_path, "sleep 60 & echo up; wait")
        processes = Processes({A: launch}, tmp_path / "state", **QUICK)
        os.kill(await run(processes, launch), signal.SIGKILL)
        code = (await processes.gone(A)).code
        await run(processes, launch)
        await processes.close()
        return code

    assert uvloop.run(journey()) == -signal.SIGKILL


async def test_a_broken_record_hurts_nobody(make: Make, tmp_path: Path) -> None:
    records = tmp_path / "state/engines"
    records.mkdir(parents=True)
    (records / "a.json").write_text('{"pid": ')
    (records / "b.json").write_text("[]")
    assert await make().observe() == {}
    assert not list(records.iterdir())


async def test_a_state_directory_that_cannot_be_written_does_not_stop_an_engine(
    tmp_path: Path,
) -> None:
    launch = shell(tmp_path, "echo up; exec sleep 60")
    processes = Processes({A: launch}, Path("/proc/nowhere"), **QUICK)
    await run(processes, launch)
    await processes.close()


async def test_a_record_holds_no_secret(make: Make, tmp_path: Path) -> None:
    launch = shell(tmp_path, "echo up; exec sleep 60", HF_TOKEN="hf_secret")
    await run(make(a=launch), launch)
    (record,) = (tmp_path / "state/engines").iterdir()
    assert set(Record.__dataclass_fields__) == {
        "model", "pid", "start_ticks", "boot", "started_at", "fingerprint"
    }  # fmt: skip
    assert "hf_secret" not in record.read_text()
