"""Weights that are back stay while room for the rest is made; without them all is as before."""

from homegptd.core.commands import Sleep, Start
from homegptd.core.events import RouseEnded
from homegptd.core.model import Act, Awake, Draining, Gpu, ModelId, Policy, Roused, TicketId
from homegptd.core.outlook import outlook
from tests.core.builders import GB, Run, asleep, awake, box, down
from tests.core.test_rousing import ABLE, G0, NOW, B, card, close, orders, roused, rousing, seen


def test_a_request_that_goes_first_while_the_other_still_answers() -> None:
    policy = Policy(patience_s=10.0, residency_s=0.0)
    run = Run(card(policy=policy, a=awake(1, traits=ABLE, priority=2)))
    run.request(2, "b")
    run.wait(11.0)
    run.done("b")
    assert orders(run.request(3, "a", after=1.0)) == []
    assert isinstance(run.phase("b"), Roused)
    assert isinstance(run.phase("a"), Draining)


def test_who_makes_room_may_change_again_and_again() -> None:
    """a was used less, but c is idle now and then: then it is c that goes, after a quiet gap."""
    up = {"traits": ABLE, "awake_mib": 45 * GB}
    a, c = awake(1, **up), awake(1, first=50, since=90.0, last_used=99.0, **up)
    b = asleep(traits=ABLE, pinned_mib=15 * GB)
    run = Run(box(Policy(patience_s=5.0, residency_s=40.0), gpus=(130,), a=a, b=b, c=c))
    run.request(2, "b")
    run.wait(6.0)
    run.done("b")
    for ticket in range(50, 54):
        assert orders(run(close(ticket), 1.0)) == []
        assert isinstance(run.phase("a"), Awake)
        assert isinstance(run.phase("b"), Roused)
        assert orders(run.request(ticket + 1, "c", after=0.5)) == []
        assert isinstance(run.phase("a"), Draining)
    run(close(54))
    assert [(type(each), each.model) for each in orders(run.wait(4.0))] == [(Sleep, "c")]


def test_they_go_when_an_earlier_wish_comes_first() -> None:
    run = roused()
    assert [type(c) for c in orders(run(close(2)))] == [Sleep]


def test_want_of_room_for_the_weights_turns_nobody_away() -> None:
    """One look may come too soon: what another engine gave back can show late."""
    run = rousing(card(a=awake(1, traits=ABLE, awake_mib=42 * GB)))
    run(RouseEnded(B, run.orders.pop("b").order, crowded=seen(0.0)))
    assert [waiting.id for waiting in run.state.waiting] == [TicketId(2)]
    assert isinstance(run.phase("a"), Draining)


def test_before_a_start_they_go_or_they_would_stay_as_long_as_it_takes() -> None:
    """On two GPUs: whoever is wanted on the other one would wait for that start too."""
    b = asleep(traits=ABLE, gpus=(G0, Gpu(1)))
    run = roused(box(NOW, gpus=(100, 100), a=awake(1, traits=ABLE), b=b, c=down(gpus=(Gpu(1),))))
    assert [(type(each), each.model) for each in orders(run.ask(Act.START, "c"))] == [(Sleep, B)]
    assert [(type(each), each.model) for each in orders(run.done("b"))] == [(Start, "c")]


def test_who_comes_later_is_told_whose_turn_it_is() -> None:
    run = roused(card(c=asleep(traits=ABLE)))
    run.request(3, "c", after=1.0)
    assert outlook(run.state, ModelId("c"), run.now).doing == "Waiting for the turn of b"
