"""The short way of a step comes to the same as the long one."""

import hypothesis.strategies as st
from hypothesis import assume, given
from msgspec.structs import replace

from homegptd.core.events import RequestArrived, TicketClosed, TimePassed
from homegptd.core.machine import step
from homegptd.core.model import TicketId
from homegptd.core.quick import is_calm, quick, serves
from homegptd.core.story import tell
from tests.core.builders import asleep, awake, box, down, ticket
from tests.properties.test_planner import fleets

NOW = 100.0


@given(fleets(), st.data())
def test_a_request_that_comes_or_goes_is_the_same_both_ways(state, data) -> None:
    model = data.draw(st.sampled_from(sorted(state.engines)))
    held = sorted(state.granted)
    if held and data.draw(st.booleans()):
        event = TicketClosed(data.draw(st.sampled_from(held)), data.draw(st.booleans()))
    else:
        event = RequestArrived(ticket(999, model, NOW))
    short = quick(state, event, NOW)
    assume(short is not None)
    long, then = step(state, event, NOW), step(short.state, TimePassed(), NOW)
    assert then.state == long.state
    assert (*short.commands, *then.commands) == long.commands
    if then.wake_at is not None:  # the long way also notes when the ticket would be late
        assert long.wake_at is not None
        assert long.wake_at <= then.wake_at
    assert tell(state, event, short, NOW) == ()
    assert is_calm(short.state)


@given(fleets(), st.booleans(), st.data())
def test_a_model_serves_where_a_ticket_is_granted_the_short_way(state, booted, data) -> None:
    state = replace(state, booted=booted)
    model = data.draw(st.sampled_from([*sorted(state.engines), "unknown"]))
    granted = quick(state, RequestArrived(ticket(999, model, NOW)), NOW) is not None
    assert serves(state, model) == granted


def test_it_is_taken_only_while_nobody_wants_anything_else() -> None:
    calm = box(a=awake(1), b=asleep(), c=down())
    event = RequestArrived(ticket(9, "a", NOW))
    assert quick(calm, event, NOW) is not None
    assert quick(calm, TicketClosed(TicketId(1)), NOW) is not None
    assert quick(calm, TicketClosed(TicketId(77)), NOW) is None
    assert quick(calm, RequestArrived(ticket(9, "b", NOW)), NOW) is None
    assert quick(replace(calm, waiting=(ticket(8, "b", NOW),)), event, NOW) is None
    assert quick(replace(calm, booted=False), event, NOW) is None
    assert quick(replace(calm, stopping=True), event, NOW) is None
    assert quick(box(a=awake(enabled=False)), event, NOW) is None
    assert quick(box(a=awake(renew=True)), event, NOW) is None
