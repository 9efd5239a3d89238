"""A request and the catalog give a job: the model resolved, every field filled and legal, the seed drawn."""

from __future__ import annotations

from jubako.catalog import Catalog
from jubako.clip import ClipRequest, ImageToVideo, TextToVideo
from jubako.job import Job
from jubako.mesh import ImageToMesh, MeshRequest, TextToMesh
from jubako.planning.clips import plan_clip
from jubako.planning.meshes import plan_mesh
from jubako.planning.pictures import plan_picture
from jubako.request import ImageToImage, Inpaint, Task, TextToImage

__all__ = ["REQUESTS", "AnyRequest", "plan"]

AnyRequest = TextToImage | ClipRequest | MeshRequest

REQUESTS: dict[Task, type[AnyRequest]] = {
    kind.task: kind
    for kind in (TextToImage, ImageToImage, Inpaint, ImageToVideo, TextToVideo, ImageToMesh, TextToMesh)
}
"""What each task takes."""


def plan(request: AnyRequest, catalog: Catalog, default_model: str | None = None) -> Job:
    """Resolve a request into a job; raises UnknownModel, or InvalidRequest that names field and choices.

    With a picture to start from this decodes and scales it, which takes a moment.
    """
    if isinstance(request, ClipRequest):
        return plan_clip(request, catalog, default_model)
    if isinstance(request, MeshRequest):
        return plan_mesh(request, catalog, default_model)
    return plan_picture(request, catalog, default_model)
