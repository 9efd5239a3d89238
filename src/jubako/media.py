"""Pictures as files: PNG, JPEG and WebP with the settings that made them written inside.

Two forms: the text that AUTOMATIC1111 writes and every gallery reads (PNG chunk ``parameters``, EXIF
``UserComment`` elsewhere), and the whole job as JSON in the PNG chunk ``jubako``.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jubako import __version__
from jubako.job import Job
from jubako.schedulers import resolve_scheduler

__all__ = ["MEDIA_TYPES", "encode_image", "exif_of", "parameters_text", "read_parameters", "settings_json"]

MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "zip": "application/zip",
    "glb": "model/gltf-binary",
    "obj": "model/obj",
    "safetensors": "application/octet-stream",
    "json": "application/json",
}
USER_COMMENT = 0x9286
EXIF_IFD = 0x8769


def parameters_text(job: Job) -> str:
    """The job in AUTOMATIC1111's grammar: prompt, ``Negative prompt:``, then one line of ``Key: value``."""
    choice = resolve_scheduler(job.scheduler)
    pairs: dict[str, object] = {
        "Steps": job.num_inference_steps,
        "Sampler": choice.sampler,
        "Schedule type": choice.schedule,
        "CFG scale": f"{job.guidance_scale:g}",
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model": job.model,
        "RNG": "CPU",
        "Version": f"jubako {__version__}",
    }
    if job.clip is not None:
        pairs |= {"Frames": job.clip.num_frames, "FPS": job.clip.fps}
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def read_parameters(text: str) -> dict[str, str]:
    """The pairs of :func:`parameters_text`, with ``prompt`` and ``negative_prompt`` beside A1111's keys."""
    *lines, last = text.split("\n")
    pairs = re.findall(r'\s*([\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt: ")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt: ")
    found = {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}
    return {"prompt": "\n".join(lines[:start]), "negative_prompt": negative, **found}


def settings_json(job: Job, facts: Mapping[str, object]) -> str:
    """The whole job as JSON; ``facts`` (the weights' commit) join it."""
    return json.dumps({"version": __version__, "job": job.described(), **facts})


def exif_of(job: Job) -> Image.Exif:
    """The parameters as JPEG and WebP carry them."""
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + parameters_text(job).encode("utf-16-be")
    return exif


def encode_image(
    image: Image.Image, job: Job, facts: Mapping[str, object], output_format: str | None = None
) -> bytes:
    """The picture in the job's format, or in that of one frame of it; ``facts`` join the JSON chunk."""
    buffer = io.BytesIO()
    if (output_format or job.output_format) == "png":
        text, info = parameters_text(job), PngInfo()
        info.add_itxt("parameters", text) if not text.isascii() else info.add_text("parameters", text)
        info.add_itxt("jubako", settings_json(job, facts))
        # Level 6 gains a few per cent over level 1 and takes five times as long on photographs.
        image.save(buffer, "PNG", pnginfo=info, compress_level=1)
    else:
        image.save(buffer, job.output_format.upper(), quality=job.output_compression, exif=exif_of(job))
    return buffer.getvalue()
