"""The box has real arithmetic, vLLM's oddities included."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homegptd.sim.physics import (
    GIB,
    TAGS,
    Box,
    Footprint,
    HostOutOfMemory,
    Memory,
    OutOfMemory,
    SleepAssertion,
    Speeds,
    StartRefused,
    ceil_pow2,
)

SMALL = Footprint(weights_mib=20 * GIB, kv_mib=10 * GIB, utilisation=0.4, residue_mib=GIB)


def box(gpus: int = 1, gpu_gib: int = 80, ram_gib: int = 128) -> Box:
    return Box(dict.fromkeys(range(gpus), gpu_gib * GIB), ram_gib * GIB)


def started(where: Box, footprint: Footprint = SMALL, owner: str = "a") -> Memory:
    memory = Memory(owner, footprint)
    memory.start(where)
    return memory


def test_an_engine_awake_holds_weights_cache_and_residue() -> None:
    where = box()
    started(where)
    assert where.used_mib(0) == 31 * GIB


def test_a_start_needs_its_share_of_the_total_not_of_what_is_free() -> None:
    where = box()
    where.take("foreign:comfyui", 0, 50 * GIB)
    with pytest.raises(StartRefused, match=r"\(30\.00/80\.00 GiB\).*\(0\.4, 32\.00 GiB\)"):
        started(where)


def test_the_cache_is_what_the_utilisation_leaves() -> None:
    where = box()
    memory = started(where, dataclasses.replace(SMALL, kv_mib=None))
    assert memory.kv_mib == 11 * GIB


def test_memory_freed_by_others_while_profiling_ends_the_start() -> None:
    where = box()
    where.take("other", 0, 30 * GIB)
    memory = Memory("a", dataclasses.replace(SMALL, kv_mib=None))
    memory.begin_start(where)
    where.drop("other")
    with pytest.raises(StartRefused, match="Error in memory profiling"):
        memory.end_start(where)


def test_memory_taken_by_others_while_profiling_shrinks_the_cache() -> None:
    where = box()
    memory = Memory("a", dataclasses.replace(SMALL, kv_mib=None))
    memory.begin_start(where)
    where.take("other", 0, 5 * GIB)
    memory.end_start(where)
    assert memory.kv_mib == 6 * GIB


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeper_keeps_only_its_residue(level: int) -> None:
    where = box()
    started(where).sleep(where, level)
    assert where.used_mib(0) == SMALL.residue_mib


def test_pinned_memory_is_rounded_up_and_never_comes_back() -> None:
    where = box()
    memory = started(where)
    memory.sleep(where, 1)
    memory.wake(where)
    assert where.holdings["a"].pinned_mib == SMALL.pinned_mib > SMALL.weights_mib
    where.drop("a")
    assert where.ram_used_mib() == 0


def test_a_third_level_1_sleeper_can_exhaust_the_host() -> None:
    where = box(ram_gib=72)
    for owner in ("a", "b"):
        started(where, owner=owner).sleep(where, 1)
    third = started(where, owner="c")
    with pytest.raises(HostOutOfMemory):
        third.sleep(where, 1)


def test_level_2_forgets_the_weights_until_they_are_reloaded() -> None:
    where = box()
    memory = started(where)
    memory.sleep(where, 2)
    memory.wake(where)
    assert not memory.weights_valid
    memory.reload()
    assert memory.weights_valid


@pytest.mark.parametrize(("retryable", "works"), [(True, True), (False, False)])
def test_a_failed_wake_keeps_what_it_mapped_and_may_be_retried_from_0_29(
    retryable: bool, works: bool
) -> None:
    where = box()
    memory = started(where, dataclasses.replace(SMALL, wake_retryable=retryable))
    memory.sleep(where, 1)
    where.take("other", 0, 60 * GIB)
    with pytest.raises(OutOfMemory):
        memory.wake(where)
    assert where.held_mib("a", 0) > SMALL.residue_mib
    where.drop("other")
    if works:
        memory.wake(where)
        assert where.held_mib("a", 0) == 31 * GIB
    else:
        with pytest.raises(OutOfMemory):
            memory.wake(where)


def test_a_sleep_beside_somebody_who_grows_asserts_but_is_done() -> None:
    where = box()
    memory = started(where)
    memory.begin_sleep(where, 1)
    where.take("other", 0, 40 * GIB)
    with pytest.raises(SleepAssertion):
        memory.end_sleep(where, 1)
    assert memory.asleep == set(TAGS)
    assert where.held_mib("a", 0) == SMALL.residue_mib


def test_a_leak_makes_the_residue_grow_with_each_cycle() -> None:
    where = box()
    memory = started(where)
    for _ in range(3):
        memory.sleep(where, 1, leak_mib=100)
        memory.wake(where)
    memory.sleep(where, 1)
    assert where.used_mib(0) == SMALL.residue_mib + 300


def test_an_engine_over_two_gpus_holds_half_on_each() -> None:
    where = box(gpus=2, gpu_gib=32)
    pair = dataclasses.replace(SMALL, gpus=(0, 1), utilisation=0.9)
    memory = started(where, pair)
    assert [where.used_mib(gpu) for gpu in (0, 1)] == [16 * GIB, 16 * GIB]
    memory.sleep(where, 1)
    assert memory.need_mib() == {0: 15 * GIB, 1: 15 * GIB}


def test_the_first_sleep_is_slow_and_level_2_is_quick() -> None:
    speeds = Speeds()
    first = speeds.sleep_s(SMALL, 1, first=True)
    later = speeds.sleep_s(SMALL, 1, first=False)
    assert first > 5 * later > 5 * speeds.sleep_s(SMALL, 2, first=True)


@given(st.integers(1, 1 << 20))
def test_ceil_pow2_is_the_next_power(mib: int) -> None:
    power = ceil_pow2(mib)
    assert mib <= power < 2 * mib
    assert power & (power - 1) == 0


@given(st.lists(st.sampled_from(["sleep1", "sleep2", "wake", "weights", "other", "gone"])))
def test_nobody_ever_holds_more_than_there_is(acts: list[str]) -> None:
    where = box(gpu_gib=40)
    memory = started(where, dataclasses.replace(SMALL, utilisation=0.8))
    for act in acts:
        try:
            match act:
                case "sleep1" | "sleep2" if not memory.asleep:
                    memory.sleep(where, int(act[-1]))
                case "wake":
                    memory.wake(where)
                case "weights":
                    memory.wake(where, ["weights"])
                case "other":
                    where.take("other", 0, 15 * GIB)
                case _:
                    where.drop("other")
        except OutOfMemory:
            pass
        assert 0 <= where.used_mib(0) <= 40 * GIB
        asleep_mib = memory.need_mib()[0] + where.held_mib("a", 0)
        assert asleep_mib == 31 * GIB
