"""``POST /v1/images/compare``: one prompt on several models, as single pictures and as one contact sheet."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Sequence
from typing import Any

import bentoml
from fastapi import FastAPI
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jubako.compare import Cell, Comparison
from jubako.errors import TimedOut
from jubako.pictures import png
from jubako.result import Result
from jubako.services.bodies import read_request
from jubako.services.openai import picture_fields
from jubako.services.openapi import taken
from jubako.sheet import contact_sheet

__all__ = ["add_comparison"]

_SHOWN = {"num_inference_steps": "{} steps", "guidance_scale": "guidance {}", "strength": "strength {}"}

Row = Sequence[Cell]


def add_comparison(app: FastAPI) -> None:
    """Give the application the route."""
    app.add_api_route(
        "/v1/images/compare",
        _compare_images,
        methods=["POST"],
        response_model=None,
        openapi_extra=taken(Comparison),
    )


async def _compare_images(body: Request) -> Response:
    """The same prompt and seed on several models; every picture is planned before any is made."""
    request = await read_request(body, Comparison)
    gateway = bentoml.get_current_service()
    rows = await gateway.admission.comparison(request)
    limit = gateway.settings.timeout
    try:
        async with asyncio.timeout(limit):
            results = await _run(gateway.families, rows)
    except TimeoutError as error:
        raise TimedOut(f"not all pictures after {limit:g} s; cancelled") from error
    sheet = await asyncio.to_thread(_sheet, request, rows, results)
    return JSONResponse(
        {
            "created": int(time.time()),
            "seed": rows[0][0].job.seed,
            "sheet": {
                "b64_json": base64.b64encode(png(sheet)).decode(),
                "width": sheet.width,
                "height": sheet.height,
            },
            "data": [_entry(cell, results[cell.job.id]) for row in rows for cell in row],
            "warnings": list(
                dict.fromkeys(
                    f"{cell.model}: {text}" for row in rows for cell in row for text in cell.job.warnings
                )
            ),
        }
    )


async def _run(families: Any, rows: Sequence[Row]) -> dict[str, Result]:
    """Results by job. Families work at once, but the models of one in turn: they may not fit side by side."""
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(row[0].job.family, []).append(row)

    async def in_turn(its: list[Row]) -> list[Result]:
        return [result for row in its for result in await families.run_all([cell.job for cell in row])]

    tasks = [asyncio.ensure_future(in_turn(its)) for its in by_family.values()]
    try:
        done = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return {result.job_id: result for results in done for result in results}


def _sheet(request: Comparison, rows: Sequence[Row], results: dict[str, Result]) -> Image.Image:
    axis = request.axis
    columns = [_SHOWN.get(axis.field, "{}").format(cell.value) if axis else "" for cell in rows[0]]
    first = rows[0][0].job
    told = f"negative prompt: {first.negative_prompt} · " if first.negative_prompt else ""
    return contact_sheet(
        [[Image.open(io.BytesIO(results[cell.job.id].content)) for cell in row] for row in rows],
        [row[0].model for row in rows],
        columns,
        first.prompt,
        f"{told}seed {first.seed}",
    )


def _entry(cell: Cell, result: Result) -> dict[str, Any]:
    return {
        "model": cell.model,
        "value": cell.value,
        **picture_fields(result),
        "settings": cell.job.described(),
        "warnings": list(cell.job.warnings),
    }
