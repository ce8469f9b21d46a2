"""The meter on a driver that is played, on a simulated card, and on this kernel."""

import asyncio
import logging
import os
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from homegptd.adapters import host_memory, nvml
from homegptd.adapters.card_file import CardFile
from homegptd.adapters.meter import Meter
from homegptd.adapters.nvml import Nvml
from homegptd.core.memory import HOST, Gpu
from homegptd.core.model import ModelId
from homegptd.core.refusals import Fault
from homegptd.sim.card import create, new_box, owner_id

A, G0, G1 = ModelId("a"), Gpu(0), Gpu(1)
MIB = 1 << 20


class Units:
    """Fits Belongings."""

    def __init__(self, *pids: int, host_mib: int | None = 5000, lost: bool = False) -> None:
        self._pids, self._host_mib, self._lost = frozenset(pids), host_mib, lost

    async def pids(self, model: ModelId) -> frozenset[int]:
        if self._lost:
            raise Fault("systemd does not answer")
        return self._pids

    async def host_mib(self, model: ModelId) -> int | None:
        if self._lost:
            raise Fault("systemd does not answer")
        return self._host_mib


# ---------------------------------------------------------------- NVML


class Driver(types.ModuleType):
    """What Nvml uses of pynvml, with two cards."""

    NVMLError = type("NVMLError", (Exception,), {})
    nvmlMemory_v2 = 2  # noqa: N815

    def __init__(self) -> None:
        super().__init__("played_nvml")
        self.loaded = True
        self.inits = 0
        self.stuck: threading.Event | None = None
        self.names_processes = True

    def nvmlInit(self) -> None:  # noqa: N802
        self.inits += 1
        if not self.loaded:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if self.stuck is not None:
            self.stuck.wait(20)
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return f"Card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> SimpleNamespace:  # noqa: N802
        if handle == 2:
            raise self.NVMLError("Not Supported")  # unified memory
        return SimpleNamespace(total=24_576 * MIB, used=20_000 * MIB, free=4_000 * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        told = {11: 17_000, 12: 500, 900: 1_500} if handle == 0 else {11: 16_000}
        known = self.names_processes
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=mib * MIB if known else None)
            for pid, mib in told.items()
        ]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return [SimpleNamespace(pid=900, usedGpuMemory=1_500 * MIB)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    played = Driver()
    monkeypatch.setitem(sys.modules, "played_nvml", played)
    yield played
    if played.stuck is not None:
        played.stuck.set()


async def test_each_card_and_each_process_on_it(driver: Driver) -> None:
    meter = Meter(Nvml(library="played_nvml"), Units(11, 12), lambda: [A])
    seen, held = await meter.seen(), await meter.held(A)
    assert seen
    assert held
    assert seen.cards[G0].total_mib == 24_000  # without what the driver keeps for itself
    assert seen.free_mib[G0] == 4_000
    assert set(seen.cards) == {G0, G1}
    assert seen.strangers == {G0: "a process (pid 900) 1.5 GB"}  # once, though in both lists
    assert held.gpu_mib == {G0: 17_500, G1: 16_000}
    assert held.host_mib == 5000
    assert held.free_mib[G1] == 4_000
    assert held.free_mib[HOST] > 0


async def test_a_driver_that_names_no_amounts(driver: Driver) -> None:
    driver.names_processes = False
    meter = Meter(Nvml(library="played_nvml"), Units(11), lambda: [A])
    held = await meter.held(A)
    assert held
    assert held.gpu_mib == {}
    assert held.free_mib[G0] == 4_000


async def test_no_driver_is_said_once_and_tried_again_later(
    driver: Driver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    driver.loaded = False
    source = Nvml(library="played_nvml")
    assert [await source.read() for _ in range(5)] == [None] * 5
    assert driver.inits == 1
    monkeypatch.setattr(nvml, "RETRY_S", 0.0)
    source = Nvml(library="played_nvml")
    await source.read()
    await source.read()
    assert [r.message for r in caplog.records] == [
        "GPU memory is not measured: no driver: Driver Not Loaded; configured figures count"
    ] * 2  # once for each of the two
    driver.loaded = True
    assert await source.read() is not None
    assert caplog.records[-1].message == "GPU memory is measured again"


async def test_without_the_library_nothing_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    meter = Meter(Nvml(library="no_such_module"), Units(1), lambda: [A])
    assert (await meter.seen(), await meter.held(A)) == (None, None)
    assert "nvidia-ml-py is not installed" in caplog.text


async def test_a_driver_that_hangs_is_asked_no_more_until_it_answers(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "LIMIT_S", 0.05)
    monkeypatch.setattr(nvml, "RETRY_S", 0.0)
    driver.stuck = threading.Event()
    source = Nvml(library="played_nvml")
    assert await source.read() is None
    assert await source.read() is None
    assert driver.inits == 1  # the second was not even begun
    driver.stuck.set()
    async with asyncio.timeout(5):
        while await source.read() is None:  # noqa: ASYNC110 - its thread comes back when it does
            await asyncio.sleep(0.01)


async def test_a_backend_that_does_not_answer_hides_no_card(driver: Driver) -> None:
    meter = Meter(Nvml(library="played_nvml"), Units(lost=True), lambda: [A])
    held = await meter.held(A)
    assert held
    assert (held.gpu_mib, held.host_mib, held.free_mib[G0]) == ({}, None, 4_000)


# ---------------------------------------------------------------- a simulated card


async def test_a_card_file_is_read_as_a_driver_would_be(tmp_path: Path) -> None:
    card = create(tmp_path / "card.json", new_box(gpus=2, gpu_gb=80, ram_gb=100))
    with card.locked() as box:
        owner = owner_id()
        box.take(owner, 0, 5000)
        box.pin(owner, 3000)
        box.take_host(owner, 1000)
        box.take("foreign:game", 1, 700)
    meter = Meter(CardFile(card.path), Units(os.getpid()), lambda: [A])
    held, seen = await meter.held(A), await meter.seen()
    assert held
    assert seen
    assert (held.gpu_mib, held.host_mib) == ({G0: 5000}, 4000)
    assert seen.strangers == {G1: "game 0.7 GB"}
    assert seen.free_mib == {G0: 80 * 1024 - 5000, G1: 80 * 1024 - 700, HOST: 100 * 1024 - 4000}


async def test_who_is_gone_holds_nothing(tmp_path: Path) -> None:
    card = create(tmp_path / "card.json", new_box())
    with card.locked() as box:
        box.take("4194305:1:0", 0, 5000)  # above the greatest pid there can be
    reading = await CardFile(card.path).read()
    assert reading
    assert reading.cards[G0].used_mib == 0


async def test_a_card_that_is_lost_is_as_no_driver(tmp_path: Path) -> None:
    assert await CardFile(tmp_path / "none").read() is None
    (tmp_path / "broken").write_text("{")
    assert await CardFile(tmp_path / "broken").read() is None


# ---------------------------------------------------------------- the kernel


def test_memory_of_a_process_is_its_own(tmp_path: Path) -> None:
    before = host_memory.of_processes([os.getpid()])
    block = bytearray(os.urandom(1 << 20) * 64)
    after = host_memory.of_processes([os.getpid()])
    assert before
    assert after
    assert 50 <= after - before <= 80
    assert len(block) == 64 << 20
    assert host_memory.of_processes([4194305]) is None


def test_a_control_group_is_charged_without_page_cache(tmp_path: Path) -> None:
    (tmp_path / "unit").mkdir()
    stat = "anon 1073741824\nfile 9999999999\nkernel 104857600\nshmem 2147483648\nsock 0\n"
    (tmp_path / "unit" / "memory.stat").write_text(stat)
    assert host_memory.of_cgroup("/unit", tmp_path) == 3172
    assert host_memory.of_cgroup("/gone", tmp_path) is None


def test_what_is_available_and_the_pressure(tmp_path: Path) -> None:
    assert host_memory.available_mib() or 0 > 0
    psi = tmp_path / "memory"
    psi.write_text("some avg10=12.50 avg60=1.00 avg300=0 total=5\nfull avg10=3.00 avg60=0\n")
    assert host_memory.pressure(psi) == 12.5
    assert host_memory.pressure(tmp_path / "none") == 0.0
    assert host_memory.available_mib(tmp_path / "none") is None
