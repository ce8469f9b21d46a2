"""homegptctl against a real socket: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from homegptd import __version__
from homegptd.ctl import absent, acts, client, config, plan
from homegptd.ctl.__main__ import _tell_which as tell_which
from homegptd.ctl.__main__ import main
from homegptd.ctl.asked import Asked, Stop
from homegptd.ctl.verbs import VERBS
from homegptd.wire import codes, paths

from .conftest import Daemon

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "homegptd.ctl"]
Output = pytest.CaptureFixture[str]


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip


def read_until(stream: IO[str], words: str) -> str:
    for line in stream:
        if words in line:
            return line
    raise AssertionError(f"{words!r} never came")


# What it prints


@pytest.mark.usefixtures("daemon")
def test_status_shows_models_queue_and_memory(capsys: Output) -> None:
    assert main(["status"]) == 0
    shown = capsys.readouterr().out
    for words in ("* chat", "awake", "asleep L1", "12:0", "2 requests wait for coder", "GPU 0 ["):
        assert words in shown
    assert "\x1b" not in shown


@pytest.mark.usefixtures("daemon")
def test_json_is_what_the_daemon_said(capsys: Output) -> None:
    assert main(["--json", "status"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["id"] == "chat"


@pytest.mark.usefixtures("daemon")
def test_a_switch_shows_its_steps_and_its_outcome(capsys: Output) -> None:
    assert main(["switch", "code"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("switch done")
    assert "✓ wake coder  1.2 s (usually 1.5 s)" in shown.err


@pytest.mark.usefixtures("daemon")
def test_a_switch_in_json_is_one_document(capsys: Output) -> None:
    assert main(["switch", "coder", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["state"] == "done"
    assert not shown.err


def test_without_waiting_the_operation_is_named(slow_daemon: Daemon, capsys: Output) -> None:
    assert main(["switch", "coder", "--no-wait"]) == 0
    assert "operation 17: switch coder" in capsys.readouterr().out
    assert main(["operation", "17"]) == 0
    assert "drain coder" in capsys.readouterr().out
    assert main(["cancel", "17"]) == 0
    assert "given up" in capsys.readouterr().out
    assert slow_daemon.box.operations[17]["state"] == "cancelled"


@pytest.mark.usefixtures("daemon")
def test_a_plan_shows_its_steps_and_the_sum(capsys: Output) -> None:
    assert main(["plan", "coder"]) == 0
    shown = capsys.readouterr().out
    assert "2 steps, about 4.5 s" in shown
    assert "sleep chat" in shown
    assert "57.0 of 80.0 GiB" in shown


@pytest.mark.usefixtures("daemon")
def test_logs_take_a_number_of_lines_in_every_spelling(capsys: Output) -> None:
    for words in (["-n", "2"], ["-n2"], ["--lines=2"], ["--lines", "2"]):
        assert main(["logs", "chat", *words]) == 0
        assert capsys.readouterr().out == "two\nthree\n"


def test_logs_leave_out_what_the_daemon_asks_by_itself(daemon: Daemon, capsys: Output) -> None:
    own = [f'INFO:      - "GET {path} HTTP/1.1" 200 OK'
           for path in ("/health", "/is_sleeping", "/version", "/metrics?x=1")]  # fmt: skip
    kept = ['INFO:      - "POST /v1/completions HTTP/1.1" 200 OK', 'asked "GET /healthy" of it']
    daemon.box.log_text = [kept[0], *own * 20, kept[1], *own]
    assert main(["logs", "chat", "-n", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == kept
    assert main(["logs", "chat", "-n", "2", "--all"]) == 0
    assert capsys.readouterr().out.splitlines() == own[-2:]
    daemon.box.log_text = own
    assert main(["logs", "chat"]) == 0
    assert "--all shows them" in capsys.readouterr().err


def test_escapes_in_foreign_text_do_not_reach_the_terminal(daemon: Daemon, capsys: Output) -> None:
    daemon.box.log_text = ["\x1b[2Jboo"]
    assert main(["logs", "chat"]) == 0
    assert capsys.readouterr().out == "?[2Jboo\n"


@pytest.mark.usefixtures("daemon")
def test_the_other_verbs_reach_the_daemon(capsys: Output) -> None:
    for words in (["sleep", "chat", "--level", "2"], ["start", "chat"], ["stop", "chat", "--now"],
                  ["wake", "chat"], ["reload"]):  # fmt: skip
        assert main(words) == 0, words
        assert f"{words[0]} done" in capsys.readouterr().out


@pytest.mark.usefixtures("daemon")
def test_versions_are_both_shown(capsys: Output) -> None:
    assert main(["version"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count(__version__) == 2
    assert not shown.err


@pytest.mark.usefixtures("daemon")
def test_a_daemon_of_another_version_is_worth_a_warning(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homegptd.ctl.version.__version__", "0.0.1")
    assert main(["version"]) == 0
    assert "another version" in capsys.readouterr().err


# How it ends


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["switch", "nope"], 5, 'there is no model "nope"', "known are chat, coder"),
        (["switch", "coderr"], 5, 'there is no model "coderr"', "did you mean coder?"),
        (["plan", "CHAT"], 5, 'there is no model "CHAT"', "did you mean chat?"),
        (["wake", "coder"], 4, "do not fit", "homegptctl switch coder"),
        (["operation", "99"], 5, "there is no operation 99", ""),
        (["prove", "chat"], 1, "prove broke", ""),
        (["operation", "abc"], 2, 'not "abc"', "homegptctl status"),
        (["swtich", "coder"], 2, 'no verb "swtich"', "did you mean switch?"),
        (["switch"], 2, "MODEL is missing", "usage: homegptctl switch MODEL"),
        (["switch", "a", "b"], 2, "too many words", "usage: homegptctl switch MODEL"),
        (["switch", "a", "--nwo"], 2, "no option --nwo", "did you mean --now?"),
        (["sleep", "chat", "--level", "3"], 2, "must be 1 or 2", ""),
        (["logs", "chat", "-n"], 2, "-n wants a value", ""),
        (["logs", "chat", "-n", "x"], 2, 'logs: -n wants a number, not "x"', "[-n N] [--lines N]"),
        (
            ["switch", "a", "--level", "1"],
            2,
            "no option --level",
            "usage: homegptctl switch MODEL [",
        ),
        (["stop", "a", "--forse"], 2, "no option --forse", "usage: homegptctl stop MODEL ["),
        (["switch", "a", "--forse"], 2, "no option --forse", "did you mean --force?"),
        (["help", "bogus"], 2, 'no verb "bogus"', "hint: homegptctl help"),
        (["comp"], 2, 'no verb "comp"', "did you mean completion?"),
        (["switch", ""], 2, "switch: a model must be named", "usage: homegptctl switch MODEL"),
        (["help", ""], 2, "VERB", "usage: homegptctl help"),
        (["--no-wait", "switch", "a"], 2, "before the verb", ""),
        (["completion", "tcsh"], 2, "no completion", "bash|zsh|fish"),
    ],
)
def test_a_wrong_word_is_told_with_the_next_step(
    capsys: Output, words: list[str], code: int, message: str, hint: str
) -> None:
    assert main(words) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("homegptctl: ")
    assert message in lines[0]
    if hint:
        assert lines[1].startswith("hint: ")
        assert hint in lines[1]


@pytest.mark.usefixtures("daemon")
def test_errors_are_json_as_well(capsys: Output) -> None:
    assert main(["wake", "coder", "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "does-not-fit"


@pytest.mark.parametrize(
    ("reason", "code"), [("model-failed", 1), ("does-not-fit", 4), ("bad-config", 78)]
)
def test_an_operation_that_failed_ends_with_the_code_of_its_reason(
    daemon: Daemon, capsys: Output, reason: str, code: int
) -> None:
    daemon.box.fail_with = {"message": "vLLM answered 500", "hint": "look", "reason": reason}
    assert main(["switch", "coder"]) == code
    shown = capsys.readouterr().err
    assert "homegptctl: vLLM answered 500\nhint: look\n" in shown


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_and_says_how_to_look_again(slow_daemon: Daemon) -> None:
    with start("switch", "coder") as process:
        assert process.stderr
        read_until(process.stderr, "operation 17")
        process.send_signal(signal.SIGINT)
        shown = process.stderr.read()
        assert process.wait(10) == 130
    assert "detached; operation 17 goes on\nhint: homegptctl operation 17" in shown
    assert slow_daemon.box.operations[17]["state"] == "running"


def test_a_restart_of_the_daemon_is_survived(slow_daemon: Daemon, capsys: Output) -> None:
    ended: list[int] = []
    waiting = threading.Thread(target=lambda: ended.append(main(["switch", "coder"])))
    waiting.start()
    while 17 not in slow_daemon.box.operations:
        slow_daemon.do(lambda: None)
    slow_daemon.down()
    slow_daemon.up()
    slow_daemon.do(lambda: slow_daemon.box.go(3))
    waiting.join(10)
    shown = capsys.readouterr()
    assert (ended, "switch done" in shown.out) == ([0], True)
    assert "waiting for it to come back" in shown.err
    assert len(slow_daemon.box.calls) == 1


def test_events_are_printed_until_the_reader_leaves(daemon: Daemon) -> None:
    with start("events") as process:
        while not daemon.box.subscribers:
            daemon.do(lambda: None)
        daemon.do(lambda: daemon.box.tell("chat fell asleep"))
        assert process.stdout
        assert "chat fell asleep" in process.stdout.readline()
        process.stdout.close()
        while process.poll() is None:
            daemon.do(lambda: daemon.box.tell("more"))
        assert process.wait() == 141
        process.stdout = None


def test_on_a_terminal_progress_redraws_one_line(slow_daemon: Daemon) -> None:
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": "60", "TERM": "xterm"}
    process = subprocess.Popen(
        [*COMMAND, "switch", "coder"], cwd=ROOT, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    shown = b""
    while b"drain coder" not in shown:
        shown += os.read(leader, 4096)
    slow_daemon.do(lambda: slow_daemon.box.go(3))
    assert process.wait(10) == 0
    while b"switch done" not in shown:
        shown += os.read(leader, 4096)
    os.close(leader)
    assert b"\r\x1b[K" in shown
    lines = [part.split(b"\x1b[K")[-1] for part in shown.replace(b"\r\n", b"\n").split(b"\n")]
    assert all(len(line.decode().replace("\x1b[0m", "").replace("\x1b[32m", "")) < 60
               for line in lines)  # fmt: skip


# No daemon


def test_a_mistyped_socket_is_named_in_the_hint(socket_path: str, capsys: Output) -> None:
    assert main(["status"]) == 3
    shown = capsys.readouterr().err
    assert f'cannot reach homegptd at "{socket_path}": there is no socket' in shown
    assert f"is {socket_path} the right path? HOMEGPT_SOCKET names it" in shown
    assert main(["status", "--socket", "/no/where"]) == 3
    assert "is /no/where the right path? --socket names it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "hint"), [(True, "sudo systemctl start homegpt;"), (False, "make run")]
)
def test_without_a_daemon_the_hint_is_what_starts_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, hint: str
) -> None:
    if installed:
        (tmp_path / "homegpt.service").touch()
    monkeypatch.setattr(absent, "_UNITS", (str(tmp_path),))
    monkeypatch.setattr(paths, "SYSTEM_SOCKET", str(tmp_path / "control.sock"))
    stop = absent.why(paths.SYSTEM_SOCKET, FileNotFoundError(2, "No such file"))
    assert hint in (stop.hint or "")


def test_problems_of_a_reload_are_told_line_by_line(daemon: Daemon, capsys: Output) -> None:
    text = "c.yaml:1: models: empty\nc.yaml:2: \x1b[2Jx: unknown key"
    daemon.box.fail_with = {"message": text, "hint": None, "reason": "bad-config"}
    assert main(["reload"]) == 78
    shown = capsys.readouterr().err
    assert "homegptctl: c.yaml:1: models: empty\nc.yaml:2: ?[2Jx: unknown key\n" in shown


def test_a_stale_socket_is_called_stale(socket_path: str, capsys: Output) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(socket_path)
    assert main(["switch", "coder"]) == 3
    assert "stale" in capsys.readouterr().err


def test_without_permission_it_names_the_group(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.touch()
    os.chown(path, -1, os.getgid())
    stop = absent.why(str(path), PermissionError(13, "Permission denied"))
    assert "you may not use the socket" in stop.message
    assert stop.hint
    assert "usermod -aG" in stop.hint or "sudo" in stop.hint


def test_a_path_that_is_too_long_is_an_error_in_words(capsys: Output) -> None:
    assert main(["--socket", "/x" * 100, "status"]) == 3
    assert "too long" in capsys.readouterr().err


def test_a_daemon_that_hangs_is_given_up(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(socket_path)
        hung.listen()
        with (
            client.Client(socket_path, limit_s=0.05) as asking,
            pytest.raises(Stop, match="does not answer"),
        ):
            asking.call("status")


@pytest.mark.parametrize(
    ("said", "words"), [(b"HTTP/1.1 400\r\n", "does not speak JSON"), (b"", "without an answer")]
)
def test_something_else_at_the_socket_is_found_out(
    socket_path: str, said: bytes, words: str
) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(socket_path)
        other.listen()

        def answer() -> None:
            with other.accept()[0] as peer:
                peer.recv(100)
                peer.sendall(said)

        answering = threading.Thread(target=answer)
        answering.start()
        with client.Client(socket_path) as asking, pytest.raises(Stop, match=words) as caught:
            asking.call("status")
        answering.join()
    assert caught.value.code == 3


def test_with_two_daemons_it_says_which_one_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    own = tmp_path / "homegpt" / "control.sock"
    own.parent.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    asked = Asked()
    asked.socket = paths.SYSTEM_SOCKET
    tell_which(asked)
    assert not capsys.readouterr().err
    own.touch()
    tell_which(asked)
    assert f"for your own: --socket {own}" in capsys.readouterr().err
    asked.chosen = True
    tell_which(asked)
    assert not capsys.readouterr().err


# Files, help


def test_a_bad_configuration_ends_with_78_and_every_problem(tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("modles: []\n")
    assert main(["config", "check", str(file)]) == 78
    assert f"{file}:1: " in capsys.readouterr().err
    assert main(["config", "check", str(file), "--json"]) == 78
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["problems"][0]["line"]) == (False, 1)


def test_a_configuration_that_cannot_be_read_ends_with_78(tmp_path: Path, capsys: Output) -> None:
    assert main(["config", "check", str(tmp_path / "none.yaml")]) == 78
    assert "cannot read" in capsys.readouterr().err


def test_help_names_every_verb_and_every_exit_code(capsys: Output) -> None:
    for words in ([], ["help"], ["--help"], ["-h"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb}" in shown for verb in VERBS)
        for code in ("0", "1", "2", "3", "4", "5", "78", "130", "141"):
            assert f"{code} " in shown.split("exit codes:")[1]
        assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(capsys: Output, verb: str) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: homegptctl {verb}" in shown
    assert max(map(len, shown.partition("\n")[2].splitlines())) <= 100


def test_values_are_spelled_as_in_the_manual(capsys: Output) -> None:
    for verb, words in (("logs", "[-n N]"), ("sleep", "[--level N]"), ("add", "[--gpu LIST]")):
        assert main(["help", verb]) == 0
        assert words in capsys.readouterr().out


def test_the_version_needs_no_daemon(capsys: Output) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


# Speed


@pytest.mark.usefixtures("daemon")
def test_status_imports_nothing_that_costs_time() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from homegptd.ctl.__main__ import main;"
        "code = main(['status']); print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-ISc", code], capture_output=True, text=True, check=True
    )
    assert "awake" in done.stdout
    costly = {"re", "enum", "typing", "json", "socket", "argparse", "dataclasses", "asyncio",
              "collections", "functools", "pathlib", "importlib", "logging"}  # fmt: skip
    assert not costly & set(done.stderr.split())


def test_the_exit_codes_of_the_client_are_those_of_the_table() -> None:
    assert absent.ABSENT == codes.ABSENT
    assert codes.TABLE["does-not-fit"].exit == plan.DOES_NOT_FIT
    assert config.CONFIG == codes.CONFIG
    assert acts.INTERRUPTED == codes.INTERRUPTED
