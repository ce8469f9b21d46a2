"""Names of models that are not there for a client are taken out of whatever it is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

from homegptd.config.keys import Key, digest
from homegptd.core.model import Asleep, ModelId, SleepLevel
from homegptd.faces import sight
from homegptd.faces.clients import Keyring
from homegptd.faces.guard import Guard

from . import box

SECRET = "hg-the-secret-of-somebody"


def test_names_are_taken_out_whole() -> None:
    told = {"a": ["qwen3-30b makes room for qwen3; qwen3.", 3, None], "model": "qwen3"}
    assert sight.without(told, ["qwen3"]) == {
        "a": ["qwen3-30b makes room for another model; another model.", 3, None],
        "model": "another model",
    }
    assert sight.without(told, []) is told
    assert sight.without("qwen3.5 and qwen3-30b", ["qwen3", "qwen3.5"]) == (
        "another model and qwen3-30b"
    )


async def test_a_limited_key_s_models_and_operations_name_no_other(tmp_path: Path) -> None:
    asleep = Asleep(SleepLevel.ONE, asyncio.get_running_loop().time())
    chat = Key("somebody", digest(SECRET), models=frozenset({ModelId("chat")}), manage=True)
    more = f"Authorization: Bearer {SECRET}\r\n"
    two = {"chat": tmp_path / "chat", "coder": tmp_path / "coder"}
    guard = Guard(keys=Keyring([chat]))
    async with box.running(two, guard=guard, phases={"chat": asleep}, awake_mib=900_000) as b:
        client = await b.connect()
        client.send("/switch", {"model_id": "chat"}, more=more)
        await b.until(lambda: not isinstance(b.phase("coder"), box.core.Awake))
        waiting = await b.ask("/operations/1", method="GET", more=more)
        listed = await b.ask("/models", method="GET", more=more)
    assert [(each["do"], each["model"]) for each in waiting.json["steps"]] == [
        ("sleep", sight.OTHER), ("wake", "chat"),
    ]  # fmt: skip
    assert b"coder" not in waiting.body + listed.body
