"""What a snapshot says of a model: why it is as it is, and until when."""

from msgspec.structs import replace

from homegptd.core.model import Act, ModelId, OnDeadline, OrderId, Proof, Proving
from homegptd.faces import progress
from homegptd.faces.views import model_view
from homegptd.wire.control import ModelView
from tests.core.builders import TRAITS, Run, asleep, awake, box, engine

UNPROVED = replace(TRAITS, proofs={})


def view(run: Run, name: str) -> ModelView:
    return model_view(run.state, ModelId(name), {}, lambda instant: instant)


def drained(**given: object) -> Run:
    """`a` answers one request and is drained for `b` since 100."""
    run = Run(box(a=awake(1, **given), b=asleep()))
    run.ask(Act.SWITCH, "b")
    return run


def test_a_drain_says_for_whom_and_what_becomes_of_its_answers() -> None:
    seen = view(drained(), "a")
    assert seen["why"] == (
        "makes room for b; 1 answer still running, waiting up to 10 s, then frozen"
    )
    assert seen["until"] == 110.0


def test_a_drain_that_can_only_wait_lasts_until_the_longest_answer() -> None:
    run = drained(traits=UNPROVED)
    for _ in range(2):
        seen = view(run, "a")
        assert seen["why"].endswith("waiting up to 10 min (freezing is unproved here)")
        assert seen["until"] == 700.0
        run.wait(30.0)


def test_an_answer_that_was_cut_has_its_grace() -> None:
    run = drained(on_deadline=OnDeadline.CUT)
    assert view(run, "a")["until"] == 110.0
    run.wait(10.0)
    seen = view(run, "a")
    assert seen["until"] == 115.0
    assert seen["why"].endswith("1 answer still running, told to end")


def test_a_proof_says_that_it_is_short() -> None:
    run = Run(box(a=engine(Proving(OrderId(1), 90.0, Proof.FREEZE))))
    assert view(run, "a")["why"] == "being proved (a few seconds)"


def test_what_a_step_is_expected_to_take_is_told_to_the_millisecond() -> None:
    step = progress._Step("wake", ModelId("a"), 0.3190000000031432)
    assert step.view(0.0)["expected_s"] == 0.319
