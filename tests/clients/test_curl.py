"""curl, as in the README and in everybody's scripts."""

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .asking import awake, frames, nothing_runs, says
from .conftest import Served


def curl(served: Served, path: str, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "120", *words, served.box.url + path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout


def chat(model: str, **more: Any) -> list[str]:
    messages = [{"role": "user", "content": "Tell me something."}]
    body = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0} | more
    return ["--header", "Content-Type: application/json", "--data", json.dumps(body)]


@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
def test_a_whole_answer_and_a_stream(served: Served, version: str) -> None:
    for model in served.models[:2]:
        whole = json.loads(curl(served, "/v1/chat/completions", version, *chat(model)))
        text = whole["choices"][0]["message"]["content"]
        assert says(served, model, text)
        heard = frames(
            curl(served, "/v1/chat/completions", version, "-N", *chat(model, stream=True))
        )
        assert heard[-1] == "[DONE]"
        chunks = [choice for frame in heard[:-1] for choice in frame["choices"]]
        assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == text


def test_a_big_body_that_asks_first(served: Served, tmp_path: Path) -> None:
    """Over 1 MB curl sends `Expect: 100-continue` and waits a second for the answer to that."""
    body = {"model": "a", "messages": [{"role": "user", "content": "word " * 500_000}]}
    file = tmp_path / "body.json"
    file.write_text(json.dumps(body | {"max_tokens": 8}))
    sent = ["--header", "Content-Type: application/json", "--data-binary", f"@{file}"]
    told = json.loads(curl(served, "/v1/chat/completions", "--expect100-timeout", "60", *sent))
    assert "context length" in told["error"]["message"] or "long" in told["error"]["message"]


def test_errors_fail_the_script(served: Served) -> None:
    curl(served, "/v1/chat/completions", "--fail", *chat("nobody"), code=22)
    curl(served, "/sleep", "--fail", "--request", "POST", code=22)


async def test_ctrl_c_ends_it_in_the_engine(served: Served) -> None:
    await awake(served, "a")
    process = await asyncio.create_subprocess_exec(
        "curl", "-sN", *chat("a", stream=True, max_tokens=1900),
        f"{served.v1}/chat/completions", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert await process.stdout.readline()
    process.terminate()
    await process.wait()
    await nothing_runs(served, "a")
