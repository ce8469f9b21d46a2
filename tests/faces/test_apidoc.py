"""The OpenAPI document says what the door does: every path, every method, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from homegptd.core.model import ModelId
from homegptd.faces import apidoc, http
from homegptd.faces.guard import Guard
from homegptd.faces.routes import ROUTES, Where

from . import box


def told(document: dict[str, Any]) -> dict[str, set[str]]:
    """Methods by path, with what is behind a slash left away."""
    found: dict[str, set[str]] = {}
    for path, item in document["paths"].items():
        found.setdefault(path.partition("{")[0], set()).update(m.upper() for m in item)
    return found


async def test_the_document_is_complete(tmp_path: Path) -> None:
    async with box.running({"chat": tmp_path / "s"}) as b:
        document = (await b.ask("/openapi.json", method="GET")).json
        assert told(document) == {path: set(e.handlers) for path, e in b.door.paths.items()}
        assert document["openapi"].startswith("3.1")
        single = http.build_model_door(
            ModelId("chat"), scheduler=b.scheduler, desk=b.desk, addresses=lambda m: ""
        )
        small = apidoc.document(single.paths)
        assert told(small) == {path: set(e.handlers) for path, e in single.paths.items()}
        assert "/switch" not in small["paths"]
        assert {route.path for route in ROUTES} <= set(small["paths"])
        single.close()


async def test_everybody_may_read_it_and_nobody_else_gets_vllms(tmp_path: Path) -> None:
    async with box.running({"chat": tmp_path / "s"}, guard=Guard(managers=())) as b:
        more = "Host: evil.example\r\n"
        assert (await b.ask("/openapi.json", method="GET", more=more)).status == 200
        assert (await b.ask("/openapi.json", b"{}")).status == 405


def refs(value: object) -> set[str]:
    match value:
        case {"$ref": str(name)}:
            return {name}
        case dict():
            return {name for each in value.values() for name in refs(each)}
        case list():
            return {name for each in value for name in refs(each)}
        case _:
            return set()


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path}")
def test_each_route_is_described_as_the_table_has_it(route: Any) -> None:
    document = apidoc.document(["/v1/responses/", *(r.path for r in ROUTES)])
    entry = document["paths"][route.path][route.method.lower()]
    assert entry["summary"] == route.about
    kinds = set(entry.get("requestBody", {}).get("content", {}))
    wanted = {Where.BODY: {"application/json"}, Where.FORM: {"multipart/form-data"}}
    assert kinds == wanted.get(route.where, set())
    if route.where is not Where.SESSION:
        streams = "text/event-stream" in entry["responses"]["200"]["content"]
        assert streams is route.streams
    names = {each["name"] for each in entry.get("parameters", ())}
    assert ("id" in names) == ("{id}" in route.path)
    assert {ref.rpartition("/")[2] for ref in refs(document)} <= set(
        document["components"]["schemas"]
    )
