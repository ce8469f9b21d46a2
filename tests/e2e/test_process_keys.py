"""API keys of the daemon as a process: read at the start, changed by a reload, never by mistake."""

import json
import signal
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from homegptd.host.keys import Wish, add, remove

from .harness import Box, SimModel

pytestmark = pytest.mark.e2e


def ask(box: Box, path: str, key: str | None = None, body: object = None) -> tuple[int, Any]:
    door = HTTPConnection("127.0.0.1", box.port, timeout=15)
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    sent = None if body is None else json.dumps(body)
    door.request("GET" if body is None else "POST", path, sent, headers)
    reply = door.getresponse()
    said = json.loads(reply.read())
    door.close()
    return reply.status, said


def chat(box: Box, model: str, key: str | None) -> int:
    body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
    return ask(box, "/v1/chat/completions", key, body)[0]


def test_keys_are_asked_for_and_engines_get_their_own(box: Box, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    mine, boss = add(file, Wish("mine", ("b",))), add(file, Wish("boss", manage=True))
    head = f"http: {{keys: '{file}'}}\nengine: {{env: {{VLLM_API_KEY: engines-own}}}}\n"
    box.write(SimModel("a", "active"), SimModel("b"), head=head)
    with box.daemon() as daemon:
        daemon.ready()  # the canary sang, with the engine's key
        assert [chat(box, "b", key) for key in (None, "hg-wrong", mine)] == [401, 401, 200]
        assert chat(box, "a", mine) == 404
        assert ask(box, "/switch", mine, {"model_id": "b"})[0] == 403
        assert ask(box, "/switch", boss, {"model_id": "a"})[0] == 200
        assert [entry["id"] for entry in ask(box, "/v1/models", mine)[1]["data"]] == ["b"]

        remove(file, "mine")
        new = add(file, Wish("new"))
        assert box.ctl("reload").returncode == 0
        assert [chat(box, "a", key) for key in (mine, new)] == [401, 200]

        file.write_text("keys: [{name: x}]\n")  # a bad file changes nothing
        refused = box.ctl("reload")
        assert refused.returncode == 78
        assert f"{file}:1: keys[0].sha256: missing" in refused.stderr
        assert chat(box, "a", new) == 200

        file.write_text("keys: []\n")
        daemon.process.send_signal(signal.SIGHUP)
        for _ in range(3):  # each of the reloads has said so; nobody has listened to the first two
            daemon.wait_for(lambda message: "READY=1" in message, "READY=1 after the reload")
        assert chat(box, "a", new) == 401
        log = box.log()
        assert not [key for key in (mine, boss, new, "engines-own") if key in log]


def test_a_daemon_without_its_keys_does_not_start(box: Box, tmp_path: Path) -> None:
    box.write(SimModel("a", "active"), head=f"http: {{keys: '{tmp_path}/none.yaml'}}\n")
    done = box.run()
    assert done.returncode == 78
    assert "none.yaml: cannot be read" in done.stderr


def test_keys_come_as_a_credential_too(box: Box, tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    key = add(folder / "api-keys", Wish("mine"))
    box.write(SimModel("a", "active"))
    with box.daemon(env={"CREDENTIALS_DIRECTORY": str(folder)}) as daemon:
        daemon.ready()
        assert [chat(box, "a", shown) for shown in (None, key)] == [401, 200]
