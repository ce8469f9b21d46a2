"""Completion scripts: good shell, and the right words at the right place."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from homegptd.ctl.__main__ import main
from homegptd.ctl.completion import SCRIPTS, quoted, quoted_for_fish
from homegptd.ctl.verbs import VERBS

from .conftest import Daemon

ROOT = Path(__file__).parents[2]
Output = pytest.CaptureFixture[str]
NASTY = 'it\'s a \\ "$x" `y`'

BASH = """\
source <(homegptctl completion bash)
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_homegptctl; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
# the widgets of zsh exist only while a line is edited; what they are given is what counts
ZSH = """\
compdef() {{ }}
_describe() {{ print -l ${{(P)2%%:*}} }}
_files() {{ print -l -- *(N) }}
compadd() {{
  [[ $1 == -- ]] && shift
  if [[ $1 == -a ]]; then print -l -- ${{(P)2}}; else print -l -- "$@"; fi
}}
source <(homegptctl completion zsh)
words=({words}) CURRENT=$#words PREFIX=$words[-1]
_homegptctl | grep -e "^$PREFIX"
"""
FISH = """\
homegptctl completion fish | source
complete -C {line} | string replace -r '\\t.*' ''
"""


@pytest.mark.parametrize("shell", SCRIPTS)
def test_completion_scripts_are_good_shell(capsys: Output, tmp_path: Path, shell: str) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert all(verb in script.read_text() for verb in VERBS)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(script)], check=True)


def test_words_are_quoted_as_each_shell_wants() -> None:
    assert shlex.split(quoted(NASTY)) == [NASTY]
    assert quoted_for_fish("it's \\") == r"'it\'s \\'"


def test_the_lines_of_help_survive_in_zsh_and_fish() -> None:
    block = SCRIPTS["zsh"]().split("  verbs=(\n")[1].split("\n  )")[0]
    assert shlex.split(block) == [
        f"{verb}:{row[3].replace(':', chr(92) + ':')}" for verb, row in VERBS.items()
    ]
    fish = SCRIPTS["fish"]()
    assert all(f"-d {quoted_for_fish(row[3])}" in fish for row in VERBS.values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one file, and homegptctl on the PATH."""
    command = tmp_path / "bin" / "homegptctl"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m homegptd.ctl "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    (work / "a b.yaml").touch()
    monkeypatch.chdir(work)
    return work


LINES: list[tuple[str, list[str]]] = [
    ("sw", ["switch"]),
    ("switch co", ["coder", "code"]),
    ("switch --n", ["--no-wait", "--now"]),
    ("completion z", ["zsh"]),
    ("config ", ["check"]),
    ("config check ", ["a b.yaml"]),
    ("sleep --level 2 co", ["coder", "code"]),
    ("sleep chat --level ", ["1", "2"]),
    ("operation ", ["17"]),
    ("cancel 1", ["17"]),
    ("--json switch co", ["coder", "code"]),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("shell", SCRIPTS)
@pytest.mark.parametrize(("line", "words"), LINES)
def test_what_is_offered(slow_daemon: Daemon, shell: str, line: str, words: list[str]) -> None:
    if "operation" in line or "cancel" in line:
        assert main(["switch", "coder", "--no-wait"]) == 0
    assert offered(shell, line) == sorted(words)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("shell", SCRIPTS)
@pytest.mark.parametrize("spelling", ["--socket {}", "--socket={}"])
def test_the_models_are_those_of_the_named_socket(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, shell: str, spelling: str
) -> None:
    monkeypatch.setenv("HOMEGPT_SOCKET", "/nowhere")
    line = f"{spelling.format(daemon.path)} switch co"
    assert offered(shell, line) == ["code", "coder"]


def offered(shell: str, line: str) -> list[str]:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    words = line.split(" ")
    if shell == "bash":  # `=` is a word of its own there
        words = [part for word in words for part in word.replace("=", " = ").split(" ")]
    given = " ".join(quoted(word) for word in ["homegptctl", *words])
    text = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
    script = text.format(words=given, line=quoted_for_fish(f"homegptctl {line}"))
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=False)
    assert not done.stderr
    return sorted(done.stdout.replace("\\ ", " ").splitlines())
