"""A full disk, a daemon that hangs, and who may come in over the network."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from .appliance import CODER, WRITER, Appliance, beside, until
from .client import answer, client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@contextmanager
def _small(box: Appliance, folder: str, owner: str) -> Iterator[None]:
    """A disk of 1 MiB there."""
    words = ("mount", "-t", "tmpfs", "-o", f"size=1m,mode=0750,uid={owner},gid={owner}", "tmpfs")
    box.machine.run(*words, folder)
    try:
        yield
    finally:
        box.machine.run("umount", "--lazy", folder)


def _fill(box: Appliance, folder: str) -> None:
    box.machine.run("sh", "-c", f"cat /dev/zero > {folder}/zeros", check=False)
    assert not os.statvfs(box.machine.path(folder)).f_bavail


async def test_a_full_disk_costs_memory_of_the_past_and_no_service(appliance: Appliance) -> None:
    uid = appliance.machine.run("id", "-u", "homegpt").out.strip()
    with _small(appliance, "/var/lib/homegpt", uid):
        appliance.start()
        _fill(appliance, "/var/lib/homegpt")
        pids = appliance.main_pids("coder", "writer")
        async with client(appliance) as session:
            assert await answer(session, "writer")
            await beside(appliance.systemctl, "restart", "homegpt")
            assert await answer(session, "coder")
        assert appliance.main_pids("coder", "writer") == pids
        appliance.systemctl("stop", "homegpt")
        appliance.start()  # from nothing, on a full disk
        assert appliance.phases() == {"coder": "awake", "writer": "asleep"}
        appliance.systemctl("stop", "homegpt")


async def test_an_engine_without_room_for_its_cache_comes_once_there_is(
    appliance: Appliance,
) -> None:
    with _small(appliance, "/var/cache/homegpt/engines", "0"):
        # a folder costs tmpfs nothing, so what is full here is the number of files
        remount = "mount -o remount,nr_inodes=2 /var/cache/homegpt/engines"
        appliance.machine.run("sh", "-c", f"mkdir /var/cache/homegpt/engines/x; {remount}")
        appliance.configure(CODER, WRITER)
        appliance.start()  # READY all the same: a box without models is one to look at
        broken = appliance.model("coder")
        assert broken["status"] == "error"
        assert "No space left on device" in broken["error"]["message"]
        appliance.machine.run("mount", "-o", "remount,nr_inodes=1000", "/var/cache/homegpt/engines")
        await until(lambda: beside(_coder_is_up, appliance), 40)
        async with client(appliance) as session:
            assert await answer(session, "coder")
        appliance.systemctl("stop", "homegpt")


def _coder_is_up(box: Appliance) -> bool:
    return box.model("coder")["phase"] == "awake"


async def test_a_daemon_that_hangs_is_replaced_and_no_engine_with_it(appliance: Appliance) -> None:
    appliance.machine.write(
        "/etc/systemd/system/homegpt.service.d/90-brief.conf", "[Service]\nWatchdogSec=2\n"
    )
    appliance.machine.systemctl("daemon-reload")
    appliance.start()
    before = appliance.main_pids("coder", "writer")
    os.kill(appliance.daemon_pid(), signal.SIGSTOP)
    async with client(appliance) as session:
        assert await answer(session, "coder")  # it waited for the next one
    assert appliance.show("homegpt", "NRestarts") == "1"
    assert appliance.main_pids("coder", "writer") == before
    assert appliance.phases() == {"coder": "awake", "writer": "asleep"}


def test_the_sandbox_lets_in_neighbours_and_sees_the_boxs_pressure(appliance: Appliance) -> None:
    appliance.configure(CODER, head="http: {listen: '0.0.0.0:9000'}\n")
    appliance.start()
    with _address("192.168.77.1"), urlopen("http://192.168.77.1:9000/v1/models", timeout=5) as told:
        assert b"coder" in told.read()
    with _address("203.0.113.7"), pytest.raises(OSError, match="timed out"):  # of the internet
        urlopen("http://203.0.113.7:9000/v1/models", timeout=1)
    seen = Path(f"/proc/{appliance.daemon_pid()}/root/proc")
    assert "some avg10" in (seen / "pressure/memory").read_text()
    assert "MemTotal" in (seen / "meminfo").read_text()


@contextmanager
def _address(text: str) -> Iterator[None]:
    """One more address of the box."""
    subprocess.run(["ip", "addr", "add", f"{text}/32", "dev", "lo"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "addr", "del", f"{text}/32", "dev", "lo"], check=True)
