"""The arithmetic of one box: GPUs, host memory, and what one vLLM engine does to them.

Pure: no clock, no I/O, nothing of homeGPT. Units are MiB and seconds; bandwidths are GiB/s.

A `Box` knows who holds how much. A `Memory` is what one engine has mapped, where its weights are,
and moves between start, sleep and wake. Each transition has two halves, because the world moves on
in between: `begin_…` takes memory, the caller lets the time of `Speeds` pass, `end_…` gives memory
back and notices what others did meanwhile. `start`, `sleep` and `wake` do both halves at once.

Where vLLM behaves oddly the oddity is kept: the start-up check is a fraction of the *total*
(v1/worker/utils.py:request_memory), profiling and the sleep assertion look at the whole device
(v1/worker/gpu_worker.py), a failed wake keeps what it mapped (vllm#34600), pinned host blocks are
rounded up to powers of two and never given back (vllm#53042, vllm#16663).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

GIB = 1024
Tag = Literal["weights", "kv_cache"]
TAGS: tuple[Tag, ...] = ("weights", "kv_cache")


class PhysicsError(Exception):
    """The box cannot do what was asked; the text is vLLM's."""


class OutOfMemory(PhysicsError):
    """A GPU has too little free memory."""


class HostOutOfMemory(PhysicsError):
    """Host memory is exhausted: the kernel kills the process that asked."""


class StartRefused(PhysicsError):
    """The start-up check or the profiling run ended the start."""


class SleepAssertion(PhysicsError):
    """The device had less free memory after a sleep than before it; the sleep itself happened."""


@dataclass(slots=True)
class Holding:
    """What one owner holds: MiB for each GPU, pinned host memory, other host memory."""

    gpu_mib: dict[int, int] = field(default_factory=dict)
    pinned_mib: int = 0
    host_mib: int = 0


@dataclass(slots=True)
class Box:
    """Several GPUs and one host memory, and who holds what. Owners are any strings."""

    gpu_total_mib: dict[int, int]
    ram_total_mib: int
    holdings: dict[str, Holding] = field(default_factory=dict)

    def used_mib(self, gpu: int) -> int:
        return sum(h.gpu_mib.get(gpu, 0) for h in self.holdings.values())

    def free_mib(self, gpu: int) -> int:
        return self.gpu_total_mib[gpu] - self.used_mib(gpu)

    def held_mib(self, owner: str, gpu: int) -> int:
        return self.holdings[owner].gpu_mib.get(gpu, 0) if owner in self.holdings else 0

    def ram_used_mib(self) -> int:
        return sum(h.pinned_mib + h.host_mib for h in self.holdings.values())

    def ram_free_mib(self) -> int:
        return self.ram_total_mib - self.ram_used_mib()

    def take(self, owner: str, gpu: int, mib: int) -> None:
        """Map `mib` on one GPU. Raises OutOfMemory, and then nothing was mapped."""
        free = self.free_mib(gpu)
        if mib > free:
            total = self.gpu_total_mib[gpu]
            raise OutOfMemory(
                f"CUDA out of memory. Tried to allocate {_gib(mib)} GiB. GPU {gpu} has a total "
                f"capacity of {_gib(total)} GiB of which {_gib(free)} GiB is free."
            )
        gpus = self._of(owner).gpu_mib
        gpus[gpu] = gpus.get(gpu, 0) + mib

    def give(self, owner: str, gpu: int, mib: int) -> None:
        """Unmap `mib` of what `owner` holds on one GPU."""
        gpus = self._of(owner).gpu_mib
        if mib > gpus.get(gpu, 0):
            raise ValueError(f"{owner} gives {mib} MiB on GPU {gpu} but holds {gpus.get(gpu, 0)}")
        gpus[gpu] -= mib

    def pin(self, owner: str, mib: int) -> None:
        """Pin host memory, for the life of the owner. Raises HostOutOfMemory."""
        self._need_ram(mib)
        self._of(owner).pinned_mib += mib

    def take_host(self, owner: str, mib: int) -> None:
        """Take pageable host memory, or give it back (negative). Raises HostOutOfMemory."""
        self._need_ram(mib)
        self._of(owner).host_mib += mib

    def drop(self, owner: str) -> None:
        """The owner's process ended: everything it held is free again."""
        self.holdings.pop(owner, None)

    def _of(self, owner: str) -> Holding:
        return self.holdings.setdefault(owner, Holding())

    def _need_ram(self, mib: int) -> None:
        free = self.ram_free_mib()
        if mib > free:
            raise HostOutOfMemory(
                f"out of host memory: {mib} MiB wanted, {free} of {self.ram_total_mib} MiB free"
            )


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one engine needs. Sums over all its GPUs; only `residue_mib` is for each GPU."""

    gpus: tuple[int, ...] = (0,)
    weights_mib: int = 16 * GIB
    kv_mib: int | None = None  # None: profiled from what the utilisation leaves
    residue_mib: int = 1229
    buffers_mib: int = 16
    rss_mib: int = 4 * GIB
    pin_block_mib: int = 384  # size of one allocation of the weights pool
    utilisation: float = 0.92
    wake_retryable: bool = True  # vLLM 0.29 and later

    @property
    def pinned_mib(self) -> int:
        """Host memory of a level-1 sleeper: blocks rounded up to powers of two (vllm#56410)."""
        whole, rest = divmod(self.weights_mib, self.pin_block_mib)
        return whole * ceil_pow2(self.pin_block_mib) + (ceil_pow2(rest) if rest else 0)

    def share_mib(self, whole_mib: int) -> int:
        """The part of `whole_mib` that lies on each GPU."""
        return math.ceil(whole_mib / len(self.gpus))


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bandwidths in GiB/s and fixed costs in seconds; each GPU has its own PCIe link."""

    load_gbps: float = 2.0
    pcie_gbps: float = 20.0
    pin_gbps: float = 2.5
    imports_s: float = 8.0
    compile_s: float = 12.0

    def load_s(self, foot: Footprint) -> float:
        """Weights from disk to GPU, without imports and compilation."""
        return foot.weights_mib / GIB / self.load_gbps

    def sleep_s(self, foot: Footprint, level: int, *, first: bool) -> float:
        """Level 1 copies the weights to the host, and the first time pins that memory."""
        if level != 1:
            return 0.1
        copy = foot.share_mib(foot.weights_mib) / GIB / self.pcie_gbps
        return 0.1 + copy + (foot.pinned_mib / GIB / self.pin_gbps if first else 0.0)

    def wake_s(self, foot: Footprint, level: int, tags: Iterable[str]) -> float:
        """Level 1 copies the weights back; level 2 and the KV cache are only mapped."""
        if level == 1 and "weights" in tags:
            return 0.15 + foot.share_mib(foot.weights_mib) / GIB / self.pcie_gbps
        return 0.1

    def reload_s(self, foot: Footprint) -> float:
        """`reload_weights` reads the checkpoint again."""
        return self.load_s(foot)


class Memory:
    """The memory of one engine. Methods take the box, so that a lock may guard it."""

    def __init__(self, owner: str, footprint: Footprint) -> None:
        self.owner = owner
        self.footprint = footprint
        self.level = 0  # of the last sleep, 0 before the first
        self.asleep: set[Tag] = set()  # what is not mapped (wholly)
        self.weights_valid = False
        self.buffers_valid = False
        self.pinned = False
        self.residue_mib = footprint.residue_mib
        self.wedged = False
        self._mapped: dict[Tag, dict[int, int]] = {tag: {} for tag in TAGS}
        self._kv_share_mib = 0
        self._buffers_on_host = False
        self._free_before: dict[int, int] = {}

    # -- start ---------------------------------------------------------------------------------

    def begin_start(self, box: Box) -> None:
        """Check `free >= total x utilisation`, then map context and weights.

        Raises StartRefused, OutOfMemory or HostOutOfMemory; the caller then drops the owner.
        """
        foot = self.footprint
        for index, gpu in enumerate(foot.gpus):
            self._check_utilisation(box, index, gpu)
        box.take_host(self.owner, foot.rss_mib)
        self._free_before = {gpu: box.free_mib(gpu) for gpu in foot.gpus}
        for gpu in foot.gpus:
            box.take(self.owner, gpu, self.residue_mib)
        self._map(box, "weights")

    def end_start(self, box: Box) -> None:
        """Size the KV cache from the whole device's change since `begin_start`, and map it.

        Raises StartRefused when others disturbed the profiling, or OutOfMemory.
        """
        foot = self.footprint
        if foot.kv_mib is None:
            self._kv_share_mib = min(self._profile(box, gpu) for gpu in foot.gpus)
        else:
            self._kv_share_mib = foot.share_mib(foot.kv_mib)
        self._map(box, "kv_cache")
        self.weights_valid = self.buffers_valid = True

    def start(self, box: Box) -> None:
        self.begin_start(box)
        self.end_start(box)

    # -- sleep ---------------------------------------------------------------------------------

    def begin_sleep(self, box: Box, level: int) -> None:
        """Remember the device's free memory; level 1 pins host memory on its first time.

        Raises HostOutOfMemory. On an engine that is asleep it does nothing.
        """
        foot = self.footprint
        self._free_before = {gpu: box.free_mib(gpu) for gpu in foot.gpus}
        if level == 1 and not self.pinned:
            box.pin(self.owner, foot.pinned_mib)
            self.pinned = True

    def end_sleep(
        self, box: Box, level: int, *, leak_mib: int = 0, keep: Sequence[Tag] = ()
    ) -> None:
        """Unmap weights and KV cache (not what `keep` names); the residue grows by `leak_mib`.

        Levels other than 1 lose the weights; buffers survive 1 and 2 only (vLLM < 0.17 took any).
        Raises SleepAssertion when the device has less free memory than at `begin_sleep`: the memory
        is unmapped all the same, which is why such an engine must be restarted.
        """
        gone: list[Tag] = [tag for tag in TAGS if tag not in keep]
        for tag in gone:
            self._unmap(box, tag)
        self.asleep.update(gone)
        self.level = level
        if level != 1 and "weights" in gone:
            self.weights_valid = False
            self.buffers_valid = self.buffers_valid and level == 2
            self._keep_buffers(box)
        for gpu in self.footprint.gpus if leak_mib else ():
            box.take(self.owner, gpu, min(leak_mib, box.free_mib(gpu)))
        self.residue_mib += leak_mib
        if any(box.free_mib(gpu) < before for gpu, before in self._free_before.items()):
            raise SleepAssertion("Memory usage increased after sleeping.")

    def sleep(self, box: Box, level: int, *, leak_mib: int = 0) -> None:
        self.begin_sleep(box, level)
        self.end_sleep(box, level, leak_mib=leak_mib)

    # -- wake ----------------------------------------------------------------------------------

    def need_mib(self, tags: Iterable[str] = TAGS) -> dict[int, int]:
        """MiB for each GPU that waking `tags` would still map."""
        asleep = [tag for tag in TAGS if tag in tags and tag in self.asleep]
        return {
            gpu: sum(self._share(tag) - self._mapped[tag].get(gpu, 0) for tag in asleep)
            for gpu in self.footprint.gpus
        }

    def begin_wake(self, box: Box, tags: Iterable[str] = TAGS) -> None:
        """Map what sleeps of `tags`. Raises OutOfMemory; what was mapped until then stays mapped.

        From vLLM 0.29 the call can be repeated; before, the engine is wedged and must be restarted.
        """
        if self.wedged:
            raise OutOfMemory("CUDA Error: invalid argument at cumem_allocator.cpp:119")
        for tag in TAGS:
            if tag in tags and tag in self.asleep:
                self._remap(box, tag)

    def end_wake(self, box: Box, tags: Iterable[str] = TAGS) -> None:
        """The copies are done; after level 2 the weights stay invalid until `reload`."""
        self.asleep.difference_update([tag for tag in TAGS if tag in tags])
        if self._buffers_on_host and "weights" not in self.asleep:
            box.take_host(self.owner, -self.footprint.buffers_mib)
            self._buffers_on_host = False

    def wake(self, box: Box, tags: Iterable[str] = TAGS) -> None:
        chosen = tuple(tags)
        self.begin_wake(box, chosen)
        self.end_wake(box, chosen)

    def reload(self) -> None:
        """Weights are read again into mapped memory; lost buffers stay lost (vllm#44371)."""
        if "weights" in self.asleep:
            raise PhysicsError("CUDA error: an illegal memory access was encountered")
        self.weights_valid = self.buffers_valid

    # -- parts ---------------------------------------------------------------------------------

    @property
    def kv_mib(self) -> int:
        """Size of the KV cache over all GPUs, known after the start."""
        return self._kv_share_mib * len(self.footprint.gpus)

    def _share(self, tag: Tag) -> int:
        if tag == "weights":
            return self.footprint.share_mib(self.footprint.weights_mib)
        return self._kv_share_mib

    def _map(self, box: Box, tag: Tag) -> None:
        for gpu in self.footprint.gpus:
            box.take(self.owner, gpu, self._share(tag))
            self._mapped[tag][gpu] = self._share(tag)

    def _unmap(self, box: Box, tag: Tag) -> None:
        for gpu, mib in self._mapped[tag].items():
            box.give(self.owner, gpu, mib)
        self._mapped[tag] = {}

    def _remap(self, box: Box, tag: Tag) -> None:
        """Block by block, as the allocator does; stops where the memory ends."""
        for gpu in self.footprint.gpus:
            have = self._mapped[tag].get(gpu, 0)
            want = self._share(tag) - have
            block = self.footprint.pin_block_mib
            fits = want if want <= box.free_mib(gpu) else box.free_mib(gpu) // block * block
            box.take(self.owner, gpu, fits)
            self._mapped[tag][gpu] = have + fits
            if fits < want:
                self.wedged = not self.footprint.wake_retryable
                raise OutOfMemory("CUDA Error: out of memory at cumem_allocator.cpp:119")

    def _keep_buffers(self, box: Box) -> None:
        if not self._buffers_on_host and self.buffers_valid:
            box.take_host(self.owner, self.footprint.buffers_mib)
            self._buffers_on_host = True

    def _check_utilisation(self, box: Box, index: int, gpu: int) -> None:
        total, free, share = box.gpu_total_mib[gpu], box.free_mib(gpu), self.footprint.utilisation
        wanted = math.ceil(total * share)
        if free < wanted:
            raise StartRefused(
                f"Free memory on device cuda:{index} ({_gib(free)}/{_gib(total)} GiB) on startup "
                f"is less than desired GPU memory utilization ({share:g}, {_gib(wanted)} GiB). "
                "Decrease GPU memory utilization or reduce GPU memory used by other processes."
            )

    def _profile(self, box: Box, gpu: int) -> int:
        before, now = self._free_before[gpu], box.free_mib(gpu)
        if now >= before:
            raise StartRefused(
                f"Error in memory profiling. Initial free memory {_gib(before)} GiB, current free "
                f"memory {_gib(now)} GiB. This happens when other processes sharing the same "
                "container release GPU memory while vLLM is profiling during initialization."
            )
        left = math.floor(box.gpu_total_mib[gpu] * self.footprint.utilisation) - (before - now)
        if left <= 0:
            raise StartRefused(
                "No available memory for the cache blocks. Try increasing "
                "`gpu_memory_utilization` when initializing the engine."
            )
        return left


def ceil_pow2(mib: int) -> int:
    """The smallest power of two that is not below `mib`."""
    return 1 << max(0, mib - 1).bit_length()


def _gib(mib: int) -> str:
    return f"{mib / GIB:.2f}"
