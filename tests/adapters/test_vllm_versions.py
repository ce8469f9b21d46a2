"""The table of releases."""

from itertools import pairwise

import pytest

from homegptd.adapters.vllm_canary import LIKELY_GAP, likely, same
from homegptd.adapters.vllm_versions import PROFILES, profile_of


@pytest.mark.parametrize(
    ("version", "since"),
    [
        ("0.9.2", (0, 0)),
        ("0.10.1.1", (0, 0)),
        ("0.11.0", (0, 11)),
        ("0.16.3", (0, 11)),
        ("0.17.0", (0, 17)),
        ("0.23.9", (0, 17)),
        ("0.24.0rc1", (0, 24)),
        ("0.29.0+cpu", (0, 29)),
        ("v0.30.2", (0, 29)),
        ("v0.31.0", (0, 31)),
        ("0.32.0", (0, 32)),
        ("0.33.1rc2.dev7+gabcdef", (0, 32)),
        ("0.99.0", (0, 32)),
        ("1.0.0", (0, 32)),
        ("dev", (0, 32)),
    ],
)
def test_a_version_finds_its_row(version: str, since: tuple[int, int]):
    assert profile_of(version).since == since


def test_what_a_release_can_do_its_successors_can_too():
    abilities = [
        (
            p.sleeps,
            p.sleep_modes,
            p.safe_partial_wake,
            p.idempotent_wake,
            p.takes_back,
            p.json_bodies,
        )
        for p in PROFILES
    ]
    for earlier, later in pairwise(abilities):
        assert all(b >= a for a, b in zip(earlier, later, strict=True))


def test_only_0_11_to_0_16_die_of_sleep_under_load():
    dying = [p.since for p in PROFILES if p.dies_of_sleep_under_load]
    assert dying == [(0, 11)]


def test_rounding_is_likely_and_other_weights_are_not():
    assert likely([0.0] * 30 + [0.12] + [0.0] * 30)
    assert not likely([0.0] * 30 + [LIKELY_GAP * 2] + [0.0] * 30)  # one impossible token
    assert not likely([0.5] * 20)  # each possible, all together not
    assert not likely([float("nan")])
    assert not likely([])


def test_a_shorter_text_is_the_same_if_it_begins_the_longer():
    assert same("The", "The sky is")
    assert not same("Then", "The sky is")


def test_vectors_are_the_same_up_to_rounding():
    assert same((1.0, 0.0, 0.0001), (1.0, 0.0001, 0.0))
    assert not same((1.0, 0.0, 0.0), (0.9, 0.4, 0.0))
    assert not same((0.0, 0.0), (1.0, 0.0))
    assert not same((1.0, 0.0), (1.0, 0.0, 0.0))
    assert not same((0.5,), (0.7,))
    assert not same("0.5", (0.5,))
