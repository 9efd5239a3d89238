"""``/v1/adapters``: the LoRAs that requests can name, to be listed, looked at, sent and removed."""

from __future__ import annotations

import asyncio
import hashlib
from typing import IO, Annotated, Any

import bentoml
from fastapi import FastAPI
from pydantic import AfterValidator, Field
from starlette.requests import Request as Body
from starlette.responses import JSONResponse, Response

from jubako.adapters.store import MAX_BYTES, Adapter, AdapterStore
from jubako.errors import UnusableWeights
from jubako.request import Request
from jubako.services.bodies import read_upload
from jubako.services.jobs import page_of
from jubako.services.openapi import taken

__all__ = ["AdapterUpload", "add_adapters"]


def _printable(text: str) -> str:
    # What a stranger sends is shown on the terminal of whoever lists the adapters.
    if not text.isprintable():
        raise ValueError("take one line of text without control characters")
    return text


Line = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]


class AdapterUpload(Request):
    """What ``POST /v1/adapters`` takes beside the file."""

    name: str | None = Field(
        default=None, description="What requests call it; unset: `adapter-` and the beginning of its SHA-256"
    )
    base: Line | None = Field(
        default=None, description="The model that it was made for; models of other families refuse it"
    )
    trigger: Line | None = Field(
        default=None,
        description="The word that calls for it: for people, and where an embedding that is listed stands",
    )


def add_adapters(app: FastAPI) -> None:
    """Give the application the routes."""
    app.add_api_route("/v1/adapters", _list, methods=["GET"], response_model=None)
    app.add_api_route(
        "/v1/adapters",
        _add,
        methods=["POST"],
        response_model=None,
        openapi_extra=taken(AdapterUpload, file=True),
    )
    app.add_api_route("/v1/adapters/{name}", _show, methods=["GET"], response_model=None)
    app.add_api_route("/v1/adapters/{name}", _remove, methods=["DELETE"], response_model=None)


def _store() -> AdapterStore:
    store: AdapterStore = bentoml.get_current_service().adapters
    return store


async def _list() -> Response:
    """The adapters that are here, by name."""
    entries = await asyncio.to_thread(_listed, _store())
    return page_of(entries, len(entries))


async def _show(name: str) -> Response:
    """One adapter, with its whole card."""
    return JSONResponse(await asyncio.to_thread(lambda store: _shown(store.find(name)), _store()))


async def _add(body: Body) -> Response:
    """Take in a LoRA or an embedding; 201 once requests can name it."""
    async with read_upload(body, AdapterUpload, MAX_BYTES) as (upload, content):
        adapter = await asyncio.to_thread(_taken_in, _store(), upload, content)
        shown = await asyncio.to_thread(_shown, adapter)
    return JSONResponse(shown, 201, {"Location": f"/v1/adapters/{adapter.name}"})


async def _remove(name: str) -> Response:
    """Delete an adapter."""
    await asyncio.to_thread(_store().remove, name)
    return JSONResponse({"id": name, "object": "adapter", "deleted": True})


def _taken_in(store: AdapterStore, upload: AdapterUpload, content: IO[bytes]) -> Adapter:
    name = upload.name
    if name is None:
        content.seek(0)
        name = f"adapter-{hashlib.file_digest(content, 'sha256').hexdigest()[:12]}"  # type: ignore[arg-type] # it is one
    return store.take_in(name, content, upload.model_dump(include={"base", "trigger"}, exclude_none=True))


def _listed(store: AdapterStore) -> list[dict[str, Any]]:
    entries = []
    for adapter in store:
        try:
            entries.append(_described(adapter))
        except (OSError, UnusableWeights):
            continue  # it was removed meanwhile
    return entries


def _shown(adapter: Adapter) -> dict[str, Any]:
    return {**_described(adapter), "card": adapter.card}


def _described(adapter: Adapter) -> dict[str, Any]:
    return {
        "id": adapter.name,
        "object": "adapter",
        "name": adapter.name,
        "kind": adapter.kind,
        "created": int(adapter.file.stat().st_mtime),
        "bytes": adapter.bytes,
        "sha256": adapter.sha256,
        "base": adapter.base,
        "trigger": adapter.card.get("trigger"),
    }
