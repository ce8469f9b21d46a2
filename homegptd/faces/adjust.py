"""What the configuration sets in the requests for one model (`models[].request`).

Costs nothing where nothing is set. Else the body's top level is taken apart; what lies deeper stays
the bytes it was, unless a mapping is merged into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from .openai import NotUnderstood


@dataclass(frozen=True, slots=True)
class Adjustment:
    """Mappings are merged key by key, anything else is taken whole.

    A default counts where the request says nothing, or null. An override counts always; null takes
    the key out.
    """

    defaults: Mapping[str, object] = field(default_factory=dict)
    overrides: Mapping[str, object] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.defaults or self.overrides)


_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def adjusted(body: bytes, adjustment: Adjustment) -> bytes:
    """The JSON object as it is sent on. Raises: NotUnderstood."""
    try:
        members: dict[str, object] = {**_decoder.decode(body)}
        _add(members, adjustment.defaults)
        _set(members, adjustment.overrides)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotUnderstood(f"the body is not JSON: {error}") from None
    return msgspec.json.encode(members)


def _add(members: dict[str, object], defaults: Mapping[str, object]) -> None:
    for key, value in defaults.items():
        given = _opened(members.get(key), value)
        if given is None:
            members[key] = value
        elif isinstance(value, Mapping) and isinstance(given, dict):
            _add(given, value)
            members[key] = given


def _set(members: dict[str, object], overrides: Mapping[str, object]) -> None:
    for key, value in overrides.items():
        given = _opened(members.get(key), value)
        if value is None:
            members.pop(key, None)
        elif isinstance(value, Mapping):
            inner = given if isinstance(given, dict) else {}
            _set(inner, value)
            members[key] = inner
        else:
            members[key] = value


def _opened(given: object, against: object) -> object:
    """What a request says for a key, parsed only where a mapping has to be merged with it."""
    if not isinstance(given, msgspec.Raw):
        return given
    raw = bytes(given).strip()
    if raw == b"null":
        return None
    return msgspec.json.decode(raw) if isinstance(against, Mapping) else given
