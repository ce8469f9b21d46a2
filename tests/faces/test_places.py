"""Who holds what, as bars are drawn of it: the parts add up to the books in every phase."""

import pytest
from msgspec.structs import replace

from homegptd.core import ledger
from homegptd.core.memory import HOST, Foreign
from homegptd.core.model import (
    Asleep,
    Awake,
    Down,
    FallingAsleep,
    Gpu,
    OrderId,
    Phase,
    Proof,
    Proving,
    Roused,
    Rousing,
    SleepLevel,
    Starting,
    Stopping,
    Waking,
)
from homegptd.faces import places
from tests.core.builders import awake, box, engine

ONE, ORDER = SleepLevel.ONE, OrderId(1)
PHASES: list[tuple[Phase, str | None]] = [
    (Down(0.0), None),
    (Starting(ORDER, 0.0), "awake"),
    (Asleep(ONE, 0.0), "residue"),
    (Rousing(ORDER, 0.0, ONE), "roused"),
    (Roused(ONE, 0.0), "roused"),
    (Waking(ORDER, 0.0, ONE), "awake"),
    (Awake(0.0), "awake"),
    (FallingAsleep(ORDER, 0.0, ONE), "awake"),
    (FallingAsleep(ORDER, 0.0, ONE, roused=True), "roused"),
    (Proving(ORDER, 0.0, Proof.FREEZE), "awake"),
    (Stopping(ORDER, 0.0), "awake"),
    (Stopping(ORDER, 0.0, slept=ONE), "residue"),
    (Stopping(ORDER, 0.0, slept=ONE, roused=True), "roused"),
]


@pytest.mark.parametrize(("phase", "word"), PHASES, ids=lambda each: type(each).__name__)
def test_the_parts_add_up_and_have_their_word(phase: Phase, word: str | None) -> None:
    state = box(a=engine(phase, holds_pinned=True), b=awake())
    (gpu,), host = places.gpus_view(state), places.host_view(state)
    mine = [each for each in gpu["held"] if each["model"] == "a"]
    assert [each["what"] for each in mine] == ([] if word is None else [word])
    books = ledger.used(state)
    assert sum(each["mib"] for each in gpu["held"]) == books[Gpu(0)]
    assert gpu["used_mib"] + gpu["reserved_mib"] == books[Gpu(0)]
    assert sum(each["mib"] for each in host["held"]) == books[HOST] == host["used_mib"]


def test_what_others_hold_is_named() -> None:
    state = replace(box(a=awake()), foreign={Gpu(0): Foreign(2048, "game 2.0 GB")})
    (gpu,), host = places.gpus_view(state), places.host_view(state)
    assert (gpu["foreign_mib"], gpu["foreign"]) == (2048, "game 2.0 GB")
    assert (host["foreign_mib"], host["foreign"]) == (0, "")
    held = sum(each["mib"] for each in gpu["held"])
    assert gpu["free_mib"] == gpu["total_mib"] - held - 2048
