"""Types to JSON Schema, JSON to types."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from homegptd.wire import control, schema


class Inner(TypedDict):
    """Inside."""

    level: Literal[1, 2] | None


class Outer(TypedDict):
    """Outside."""

    name: Annotated[str, "a name"]
    wait: NotRequired[Annotated[bool, "or not", schema.Default(True)]]
    inner: list[Inner]
    more: dict[str, object]


GOOD: dict[str, Any] = {"name": "a", "inner": [{"level": 1}, {"level": None}], "more": {"x": [1]}}


def test_keys_tell_whether_they_are_required_and_what_their_absence_means() -> None:
    keys = {key.name: key for key in schema.fields(Outer)}
    assert [key.required for key in keys.values()] == [True, False, True, True]
    assert keys["wait"].default == schema.Default(True)
    assert keys["name"].doc == "a name"


def test_records_become_references() -> None:
    records: dict[str, type] = {}
    shape = schema.record_schema(Outer, records)
    items = shape["properties"]["inner"]["items"]
    assert items == {"$ref": "#/components/schemas/Inner"}
    assert records == {"Inner": Inner}
    assert shape["required"] == ["name", "inner", "more"]


def test_what_fits_has_no_problem() -> None:
    assert schema.problem(GOOD, Outer, "x") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 3}, "x.name must be text, not 3"),
        ({"name": "\ud800"}, 'x.name must be text, not "\\ud800"'),
        ({"wait": 1}, "x.wait must be true or false, not 1"),
        ({"wait": None}, "x.wait must be true or false, not null"),
        ({"inner": {}}, "x.inner must be an array, not an object"),
        ({"inner": [{"level": 3}]}, "x.inner[0].level must be 1 or 2 or null, not 3"),
        ({"inner": [{"level": True}]}, "x.inner[0].level must be 1 or 2 or null, not true"),
        ({"inner": [{}]}, "x.inner[0].level is missing"),
        ({"naem": "a"}, "x.naem is unknown; known are name, wait, inner, more"),
    ],
)
def test_what_does_not_fit_is_said_in_words(change: dict[str, Any], words: str) -> None:
    assert schema.problem(GOOD | change, Outer, "x") == words


def test_every_shape_of_the_protocol_has_a_schema_and_a_docstring() -> None:
    shapes = [value for name, value in vars(control).items() if name.endswith(("View", "Params"))]
    assert len(shapes) > 20
    for shape in shapes:
        assert schema.record_schema(shape, {})["description"]
