"""`sudo make install` on a box, and `sudo make uninstall`, which leaves nothing but the weights."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .appliance import CODER, CONFIG, WRITER, configuration
from .lab import roots
from .lab.images import IMAGE, load_engine
from .lab.machine import SOURCE, Machine, booted

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]
BUILDER = roots.Layer(
    "builder", ("make", "python3-pip", "catatonit"), under=roots.BASE
)  # what README asks for
CA = Path("/etc/ssl/certs/ca-certificates.crt")
_NOT_OURS = r"/var/lib/containers|/var/lib/(apt|dpkg|systemd|private)|/var/log|/var/tmp|/tmp"
_NOT_OURS += r"|/var/cache/homegpt|/root|.*__pycache__|/run/(systemd|log|user|lock|udev|podman)"
_NOT_OURS += r"|/run/(netns|libpod|containers|crun|nft|polkit|credentials)|/etc/(passwd|group)-"
_NOT_OURS += r"|/etc/g?shadow-|/etc/containers/(systemd|networks)|/run/runc|/run/lab-.*"


@pytest.fixture
def machine() -> Iterator[Machine]:
    if why := roots.why_not():
        if os.environ.get("HOMEGPT_REQUIRE_LAB") == "1":
            pytest.fail(f"HOMEGPT_REQUIRE_LAB=1, but the lab {why}")
        pytest.skip(why)
    with booted(BUILDER) as machine:
        load_engine(machine)
        yield machine


def _files(machine: Machine) -> set[str]:
    found = machine.run("find", "/etc", "/usr", "/var", "/opt", "/run", "-xdev").out.split("\n")
    found += machine.run("find", "/run", "-xdev").out.split("\n")
    return {name for name in found if name and not re.fullmatch(f"({_NOT_OURS})(/.*)?", name)}


def test_from_the_sources_and_off_again(machine: Machine) -> None:
    before = _files(machine)
    machine.put(CA, "/root/ca.crt")
    make = ("make", "-C", SOURCE)
    told = machine.run(*make, "install", online=True, env={"PIP_CERT": "/root/ca.crt"}).out
    assert "next: homegptctl doctor" in told
    assert {"/usr/local/bin/homegptd", "/usr/local/bin/homegptctl"} <= _files(machine) - before
    assert machine.systemctl("is-enabled", "homegpt", check=False).strip() == "enabled"
    machine.write(CONFIG, configuration(CODER, WRITER))
    machine.run(*make, "install", online=True, env={"PIP_CERT": "/root/ca.crt"})  # once more
    assert machine.read(CONFIG) == configuration(CODER, WRITER)
    machine.write("/var/cache/homegpt/hf/hub/weights", "hours of download")
    env = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    machine.systemctl("start", "homegpt")
    status = json.loads(machine.run("homegptctl", "--json", "status", env=env).out)
    assert [model["phase"] for model in status["models"]] == ["awake", "asleep"]

    told = machine.run(*make, "uninstall").out
    assert "kept: /var/cache/homegpt/hf" in told
    assert machine.read("/var/cache/homegpt/hf/hub/weights")
    assert _files(machine) - before == set()
    assert machine.run("podman", "ps", "-aq").out == ""
    assert IMAGE not in machine.run("podman", "images", "--format={{.Repository}}:{{.Tag}}").out
    words = ("systemctl", "list-units", "--all", "--no-legend", "homegpt*", "vllm-*")
    assert machine.run(*words).out == ""
    assert "homegpt" not in machine.read("/etc/passwd")
