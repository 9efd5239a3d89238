"""``/openapi.json``: every route that takes a request, described for programs (OpenAPI 3.1).

BentoML's own document is of 3.0 in name, with the schemas of 3.1, which not every program can read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import JSONResponse

from jubako import __version__

__all__ = ["add_document", "taken"]

PATH = "/openapi.json"

_REFERENCE = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_UPLOAD = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"], "description": "The field that is wrong, if one is"},
                "code": _TEXT,
            },
        }
    },
}


def taken(*kinds: Any, envelope: type[BaseModel] | None = None, file: bool = False) -> dict[str, Any]:
    """The body of a route that reads it itself, as FastAPI's ``openapi_extra``: one of these requests.

    ``envelope``: further fields, of which ``task`` is each request's own. ``file``: a form with an upload.
    """
    schemas = [_schema(kind, envelope, file) for kind in kinds]
    schema = schemas[0] if len(schemas) == 1 else {"oneOf": schemas}
    content = {"multipart/form-data": {"schema": _with_files(schema, _UPLOAD)}}
    if not file:
        content["application/json"] = {"schema": _with_files(schema, _BASE64)}
    return {"requestBody": {"required": True, "content": content}}


def add_document(app: FastAPI, methods: Mapping[str, Any]) -> None:
    """Give the application the route, after all others. ``methods``: what BentoML's take, by their paths."""
    document: dict[str, Any] = {}

    async def show() -> JSONResponse:
        if not document:
            document.update(_document(app, methods))
        return JSONResponse(document)

    app.add_api_route(PATH, show, methods=["GET"], include_in_schema=False)


def _document(app: FastAPI, methods: Mapping[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(get_openapi(title="Jubako", version=__version__, routes=app.routes))
    for path, kind in methods.items():
        answer = {"200": {"description": "The file", "content": {"*/*": {}}}}
        operation = {"description": kind.__doc__, "operationId": path[1:], "responses": answer, **taken(kind)}
        document["paths"][path] = {"post": operation}
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for operation in _operations(document):
        # Named after private functions.
        operation.pop("summary", None)
        operation["operationId"] = operation["operationId"].strip("_")
        # FastAPI promises its own answer to what it can't read; ours has another status and shape.
        operation["responses"].pop("422", None)
        for kind in ("4XX", "5XX"):
            content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
            operation["responses"][kind] = {"description": "What is wrong", "content": content}
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for schema in (content["schema"], *content["schema"].get("oneOf", ())):
                schemas |= schema.pop("$defs", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = _ERROR
    return document


def _operations(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def _schema(kind: Any, envelope: type[BaseModel] | None, file: bool) -> dict[str, Any]:
    schema: dict[str, Any] = kind.model_json_schema(ref_template=_REFERENCE)
    properties, required = dict(schema["properties"]), list(schema.get("required", ()))
    if envelope is not None:
        beside = envelope.model_json_schema(ref_template=_REFERENCE)
        properties |= beside["properties"] | {"task": {"const": kind.task}}
        required += beside["required"]
    if file:
        properties["file"] = _UPLOAD
        required.append("file")
    return schema | {"properties": properties, "required": required}


def _with_files(schema: Any, file: Mapping[str, str]) -> Any:
    """The schema with its files as this kind of body has them."""
    if isinstance(schema, list):
        return [_with_files(each, file) for each in schema]
    if not isinstance(schema, dict):
        return schema
    # A form has no null: a field is left out.
    if "anyOf" in schema and file is _UPLOAD and schema["anyOf"] == [_UPLOAD, {"type": "null"}]:
        return {name: each for name, each in schema.items() if name not in {"anyOf", "default"}} | _UPLOAD
    changed = {name: _with_files(each, file) for name, each in schema.items()}
    if changed.get("format") == "binary":
        del changed["format"]
        changed |= file
    return changed
