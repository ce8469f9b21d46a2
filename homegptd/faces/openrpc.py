"""The OpenRPC document of the control socket, from the method table and the types of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from homegptd import __version__
from homegptd.wire import codes, schema
from homegptd.wire import control as wire
from homegptd.wire.control import Notice

if TYPE_CHECKING:
    from .methods import Entry, Table

_NOTICES: dict[str, type] = {
    Notice.PROGRESS: wire.ProgressNotice,
    Notice.EVENT: wire.EventNotice,
    Notice.CLOSING: wire.ClosingNotice,
}


def openrpc(table: Table) -> dict[str, object]:
    """The OpenRPC 1.3 description of a table (https://spec.open-rpc.org)."""
    records: dict[str, type] = {}
    methods = [_method_object(entry, records) for entry in table.values()]
    notices = [_notice_object(name, record, records) for name, record in _NOTICES.items()]
    return {
        "openrpc": "1.3.2",
        "info": {
            "title": "homeGPT control socket",
            "version": __version__,
            "description": "JSON-RPC 2.0, one message per line, over a Unix socket",
        },
        "methods": methods,
        "x-notifications": notices,
        "components": {"schemas": _all_schemas(records), "errors": _errors()},
    }


def _method_object(entry: Entry[Any], records: dict[str, type]) -> dict[str, object]:
    return {
        "name": str(entry.name),
        "summary": entry.summary,
        "paramStructure": "either",
        "params": [_param_object(key, records) for key in schema.fields(entry.params)],
        "result": {"name": "result", "schema": schema.schema(entry.result, records)},
        "errors": [{"$ref": f"#/components/errors/{word}"} for word in codes.TABLE],
        "x-changes": entry.changes,
    }


def _notice_object(name: str, record: type, records: dict[str, type]) -> dict[str, object]:
    return {
        "name": str(name),
        "summary": (record.__doc__ or "").strip(),
        "params": [_param_object(key, records) for key in schema.fields(record)],
    }


def _param_object(key: schema.Field, records: dict[str, type]) -> dict[str, object]:
    shown: dict[str, object] = {"name": key.name, "required": key.required}
    if key.doc:
        shown["description"] = key.doc
    return shown | {"schema": schema.schema(key.type, records)}


def _all_schemas(records: Mapping[str, type]) -> dict[str, object]:
    return {name: schema.record_schema(records[name], {}) for name in sorted(records)}


def _errors() -> dict[str, object]:
    return {word: _error(word, row) for word, row in codes.TABLE.items()}


def _error(word: str, row: codes.Row) -> dict[str, object]:
    return {"code": row.rpc, "message": word.replace("-", " "), "data": {"reason": word}}
