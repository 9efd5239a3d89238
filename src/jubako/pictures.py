"""Pictures that clients send: opened safely, turned upright, brought to size. No torch."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from jubako.errors import InvalidRequest
from jubako.request import ResizeMode

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "has_transparency",
    "opaque",
    "open_mask",
    "open_picture",
    "png",
    "resized",
]

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000


def open_picture(data: bytes, field: str) -> Image.Image:
    """The picture of a client's file, upright by its EXIF orientation; InvalidRequest names the field."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise InvalidRequest(
                f"{field}: {image.width}x{image.height} is past the limit of {MAX_PIXELS} pixels", param=field
            )
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise InvalidRequest(
            f"{field}: not a picture that can be read; send one of {', '.join(FORMATS)}", param=field
        ) from error
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(f"{field}: the picture's file is damaged: {error}", param=field) from error


def has_transparency(image: Image.Image) -> bool:
    """Whether any pixel is not opaque."""
    if not image.has_transparency_data:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(lowest < 255)  # type: ignore[operator] # one channel has plain extrema


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
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if alpha is not None and len(set(alpha.getextrema())) > 1:
        return ImageOps.invert(alpha)
    mask = image.convert("RGB").convert("L")
    if len(set(mask.getextrema())) == 1:
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


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file, quickly made."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
