"""Figures that a configuration comes to, before anything is measured."""

from pathlib import Path

import pytest

from homegptd.app.parts import clients
from homegptd.app.setup import Places, Setup, set_up
from homegptd.config.parse import parse
from homegptd.core.memory import Card, Gpu, Kind
from homegptd.core.model import EngineSpec

GIB = 1024
PLACES = Places(Path("/run/x"), Path("/var/x"))


def setup(text: str, *cards_mib: int) -> Setup:
    cards = {Gpu(n): Card("card", mib, 0) for n, mib in enumerate(cards_mib)}
    return set_up(parse(text, "config.yaml"), PLACES, cards)


def first(text: str, *cards_mib: int) -> EngineSpec:
    return setup(text, *cards_mib).specs[0]


ONE = "models:\n  - {id: a, gpu_memory_gb: 20, startup_mode: sleep%s}\n"


def test_what_is_given_is_charged_with_as_much_again_for_pinned_copies() -> None:
    spec = first(ONE % ", weights_gb: 8, residue_gb: 1")
    assert (spec.pinned_mib, spec.pinned_margin_mib) == (8 * GIB, 8 * GIB)
    assert spec.estimated == {Kind.HOST}


def test_an_engine_that_others_start_may_know_no_alias() -> None:
    text = "models:\n" + "".join(
        f"  - {{id: {name}, gpu_memory_gb: 20, startup_mode: sleep, aliases: [x{name}]{more}}}\n"
        for name, more in (
            ("a", ", engine: {image: vllm, model: org/a}"),
            ("b", ", engine: {command: [serve, --served-model-name, b, xb]}"),
            ("c", ", engine: {command: [serve, --served-model-name, c]}"),
            ("d", ", container_name: by-hand, host_port: 8001"),
        )
    )
    assert setup(text).by_id_only == {"c", "d"}


def test_the_time_for_a_sleep_grows_with_what_it_pins() -> None:
    took = {}
    for gb in (8, 300):
        [engine] = clients(setup((ONE % f", weights_gb: {gb}").replace("20", "400"))).values()
        took[gb] = engine.deadlines.sleep_s
    assert took == {8: 180, 300: 600}


def test_a_reload_that_corrects_the_size_gives_more_time_to_an_engine_that_stays() -> None:
    text = (ONE % ", weights_gb: %d").replace("20", "400")
    before, after = setup(text % 8), setup(text % 300)
    old = clients(before)
    new = clients(after, old, before)
    assert new == old  # the same clients
    assert [engine.deadlines.sleep_s for engine in new.values()] == [600]


def test_who_trusts_what_was_given_gets_just_that() -> None:
    spec = first("trust: configured\n" + ONE % ", weights_gb: 8, residue_gb: 1")
    assert (spec.pinned_mib, spec.pinned_margin_mib, spec.trust_given) == (8 * GIB, 0, True)


def test_weights_on_disk_are_better_than_a_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = first(ONE % ", engine: {model: Org/None}")
    assert (spec.pinned_mib, spec.pinned_margin_mib) == (12 * GIB, 0)  # 0.6 is much as it is
    assert spec.estimated == {Kind.HOST, Kind.PINNED, Kind.RESIDUE}
    files = tmp_path / "hub/models--Org--Some/snapshots/main"
    files.mkdir(parents=True)
    for part in ("1", "2"):
        with (files / f"model-{part}.safetensors").open("wb") as file:
            file.truncate(3 << 30)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    spec = first(ONE % ", engine: {model: Org/Some}")
    assert (spec.pinned_mib, spec.pinned_margin_mib) == (6 * GIB, 6 * GIB)
    assert Kind.PINNED in spec.estimated


def test_a_card_that_is_not_given_has_what_its_driver_says() -> None:
    assert setup(ONE % "", 24_000).gpus == {Gpu(0): 24_000}
    assert setup("gpus: [{memory_mib: 22000}]\n" + ONE % "", 24_000).gpus == {Gpu(0): 22_000}
    assert setup("gpus: [{memory_mib: 30000}]\n" + ONE % "", 24_000).gpus == {Gpu(0): 24_000}
    assert setup(ONE % "").gpus == {Gpu(0): 20 * GIB}  # nobody knows: as the original manager


def test_a_round_number_may_be_a_little_more_than_the_card_has() -> None:
    """`gpu_memory_gb: 24` on a card of 24 GB worked with the original manager, and does here."""
    both = (
        "models:\n  - {id: a, gpu_memory_gb: 24, startup_mode: sleep}\n"
        "  - {id: b, gpu_memory_gb: 20, startup_mode: sleep}\n"
    )
    a, b = setup(both, 24_564).specs
    assert a.awake_mib + b.residue_mib <= 24_564 * 31 // 32 + 1
    assert b.awake_mib == 20 * GIB
    a, _ = setup(both, 20_000).specs
    assert a.awake_mib >= 0.9 * 24 * GIB  # that is no rounding any more: it is refused with its sum
