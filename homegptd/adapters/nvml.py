"""The cards as NVIDIA's driver tells them, through `nvidia-ml-py` (the extra `gpu`).

Calls run in a thread of their own: one takes well under a millisecond, but a driver in trouble can
keep it for minutes. Then no other is made, and nothing is known until it returns.

https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
"""

import asyncio
import importlib
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from homegptd.core.memory import Card, Gpu

from .meter import Reading, User

log = logging.getLogger(__name__)

RETRY_S = 30.0
"""After the driver could not be reached; it may be loaded later than we are."""
LIMIT_S = 2.0
"""How long one look may take."""
_MIB = 1 << 20


class Nvml:
    """Fits `CardSource`."""

    def __init__(self, *, library: str = "pynvml") -> None:
        self._library = library
        self._nvml: Any = None
        self._retry_at = 0.0
        self._told = ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nvml")
        self._last: Future[Reading] | None = None

    async def read(self) -> Reading | None:
        """None where there is no driver, or it does not answer; said once in the log."""
        if self._nvml is None and time.monotonic() < self._retry_at:
            return None
        if self._last is not None and not self._last.done():
            return None
        self._last = self._thread.submit(self._read)
        try:
            async with asyncio.timeout(LIMIT_S):
                reading = await asyncio.wrap_future(self._last)
        except TimeoutError:
            self._tell(f"the driver did not answer in {LIMIT_S:g} s")
        except ImportError:
            self._tell("nvidia-ml-py is not installed (the extra `gpu` of homegptd)")
        except Exception as error:  # noqa: BLE001 - the library's own class is known once loaded
            self._nvml = None
            self._tell(f"no driver: {error}")
        else:
            if self._told:
                log.info("GPU memory is measured again")
                self._told = ""
            return reading
        return None

    def _tell(self, why: str) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        if why != self._told:
            log.info("GPU memory is not measured: %s; configured figures count", why)
            self._told = why

    def _read(self) -> Reading:
        if self._nvml is None:
            nvml = importlib.import_module(self._library)
            nvml.nvmlInit()
            self._nvml = nvml
        nvml = self._nvml
        cards: dict[Gpu, Card] = {}
        users: list[User] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            gpu, handle = Gpu(index), nvml.nvmlDeviceGetHandleByIndex(index)
            try:
                memory = _memory(nvml, handle)
            except nvml.NVMLError:  # unified memory (GB10): the card has none of its own
                continue
            cards[gpu] = Card(str(nvml.nvmlDeviceGetName(handle)), *memory)
            users += _users(nvml, handle, gpu)
        return Reading(cards, tuple(users))


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """What programs can have, and what they have. The driver's own share is neither (v2)."""
    try:
        told = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError, AttributeError, TypeError):  # driver or library before 510
        told = nvml.nvmlDeviceGetMemoryInfo(handle)
    used = told.used // _MIB
    return used + told.free // _MIB, used


def _users(nvml: Any, handle: Any, gpu: Gpu) -> list[User]:
    """A program that computes and draws is in both lists, with the same figure."""
    held: dict[int, int | None] = {}
    for ask in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        try:
            for process in ask(handle):
                held[int(process.pid)] = process.usedGpuMemory
        except nvml.NVMLError:
            continue
    return [User(pid, gpu, None if used is None else used // _MIB) for pid, used in held.items()]
