"""Log lines and the one-line summary. The transcripts show how the lines read in a row."""

import pytest
from msgspec.structs import replace

from homegptd.core.events import (
    CancelAsked,
    EngineDied,
    Event,
    Observed,
    ProveEnded,
    RequestArrived,
    ShutdownAsked,
    TicketClosed,
    TimePassed,
)
from homegptd.core.machine import initial, step
from homegptd.core.model import (
    Act,
    Failure,
    Gpu,
    ModelId,
    OperationId,
    OrderId,
    Policy,
    Proof,
    Proving,
    State,
    TicketId,
)
from homegptd.core.story import Line, summary, tell
from homegptd.core.words import span
from tests.core.builders import GB, TRAITS, Run, asleep, awake, box, down, engine, spec, ticket


def told(state: State, event: Event, now: float = 100.0) -> tuple[Line, ...]:
    return tell(state, event, step(state, event, now), now)


def test_a_request_that_is_granted_and_closed_is_not_worth_a_line() -> None:
    assert told(box(a=awake()), RequestArrived(ticket(1, "a", 100.0))) == ()
    assert told(box(a=awake(1)), TicketClosed(TicketId(1), served=True)) == ()
    assert told(box(a=awake(2)), TicketClosed(TicketId(1), served=True)) == ()


def test_a_change_of_phase_is_one_line_with_its_fields() -> None:
    (line,) = told(box(a=asleep()), RequestArrived(ticket(1, "a", 100.0)))
    assert line == Line(
        "info",
        "phase",
        ModelId("a"),
        "a is waking from level 1",
        {"phase": "asleep → waking", "took": 100.0},
    )


def test_a_failure_is_an_error_with_its_hint_and_what_happens_next() -> None:
    failure = Failure("vLLM answered 500 to /sleep", "journalctl -u vllm-a.service")
    (line,) = told(box(a=awake()), EngineDied(ModelId("a"), 1, failure))
    assert line.level == "error"
    assert line.text == (
        "a failed while awake: vLLM answered 500 to /sleep; stopping what is left,"
        " it starts again when it is wanted; hint: journalctl -u vllm-a.service"
    )


def test_refusals_are_told_once_with_their_number() -> None:
    policy = Policy(patience_s=1e6)
    state = box(policy, a=awake(1), b=asleep())
    for number in (2, 3):
        state = step(state, RequestArrived(ticket(number, "b", 50.0)), 50.0).state
    lines = told(state, ShutdownAsked())
    assert [line.text for line in lines] == [
        "shutting down: 1 answer running",
        "2 requests refused: homeGPT is shutting down",
    ]
    assert lines[1].fields == {"reason": "shutting-down", "requests": 2}


def test_a_proof_that_failed_is_a_warning() -> None:
    state = box(a=engine(Proving(OrderId(7), 90.0, Proof.FREEZE), replace(TRAITS, proofs={})))
    event = ProveEnded(ModelId("a"), OrderId(7), Proof.FREEZE, holds=False, detail="other words")
    phase, proof = told(state, event)
    assert phase.text == "a is awake (tried freezing in 10.0 s)"
    assert (proof.level, proof.kind) == ("warning", "proof")


def test_a_drain_says_once_that_it_waits_on_and_until_when() -> None:
    run = Run(box(a=awake(1, since=0.0, traits=replace(TRAITS, proofs={})), b=asleep()))
    run.ask(Act.SWITCH, "b")
    before = run.state
    run.wait(10.0)
    (line,) = tell(before, TimePassed(), run.last, run.now)
    assert line.text == (
        "a: 1 answer outlived 10 s; waiting on, at most 10 min more: freezing is unproved here"
    )
    before = run.state
    run.wait(10.0)
    assert tell(before, TimePassed(), run.last, run.now) == ()


def test_a_drain_tells_for_whom_it_is_now() -> None:
    small = {"awake_mib": 30 * GB}
    run = Run(box(a=awake(1), b=asleep(**small), c=asleep(**small)))
    run.ask(Act.SWITCH, "b")
    run.ask(Act.SWITCH, "c")
    assert run.phase("a").wanted_by == "b"
    run(CancelAsked(OperationId(1)))
    assert run.phase("a").wanted_by == "c"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.2, "0.2 s"),
        (5.0, "5 s"),
        (12.4, "12 s"),
        (119.0, "119 s"),
        (1740, "29 min"),
    ],
)
def test_lengths_of_time_are_as_exact_as_it_matters(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (
            box(a=awake(3), b=asleep(), c=asleep(), d=down(enabled=False)),
            "ready: a awake, 2 asleep, 1 disabled; 3 running, 0 waiting",
        ),
        (
            box(a=awake(), b=down("out of memory")),
            "degraded: a awake, 1 failed; 0 running, 0 waiting",
        ),
        (box(), "ready: no models; 0 running, 0 waiting"),
        (replace(box(a=awake(1)), stopping=True), "stopping: 1 answer running"),
        (box(größe=awake()), "ready: gr??e awake; 0 running, 0 waiting"),
    ],
)
def test_the_summary_is_one_ascii_line(state: State, text: str) -> None:
    assert summary(state) == text
    assert text.isascii()


def test_the_bootstrap_counts() -> None:
    state = initial((spec("a"), spec("b")), Policy(), {Gpu(0): 80 * GB}, 256 * GB)
    assert summary(state) == "bootstrap 0/2: looking around"
    state = step(state, Observed(), 0.0).state
    assert summary(state) == "bootstrap 1/2: starting a"


def test_the_end_of_a_bootstrap_says_ready_and_what_failed() -> None:
    lines = told(initial((), Policy(), {}, 0), Observed())
    assert [line.kind for line in lines] == ["bootstrap", "ready"]
