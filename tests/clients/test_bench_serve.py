"""vLLM's own load generator against the box, with a real vLLM behind it."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from .asking import awake, nothing_runs
from .conftest import REAL, Served

pytestmark = [
    pytest.mark.parametrize("served", [REAL], indirect=True),
    pytest.mark.skipif(
        not os.environ.get("HOMEGPT_REAL_VLLM"), reason="HOMEGPT_REAL_VLLM names no Python"
    ),
]
_MAIN = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""  # the `vllm` command of the CPU build does not start


@pytest.mark.parametrize(
    ("backend", "path"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
)
async def test_every_request_of_the_bench_is_answered(
    served: Served, tmp_path: Path, backend: str, path: str
) -> None:
    """On a model that sleeps when it begins: the wake is part of the first answers' time."""
    await awake(served, "a")
    process = await asyncio.create_subprocess_exec(
        os.environ["HOMEGPT_REAL_VLLM"], "-c", _MAIN, "--backend", backend,
        "--base-url", served.box.url, "--endpoint", path,
        "--model", os.environ["HOMEGPT_REAL_MODEL"], "--served-model-name", "b",
        "--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16",
        "--num-prompts", "12", "--max-concurrency", "4", "--ignore-eos",
        "--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said[-3000:].decode()
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_output_tokens"] == 12 * 16
    await nothing_runs(served, "b")
