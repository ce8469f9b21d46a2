"""Each transcript is still what happens. `REWRITE=1 pytest tests/scenarios` rewrites them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.harness import Story

HERE = Path(__file__).parent
SETUP = {"box", "model", "policy", "forget"}
"""Commands that only say how things are: nothing happens yet."""
FILES = sorted(HERE.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_transcript_is_what_happens(path: Path) -> None:
    told = path.read_text()
    happened = "\n".join(replay(told)) + "\n"
    if os.environ.get("REWRITE"):
        path.write_text(happened)
    assert happened == told or os.environ.get("REWRITE")


def replay(told: str) -> Iterator[str]:
    """The transcript again, with what happens in place of what was written."""
    story, command, result = Story(), "", False
    for line in told.rstrip("\n").split("\n"):
        if line.startswith("#") or not line:
            result = False
            yield line
        elif line == "----":
            result = True
            yield line
            yield story.run(command)
        elif not result:
            command = line
            yield line
            if line.split()[0] in SETUP:
                story.run(line)


def test_there_are_transcripts() -> None:
    assert len(FILES) >= 12
