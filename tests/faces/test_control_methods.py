"""The method table and the document that is made from it."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from homegptd.faces import methods
from homegptd.faces.methods import METHODS, Control, openrpc, signature
from homegptd.wire import codes, schema
from homegptd.wire.control import Method, Notice
from tests.faces.small_box import SmallBox


def document() -> Any:
    return json.loads(json.dumps(openrpc(METHODS)))


def test_the_table_has_every_method_of_the_protocol() -> None:
    assert list(METHODS) == [str(method) for method in METHODS]
    assert set(METHODS) == set(Method)


def test_the_document_has_every_method_with_its_parameters() -> None:
    found = {method["name"]: method for method in document()["methods"]}
    assert list(found) == list(METHODS)
    for name, entry in METHODS.items():
        keys = schema.fields(entry.params)
        params = found[name]["params"]
        assert [p["name"] for p in params] == [key.name for key in keys]
        assert [p["required"] for p in params] == [key.required for key in keys]
        assert found[name]["summary"] == entry.summary
        assert found[name]["result"]["schema"]
        assert found[name]["x-changes"] is entry.changes


def test_required_parameters_come_before_optional_ones() -> None:
    for entry in METHODS.values():
        required = [key.required for key in schema.fields(entry.params)]
        assert required == sorted(required, reverse=True), entry.name


def test_every_reference_of_the_document_leads_somewhere() -> None:
    whole = document()
    references = set(re.findall(r'"#/([^"]+)"', json.dumps(whole)))
    assert len(references) > 20
    for reference in references:
        place = whole
        for part in reference.split("/"):
            place = place[part]


def test_the_document_lists_every_reason_and_every_notification() -> None:
    whole = document()
    assert set(whole["components"]["errors"]) == set(codes.TABLE)
    assert [notice["name"] for notice in whole["x-notifications"]] == [str(n) for n in Notice]


def test_absent_parameters_get_their_defaults() -> None:
    assert methods.arguments(METHODS["switch"], ["coder"]) == {
        "model": "coder", "wait": True, "now": False, "force": False,
    }  # fmt: skip
    assert methods.arguments(METHODS["logs"], {"model": "a"}) == {"model": "a", "lines": 50}


def test_a_signature_fits_on_a_line() -> None:
    assert signature(METHODS["switch"]) == "switch(model, wait=true, now=false, force=false)"


def test_the_test_box_is_a_control() -> None:
    box: Control = SmallBox()
    for name, member in inspect.getmembers(Control, inspect.isfunction):
        if not name.startswith("_"):
            asked = list(inspect.signature(member).parameters)
            assert list(inspect.signature(getattr(type(box), name)).parameters) == asked
