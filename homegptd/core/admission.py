"""Requests that may not switch: they wait for a model that comes up anyway, for no other."""

from .draft import Draft
from .model import (
    Act,
    Asleep,
    Awake,
    Draining,
    Engine,
    FallingAsleep,
    ModelId,
    Proving,
    Starting,
    Ticket,
    Waking,
)
from .refusals import Reason, Refusal


def asks_for_a_switch(ticket: Ticket, engine: Engine) -> bool:
    """Whether it is a reason to bring its model up. A second try is: its model was up."""
    return ticket.replay or (ticket.may_switch and engine.spec.auto_switch)


def turn_away(d: Draft) -> None:
    """Refuse whoever waits for a model that nobody brings up, and may not ask for it himself."""
    if all(asks_for_a_switch(ticket, d.engines[ticket.model]) for ticket in d.waiting):
        return
    for name in dict.fromkeys(ticket.model for ticket in d.waiting):
        if not _comes_up(d, d.engines[name]):
            _refuse(d, name)


def _refuse(d: Draft, name: ModelId) -> None:
    text = f'model "{name}" is not awake and this request may not switch to it'
    if not d.engines[name].spec.auto_switch:
        text = f'model "{name}" is not awake and only an operator switches to it (auto_switch)'
    refusal = Refusal(Reason.BUSY, text, f"homegptctl switch {name}")
    d.refuse_waiting(lambda ticket: ticket.model == name, refusal)


def _comes_up(d: Draft, engine: Engine) -> bool:
    """Whether it is awake soon without those who may not switch, or its drain may be undone."""
    match engine.phase:
        case Awake() | Proving() | Starting() | Waking() | Draining():
            return True
        case Asleep(frozen=frozen) | FallingAsleep(frozen=frozen) if frozen:
            return True
        case _:
            name = engine.spec.model
            asked = any(t.model == name and asks_for_a_switch(t, engine) for t in d.waiting)
            up = (o.model == name and o.act not in (Act.STOP, Act.SLEEP) for o in d.operations)
            return asked or any(up) or any(chore.model == name for chore in d.chores)
