"""Pictures that clients send: opened safely, turned upright, brought to size. No torch."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image, ImageOps, UnidentifiedImageError

from jubako.errors import InvalidRequest
from jubako.job import Job
from jubako.request import ResizeMode

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "alpha_varies",
    "composited",
    "opaque",
    "open_mask",
    "open_picture",
    "png",
    "resized",
    "squared",
    "started_from",
]

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000


def open_picture(data: bytes, field: str) -> Image.Image:
    """The picture of a client's file, upright by its EXIF orientation; InvalidRequest names the field."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(field, f"{image.width}x{image.height}")
        if getattr(image, "is_animated", False):
            raise InvalidRequest(f"{field}: an animation is not taken; send one picture of it", param=field)
        image.load()
        return ImageOps.exif_transpose(_eight_bits(image))
    except UnidentifiedImageError as error:
        raise InvalidRequest(
            f"{field}: not a picture that can be read; send one of {', '.join(FORMATS)}", param=field
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(field, "its size") from error
    except _DAMAGED as error:
        # In our own words: those of a library may tell too much.
        raise InvalidRequest(f"{field}: the picture's file is damaged", param=field) from error


# What Pillow's readers raise on files that were cut, changed or made to confuse.
_DAMAGED = (OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, struct.error, zlib.error)


def _too_large(field: str, size: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {size} is past the limit of {MAX_PIXELS} pixels", param=field)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits as those of 8; Pillow's own conversion clips what is brighter than 255."""
    if not image.mode.startswith("I"):
        return image
    image.info.pop("transparency", None)
    return image.convert("I").point(lambda level: level * (1 / 257)).convert("L")


def alpha_varies(image: Image.Image) -> bool:
    """Whether some of the picture is more transparent than the rest."""
    return image.has_transparency_data and _varies(image.convert("RGBA").getchannel("A"))


def opaque(image: Image.Image) -> Image.Image:
    """The picture in RGB, with white behind what is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def open_mask(data: bytes, field: str) -> Image.Image:
    """A mask as grey levels, white where to paint.

    Where the alpha channel varies it is the mask, transparent where to paint; else bright is where to paint.
    A mask that is the same everywhere is refused: it is nearly always the wrong file.
    """
    image = open_picture(data, field)
    if alpha_varies(image):
        return ImageOps.invert(image.convert("RGBA").getchannel("A"))
    mask = image.convert("RGB").convert("L")
    if not _varies(mask):
        raise InvalidRequest(
            f"{field}: the mask is the same everywhere; make what to paint transparent, or white on black",
            param=field,
        )
    return mask


def resized(image: Image.Image, size: tuple[int, int], mode: ResizeMode) -> Image.Image:
    """The picture at this size: distorted with ``exact``, else scaled to cover it and cropped evenly."""
    if image.size == size:
        return image
    if mode == "exact":
        return image.resize(size, Image.Resampling.LANCZOS)
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def squared(image: Image.Image, side: int) -> Image.Image:
    """The whole picture in the middle of a white square of this side."""
    return ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color="white")


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file, quickly made."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def composited(image: Image.Image, job: Job) -> Image.Image:
    """A finished picture inside of its job's mask, the job's own picture outside; without a mask as it is."""
    if job.image is None or job.mask is None:
        return image
    original, mask = Image.open(io.BytesIO(job.image)), Image.open(io.BytesIO(job.mask))
    return Image.composite(image, original, mask)


def started_from(job: Job, picture: bytes) -> Job:
    """The job with the picture that its source has made, brought to size."""
    image = resized(opaque(open_picture(picture, "image")), (job.width, job.height), "cover")
    return job.model_copy(update={"image": png(image), "source": None})


def _varies(channel: Image.Image) -> bool:
    return len(set(channel.getextrema())) > 1
