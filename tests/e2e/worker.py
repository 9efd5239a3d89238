"""The smallest worker: a cube in the mean colour of the picture. ``python worker.py PORT`` serves it.

It needs nothing of Jubako, as workers do.
"""

from __future__ import annotations

import io
import sys

import trimesh
import uvicorn
from PIL import Image, UnidentifiedImageError
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

__all__ = ["app", "cube", "mean_colour"]


def mean_colour(picture: bytes) -> tuple[int, int, int]:
    """The mean of a picture's pixels, each part from 0 to 255."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    red, green, blue = image.resize((1, 1), Image.Resampling.BOX).tobytes()
    return red, green, blue


def cube(colour: tuple[int, int, int]) -> bytes:
    """A GLB of a cube of side 1, painted with these (linear) values."""
    mesh = trimesh.creation.box((1, 1, 1))
    mesh.visual.vertex_colors = [*colour, 255]
    return bytes(mesh.export(file_type="glb"))


async def generate(request: Request) -> Response:
    """One picture in, one object out."""
    async with request.form() as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            return _refused("image: missing")
        picture = await image.read()
    try:
        colour = mean_colour(picture)
    except UnidentifiedImageError:
        return _refused("image: not a picture that can be read")
    return Response(cube(colour), media_type="model/gltf-binary")


async def health(_: Request) -> Response:
    """It is well whenever it answers."""
    return JSONResponse({"status": "ok"})


def _refused(message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": "image", "code": "invalid_value"}
    return JSONResponse({"error": error}, status_code=400)


app = Starlette(routes=[Route("/generate", generate, methods=["POST"]), Route("/health", health)])


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
