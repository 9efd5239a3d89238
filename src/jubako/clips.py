"""Clips as files: MP4, animated WebP, GIF and a ZIP of PNG frames, with the settings that made them inside.

Frames are arrays [frames, height, width, 3] of bytes. The same frames and job give the same file.
"""

from __future__ import annotations

import io
import itertools
import math
import zipfile
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image

from jubako.job import Job
from jubako.media import encode_image, exif_of, parameters_text, settings_json

__all__ = ["Frames", "encode_clip", "spritesheet", "thumbnail"]

Frames = NDArray[np.uint8]

# x264's scale; 17 can hardly be told from the frames, and 4:2:0 is the one layout that every browser plays.
CRF = "17"
PIXELS = "yuv420p"
BT709 = 1

THUMBNAIL_WIDTH, SPRITE_WIDTH = 512, 256
THUMBNAIL_QUALITY, SHEET_QUALITY = 85, 85


def encode_clip(
    frames: Frames, fps: int, job: Job, facts: Mapping[str, object], output_format: str | None = None
) -> bytes:
    """The clip at ``fps`` frames a second, in the job's format where no other (mp4, webp, gif, zip) is named.

    ``facts`` (the weights' commit) join the settings. Players of WebP and GIF count in thousandths and
    hundredths of a second: frames last as long as comes nearest, the whole as long as it should. GIF has no
    two equal frames on end; the first of them lasts for both.
    """
    encode: Mapping[str, Callable[[Frames, int, Job, Mapping[str, object]], bytes]]
    encode = {"mp4": _mp4, "webp": _webp, "gif": _gif, "zip": _zip}
    return encode[output_format or job.output_format](frames, fps, job, facts)


def thumbnail(frames: Frames) -> bytes:
    """The first frame as a small WebP file."""
    image = _at_most(Image.fromarray(frames[0]), THUMBNAIL_WIDTH)
    return _saved(image, "WEBP", quality=THUMBNAIL_QUALITY)


def spritesheet(frames: Frames) -> bytes:
    """All frames side by side and row by row, each at most 256 pixels wide, as a JPEG file."""
    return _saved(_sheet(frames), "JPEG", quality=SHEET_QUALITY)


def _mp4(frames: Frames, fps: int, job: Job, facts: Mapping[str, object]) -> bytes:
    frames = _even(frames)
    # Without "faststart" the index stands at the end, and a browser plays nothing before it has all of it. To
    # move it the muxer opens its own file again, which needs one on disk.
    options = {"movflags": "faststart", "fflags": "bitexact"}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w", options=options) as container:
            container.metadata["comment"] = settings_json(job, facts)
            container.metadata["description"] = parameters_text(job)
            stream = _h264(container, frames, fps)
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format=PIXELS, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()


def _h264(container: av.container.OutputContainer, frames: Frames, fps: int) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": CRF})
    stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], PIXELS
    # How x264 shares its work changes what comes out, and how many cores there are must not.
    stream.thread_count = 1
    context = stream.codec_context
    # The colours of untagged clips are guessed by players, from the size.
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = ColorRange.MPEG
    return stream


def _webp(frames: Frames, fps: int, job: Job, facts: Mapping[str, object]) -> bytes:  # noqa: ARG001 # no room
    first, *rest = (Image.fromarray(pixels) for pixels in frames)
    return _saved(
        first,
        "WEBP",
        save_all=True,
        append_images=rest,
        duration=_durations(len(frames), fps, 1),
        loop=0,
        quality=job.output_compression,
        exif=exif_of(job),
    )


def _gif(frames: Frames, fps: int, job: Job, facts: Mapping[str, object]) -> bytes:  # noqa: ARG001 # no room
    # One palette for all frames: each with its own would make still areas flicker.
    palette = _sheet(frames).quantize(256, Image.Quantize.MEDIANCUT)
    first, *rest = (Image.fromarray(pixels).quantize(palette=palette) for pixels in frames)
    return _saved(
        first,
        "GIF",
        save_all=True,
        append_images=rest,
        duration=_durations(len(frames), fps, 10),
        loop=0,
        comment=parameters_text(job).encode(),
    )


def _zip(frames: Frames, fps: int, job: Job, facts: Mapping[str, object]) -> bytes:  # noqa: ARG001 # in the job
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # not compressed: PNG files are
        for number, pixels in enumerate(frames, 1):
            # A ZipInfo has a fixed date, where a name alone would get today's.
            entry = zipfile.ZipInfo(f"frame-{number:04}.png")
            archive.writestr(entry, encode_image(Image.fromarray(pixels), job, facts, "png"))
    return buffer.getvalue()


def _even(frames: Frames) -> Frames:
    """The frames with their last column or row doubled where a side is odd: 4:2:0 halves both."""
    _, height, width, _ = frames.shape
    if height % 2 == width % 2 == 0:
        return frames
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _durations(count: int, fps: int, unit: int) -> list[int]:
    """Milliseconds of each frame in whole units, so that their sum is right."""
    ends = [round(1000 * number / fps / unit) * unit for number in range(count + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _sheet(frames: Frames) -> Image.Image:
    sprites = [_at_most(Image.fromarray(pixels), SPRITE_WIDTH) for pixels in frames]
    columns = math.ceil(math.sqrt(len(sprites)))
    rows = math.ceil(len(sprites) / columns)
    width, height = sprites[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, sprite in enumerate(sprites):
        sheet.paste(sprite, (number % columns * width, number // columns * height))
    return sheet


def _at_most(image: Image.Image, width: int) -> Image.Image:
    if image.width <= width:
        return image
    height = max(1, round(image.height * width / image.width))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
