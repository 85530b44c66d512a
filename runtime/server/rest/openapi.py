"""OpenAPI document, generated from the table of routes."""

from __future__ import annotations

import re
from typing import Any

import msgspec

import tpeft_deploy
from tpeft_deploy.runtime.server.openai import errors
from tpeft_deploy.runtime.server.rest.bodies import Body
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.rest.routes import ROUTES, Route
from tpeft_deploy.runtime.server.tenancy.access import Action

__all__ = ["ROUTE", "document"]

_ERRORS = {
    "400": "the request violates the protocol, or does not fit the model",
    "401": "the key is missing, unknown, expired or revoked",
    "403": "the key's role does not allow it",
    "404": "no such resource, or it is not visible to the key",
    "405": "the path does not support the method",
    "409": "the name exists already, or the resource's state does not allow the change",
    "413": "a body or tensor exceeds a limit",
    "429": "the tenant's quota is exceeded; retry after Retry-After seconds",
    "501": "the server does not support this part of the protocol",
    "503": "the server is overloaded, starting or draining; retry after Retry-After seconds",
    "504": "the request's deadline expired",
    "507": "the server's disk is full; nothing was changed",
}
_FAILED = "the condition of If-Match or If-None-Match is false; nothing was changed"
_CONDITIONS = {
    "If-Match": "entity tag that the task must have, a list of them, or * for a task that exists",
    "If-None-Match": "* for a task that does not exist yet",
}
_ETAG = {
    "ETag": {
        "description": "entity tag of the task: another one after each change of its versions or aliases",
        "schema": {"type": "string"},
    }
}
_MODEL = (
    "name of a task, of the base or of the bundle; MODEL/COMPONENT, with '/' or '%2F', where it has several components"
)
_PARAMETERS = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {
            "enum": [
                *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
                *("FP16", "BF16", "FP32", "FP64", "BYTES"),
            ]
        },
        "parameters": _PARAMETERS,
        "data": {"type": "array"},
    },
    "additionalProperties": False,
}
_INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "model_name": {"type": "string"},
        "parameters": _PARAMETERS,
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string", "minLength": 1}, "parameters": _PARAMETERS},
                "additionalProperties": False,
            },
        },
    },
    "additionalProperties": False,
}


async def _openapi(_: HttpContext) -> object:
    return document()


async def _never(_: HttpContext) -> object:
    raise RuntimeError("inference is dispatched before the table of routes")


ROUTE = Route("GET", "/openapi.json", Action.READ, _openapi, "OpenAPI document of this server")
_INFERENCE = tuple(
    Route("POST", path, Action.INFER, _never, "Run inference; raw tensors may follow the JSON")
    for path in ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")
)


def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in (*_INFERENCE, *ROUTES, ROUTE):
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tpeft-deploy",
            "version": tpeft_deploy.__version__,
            "description": "The Open Inference Protocol V2, with extensions for many tasks and tenants.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {"type": "string"}},
                    "additionalProperties": False,
                },
                "OpenAIError": errors.schema(),
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    answer: dict[str, Any] = {"application/json": {}}
    if route.text:
        answer = {"text/plain": {"schema": {"type": "string"}}}
    elif route.streams:
        answer["text/event-stream"] = {}
    elif route in _INFERENCE:
        answer["application/octet-stream"] = {}
    schema_of_errors = "OpenAIError" if route.path.startswith(errors.PREFIX) else "Error"
    error = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema_of_errors}"}}}}
    done: dict[str, Any] = {"description": "done", "content": answer}
    if route.tagged:
        done["headers"] = _ETAG
    refused = _ERRORS | ({"412": _FAILED} if route.conditional else {})
    own: dict[str, Any] = {
        "operationId": _id(route),
        "summary": route.summary,
        "parameters": _parameters(route),
        "responses": {
            "200": done,
            **{code: {"description": text, **error} for code, text in sorted(refused.items())},
        },
        "security": [] if route.action is Action.HEALTH else [{"key": []}],
        "x-role": _role(route.action),
    }
    schema = _schema(route.body) if route.body is not None else _INFER if route.action is Action.INFER else None
    if schema is not None:
        own["requestBody"] = {
            "required": bool(schema.get("required")),
            "content": {"application/json": {"schema": schema}},
        }
    if route.upload:
        own["requestBody"] = {"required": True, "content": _upload()}
    return own


def _schema(body: type[Body]) -> dict[str, Any]:
    known: dict[str, Any] = msgspec.json.schema(body)["$defs"]
    found: dict[str, Any] = _inlined(known[body.__name__], known)
    found["properties"] = {name: own for name, own in found["properties"].items() if name not in body.unlisted}
    found["title"] = body.__name__.removesuffix("Body")  # generated clients name their classes by it
    return found


def _inlined(schema: Any, known: dict[str, Any]) -> Any:
    """Copy of a schema with the definitions that it refers to in their places."""
    if isinstance(schema, list):
        return [_inlined(own, known) for own in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(known[schema["$ref"].removeprefix("#/$defs/")], known)
    return {name: _inlined(own, known) for name, own in schema.items()}


def _upload() -> dict[str, Any]:
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    form = {
        "type": "object",
        "required": ["weights"],
        "properties": {"weights": file, "config": {"type": "string", "contentMediaType": "application/json"}},
        "additionalProperties": False,
    }
    return {"multipart/form-data": {"schema": form}, "application/octet-stream": {}}


def _parameters(route: Route) -> list[dict[str, Any]]:
    names = re.findall(r"{(\w+)}", route.path)
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    if names[:1] == ["model"]:
        found[0]["description"] = _MODEL
    for name, text in route.query.items():
        schema = {"type": "integer", "minimum": 0} if name in {"limit", "before"} else {"type": "string"}
        found.append({"name": name, "in": "query", "required": False, "schema": schema, "description": text})
    for name, text in _CONDITIONS.items() if route.conditional else ():
        schema = {"type": "string"}
        found.append({"name": name, "in": "header", "required": False, "schema": schema, "description": text})
    return found


def _role(action: Action) -> str:
    return {Action.HEALTH: "none", Action.READ: "infer", Action.INFER: "infer"}.get(action, action.value)


def _id(route: Route) -> str:
    words = re.findall(r"\w+", route.path)
    return "_".join([route.method.lower(), *words])
