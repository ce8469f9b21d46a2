"""The OpenAPI document of a door (`/openapi.json`), from the tables that the door is made of.

Bodies for models are described as far as the router reads them, with the members that each path
needs most; vLLM knows many more, and gets them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from homegptd import __version__
from homegptd.wire import control as wire
from homegptd.wire import schema

from .errors import Shape
from .routes import ROUTES, Route, Where

Json = dict[str, Any]

_TEXT: Json = {"type": "string"}
_TEXTS: Json = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_OBJECT: Json = {"type": "object"}
_OBJECTS: Json = {"type": "array", "items": _OBJECT}
_MODEL: Json = {
    "type": "string",
    "description": "An id or an alias, `active` or `default`; without it the default model.",
}
_NEEDS: dict[str, dict[str, Json]] = {
    "/v1/chat/completions": {"messages": _OBJECTS},
    "/v1/chat/completions/batch": {"messages": {"type": "array", "items": _OBJECTS}},
    "/v1/completions": {"prompt": _TEXTS},
    "/v1/responses": {"input": {"anyOf": [_TEXT, _OBJECTS]}},
    "/v1/messages": {"messages": _OBJECTS, "max_tokens": {"type": "integer"}},
    "/v1/messages/count_tokens": {"messages": _OBJECTS},
    "/v1/embeddings": {"input": _TEXTS},
    "/v2/embed": {"texts": {"type": "array", "items": _TEXT}},
    "/pooling": {"input": _TEXTS},
    "/classify": {"input": _TEXTS},
    "/v1/audio/speech": {"input": _TEXT, "voice": _TEXT},
    "/tokenize": {"prompt": _TEXT},
    "/detokenize": {"tokens": {"type": "array", "items": {"type": "integer"}}},
}
_FOR_MODELS = (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 501, 502, 503)
"""What the router and vLLM answer where all is not well."""
_CLIENT: Json = {
    "name": "X-HomeGPT-Client",
    "in": "header",
    "required": False,
    "schema": {"const": "open-webui"},
    "description": "Without it there is no such path.",
}


@dataclass(frozen=True, slots=True)
class _Own:
    """What the daemon answers by itself."""

    about: str
    answer: object = object
    """The type of a good answer."""
    errors: tuple[int, ...] = ()
    params: tuple[Json, ...] = ()
    body: Json | None = None
    also: int | None = None
    """Another status of the same answer."""
    kind: str = "application/json"


def _query(name: str, of: Json) -> Json:
    return {"name": name, "in": "query", "required": False, "schema": of}


def _in_path(name: str, of: Json) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": of}


def _wish(name: str, **more: Json) -> Json:
    return {"type": "object", "properties": {name: _TEXT, **more}, "required": [name]}


_OWN: dict[tuple[str, str], _Own] = {
    ("GET", "/"): _Own("The dashboard, a page for browsers", kind="text/html"),
    ("GET", "/status"): _Own("The whole box at one glance", answer=wire.BoxView, errors=(403,)),
    ("GET", "/memory"): _Own(
        "What memory is reckoned with, and what is really held", answer=wire.MemoryReport,
        errors=(403,),
    ),
    ("GET", "/plan/{model}"): _Own(
        "What a switch would do now", answer=wire.PlanView, errors=(403, 404),
        params=(_in_path("model", _TEXT),),
    ),
    ("GET", "/events"): _Own(
        "The story and the status, as they change", errors=(403, 429), kind="text/event-stream",
    ),
    ("GET", "/health"): _Own("Whether the box can serve", errors=(), also=503),
    ("GET", "/openapi.json"): _Own("This document"),
    ("GET", "/models"): _Own("Every model and its state", errors=(403,)),
    ("GET", "/models/sse"): _Own(
        "Changes of the models' states (llama.cpp)", errors=(403, 404), params=(_CLIENT,),
        kind="text/event-stream",
    ),
    ("POST", "/models/load"): _Own(
        "Make a model awake (llama.cpp)", errors=(400, 403, 404, 408, 409, 413, 415, 422, 502, 503),
        params=(_CLIENT,), body=_wish("model"),
    ),
    ("POST", "/models/unload"): _Own(
        "Put a model to sleep (llama.cpp)",
        errors=(400, 403, 404, 408, 409, 413, 415, 422, 502, 503),
        params=(_CLIENT,), body=_wish("model"),
    ),
    ("POST", "/switch"): _Own(
        "Make a model awake, displacing others where it must", answer=wire.OperationView,
        errors=(400, 403, 404, 408, 409, 413, 415, 422, 502, 503), also=202,
        params=(_query("wait", {"type": "boolean", "default": True}),),
        body=_wish("model_id", now={"type": "boolean", "default": False})
        | {"additionalProperties": False},
    ),
    ("GET", "/operations/{id}"): _Own(
        "An operation under way, or ended", answer=wire.OperationView, errors=(403, 404),
        params=(_in_path("id", {"type": "integer", "minimum": 0}),),
    ),
    ("GET", "/v1/models"): _Own("All models, in OpenAI's form"),
    ("GET", "/v1/models/{name}"): _Own(
        "One model, by id or alias", errors=(404,), params=(_in_path("name", _TEXT),)
    ),
}  # fmt: skip


def document(paths: Iterable[str]) -> Json:
    """The document of a door with these paths; one that ends in a slash takes something behind."""
    there = set(paths)
    records: dict[str, type] = {}
    found: dict[str, Json] = {}
    for (method, path), own in _OWN.items():
        if _is_in(path, there):
            found.setdefault(path, {})[method.lower()] = _own(own, records)
    for route in ROUTES:
        if _is_in(route.path, there):
            found.setdefault(route.path, {})[route.method.lower()] = _to_model(route)
    schemas = {name: schema.record_schema(records[name], {}) for name in sorted(records)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "homeGPT",
            "version": __version__,
            "description": "Many models behind one address; a request wakes the one it names.",
        },
        "paths": found,
        "components": {"schemas": {**schemas, **_REFUSALS}},
    }


def _is_in(path: str, there: set[str]) -> bool:
    return path.partition("{")[0] in there


def _own(own: _Own, records: dict[str, type]) -> Json:
    answer = {"description": "done", "content": {own.kind: {}}}
    if own.kind == "application/json":
        answer["content"] = _json(schema.schema(own.answer, records))
    told: Json = {"summary": own.about, "responses": {"200": answer}}
    if own.also is not None:
        told["responses"][str(own.also)] = answer
    told["responses"] |= {str(status): _refusal(Shape.OPENAI) for status in own.errors}
    if own.params:
        told["parameters"] = list(own.params)
    if own.body is not None:
        told["requestBody"] = {"required": True, "content": _json(own.body)}
    return told


def _to_model(route: Route) -> Json:
    statuses = (*_FOR_MODELS, 426) if route.where is Where.SESSION else _FOR_MODELS
    told: Json = {
        "summary": route.about,
        "description": _behaviour(route),
        "responses": {
            **_answer(route),
            **{str(status): _refusal(route.shape) for status in statuses},
            "404": _refusal(route.shape, "NoSuchPath"),
        },
    }
    params = _params(route)
    if params:
        told["parameters"] = params
    body = _body(route)
    if body is not None:
        told["requestBody"] = {"required": True, "content": body}
    return told


def _behaviour(route: Route) -> str:
    if not route.wakes:
        return "Wakes no model: 409 if it is not awake."
    return "Waits until the model is awake."


def _answer(route: Route) -> Json:
    if route.where is Where.SESSION:
        return {"101": {"description": "the session begins"}}
    content: Json = {"application/json": {}}
    if route.streams:
        content["text/event-stream"] = {}
    if route.where is Where.FORM or route.path == "/v1/audio/speech":
        content |= {"text/plain": {}, "audio/*": {}, "application/octet-stream": {}}
    return {"200": {"description": "the model's answer", "content": content}}


def _params(route: Route) -> list[Json]:
    match route.where, route.method:
        case Where.SESSION, _:
            return [_query("model", _MODEL)]
        case Where.STORED, "GET":
            after = {"type": "integer", "minimum": 0, "maximum": 999_999_999}
            return [_RESPONSE_ID, _query("stream", {"type": "boolean"}),
                    _query("starting_after", after)]  # fmt: skip
        case Where.STORED, _:
            return [_RESPONSE_ID]
        case _:
            return []


def _body(route: Route) -> Json | None:
    stream: Json = {"stream": {"type": "boolean"}} if route.streams else {}
    if route.where is Where.FORM:
        sound = {"type": "string", "format": "binary"}
        members: Json = {"file": sound, "model": _MODEL, **stream}
        form = {"type": "object", "properties": members, "required": ["file"]}
        return {"multipart/form-data": {"schema": form}}
    if route.where is not Where.BODY:
        return None
    needs = _NEEDS.get(route.path, {})
    named = {"anyOf": [_MODEL, {"type": "null"}]}
    members = {"model": named, **needs, **stream}
    return _json({"type": "object", "properties": members, "required": list(needs)})


def _refusal(shape: Shape, *more: str) -> Json:
    name = "AnthropicError" if shape is Shape.ANTHROPIC else "Error"
    shapes = [{"$ref": f"#/components/schemas/{each}"} for each in (name, *more)]
    return {
        "description": "why not",
        "content": _json(shapes[0] if len(shapes) == 1 else {"anyOf": shapes}),
    }


def _json(of: Json) -> Json:
    return {"application/json": {"schema": of}}


_RESPONSE_ID = _in_path("id", {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"})
_ERROR: Json = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"anyOf": [_TEXT, {"type": "null"}]},
                "code": {"anyOf": [_TEXT, {"type": "integer"}, {"type": "null"}]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_ANTHROPIC: Json = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": _TEXT, "message": _TEXT},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}
_REFUSALS = {
    "Error": _ERROR,
    "AnthropicError": _ANTHROPIC,
    "NoSuchPath": {
        "type": "object",
        "description": "vLLM's own, of an engine that does not do this",
        "properties": {"detail": _TEXT},
        "required": ["detail"],
    },
}
