"""The files of a finished object: its mesh, and the clip of it turning once."""

from __future__ import annotations

from collections.abc import Mapping

from jubako.clips import encode_clip
from jubako.job import Job
from jubako.media import MEDIA_TYPES
from jubako.result import File
from jubako.surface import Surface, encode_surface
from jubako.turntable import turntable

__all__ = ["solid_files"]

CLIPS = ("mp4", "gif")
# The 20 views of a turntable take two seconds.
FPS = 10


def solid_files(
    surface: Surface, job: Job, facts: Mapping[str, object], glb: bytes | None = None
) -> tuple[File, Mapping[str, File]]:
    """What the job asked for, and further files by name.

    A mesh has the variant ``turntable`` (MP4) where the job wants one, a clip the variant ``mesh`` (GLB).
    ``glb`` is the file that the surface was read from, which may hold textures that the surface does not; it
    is given as it is. ``facts`` (the weights' commit) are written into the other files.
    """
    assert job.solid is not None  # noqa: S101 # planning fills it in for every job of an object
    size = job.solid.frame_size

    def mesh(file_format: str) -> File:
        own = glb if file_format == "glb" else None
        content = own or encode_surface(surface, file_format, job, facts)
        return File(content_type=MEDIA_TYPES[file_format], content=content)

    def clip(file_format: str) -> File:
        content = encode_clip(turntable(surface, size), FPS, job, facts, file_format)
        return File(content_type=MEDIA_TYPES[file_format], content=content)

    if job.output_format in CLIPS:
        return clip(job.output_format), {"mesh": mesh("glb")}
    return mesh(job.output_format), {"turntable": clip("mp4")} if job.solid.turntable else {}
