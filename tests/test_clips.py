"""Clips as files: what was put in comes out, at its rate, with its settings inside."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from jubako.clips import Frames, encode_clip, spritesheet, thumbnail
from jubako.job import Clip, Job
from jubako.media import EXIF_IFD, USER_COMMENT, parameters_text, read_parameters

FACTS = {"commit": "abc"}


def frames(count: int = 9, height: int = 48, width: int = 64) -> Frames:
    """A red square that wanders over a slope of blue."""
    clip = np.zeros((count, height, width, 3), np.uint8)
    clip[..., 2] = np.linspace(60, 220, width).astype(np.uint8)
    for number, frame in enumerate(clip):
        frame[8:24, 4 * number : 4 * number + 16] = (220, 40, 40)
    return clip


def job(output_format: str, **fields: Any) -> Job:
    values: dict[str, Any] = {
        "id": "1",
        "task": "txt2vid",
        "family": "video",
        "model": "animatediff",
        "prompt": "ein rotes Quadrat, größer",
        "negative_prompt": "",
        "width": 64,
        "height": 48,
        "num_inference_steps": 25,
        "guidance_scale": 3.0,
        "scheduler": "EulerDiscreteScheduler",
        "seed": 7,
        "output_format": output_format,
        "output_compression": 90,
        "clip": Clip(num_frames=9, fps=7, decode_chunk_size=8),
    }
    return Job.model_validate(values | fields)


def decoded(data: bytes) -> tuple[list[Any], Any]:
    with av.open(io.BytesIO(data), "r") as container:
        (stream,) = container.streams
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], stream


@pytest.mark.parametrize("fps", [1, 7, 30])
def test_an_mp4_has_each_frame_at_its_time_in_its_colours(fps: int) -> None:
    shown = frames()
    data = encode_clip(shown, fps, job("mp4"), FACTS)
    pictures, stream = decoded(data)
    assert len(pictures) == stream.frames == len(shown)
    assert stream.average_rate == fps
    assert stream.duration * stream.time_base == pytest.approx(len(shown) / fps)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    # Half the resolution of colours: compare away from edges.
    inside = np.s_[10:22, 4:12]
    for number, (ours, picture) in enumerate(zip(shown, pictures, strict=True)):
        here = np.s_[inside[0], 4 * number + 3 : 4 * number + 13]
        assert np.abs(ours[here].astype(int) - picture[here]).max() < 16
    # A browser plays what has its index in front.
    assert data.index(b"moov") < data.index(b"mdat")


def test_an_mp4_of_still_frames_keeps_them_all() -> None:
    still = np.repeat(frames(1), 14, axis=0)
    pictures, _ = decoded(encode_clip(still, 7, job("mp4"), FACTS))
    assert len(pictures) == 14


def test_an_mp4_says_how_its_colours_are_meant() -> None:
    _, stream = decoded(encode_clip(frames(), 7, job("mp4"), FACTS))
    context = stream.codec_context
    assert (context.color_primaries, context.color_trc, context.colorspace) == (1, 1, 1)


def test_odd_sides_are_made_even_in_an_mp4() -> None:
    pictures, _ = decoded(encode_clip(frames(3, 47, 63), 7, job("mp4"), FACTS))
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}


def test_an_mp4_carries_its_settings() -> None:
    made = job("mp4")
    with av.open(io.BytesIO(encode_clip(frames(), 7, made, FACTS))) as container:
        told = json.loads(container.metadata["comment"])
        text = container.metadata["description"]
    assert Job.model_validate(told["job"]) == made
    assert told["commit"] == "abc"
    assert text == parameters_text(made)
    assert (read_parameters(text)["Frames"], read_parameters(text)["FPS"]) == ("9", "7")


@pytest.mark.parametrize(("output_format", "off"), [("webp", 90), ("gif", 60)])
def test_animations_last_as_long_as_they_should(output_format: str, off: int) -> None:
    shown = frames()
    image = Image.open(io.BytesIO(encode_clip(shown, 7, job(output_format), FACTS)))
    assert image.format == output_format.upper()
    assert getattr(image, "n_frames", 1) == len(shown)
    assert image.info["loop"] == 0
    duration = 0
    for ours, frame in zip(shown, ImageSequence.Iterator(image), strict=True):
        picture = np.asarray(frame.convert("RGB")).astype(int)
        assert np.abs(ours - picture).mean() < 8
        assert np.abs(ours - picture).max() < off
        duration += frame.info["duration"]
    assert duration == pytest.approx(1000 * len(shown) / 7, abs=5)


def test_webp_and_gif_carry_the_parameters() -> None:
    made = job("webp")
    image = Image.open(io.BytesIO(encode_clip(frames(), 7, made, FACTS)))
    comment = image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be") == parameters_text(made)
    image = Image.open(io.BytesIO(encode_clip(frames(), 7, job("gif"), FACTS)))
    assert image.info["comment"].decode() == parameters_text(made)


def test_a_zip_holds_every_frame_exactly_with_the_settings() -> None:
    shown, made = frames(), job("zip")
    with zipfile.ZipFile(io.BytesIO(encode_clip(shown, 7, made, FACTS))) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names == sorted(names) == [f"frame-{number:04}.png" for number in range(1, 10)]
        for ours, name in zip(shown, names, strict=True):
            image = Image.open(io.BytesIO(archive.read(name)))
            assert np.array_equal(np.asarray(image), ours)
            assert image.info["parameters"] == parameters_text(made)
            assert Job.model_validate(json.loads(image.info["jubako"])["job"]) == made


@pytest.mark.parametrize("output_format", ["mp4", "webp", "gif", "zip"])
def test_the_same_frames_give_the_same_file(output_format: str) -> None:
    one, other = (encode_clip(frames(), 7, job(output_format), FACTS) for _ in range(2))
    assert one == other


def test_another_format_than_the_jobs_can_be_asked_for() -> None:
    assert encode_clip(frames(), 7, job("glb"), FACTS, "gif").startswith(b"GIF89a")


def test_the_thumbnail_is_the_first_frame() -> None:
    shown = frames(2, 600, 1024)
    image = Image.open(io.BytesIO(thumbnail(shown)))
    assert (image.format, image.size) == ("WEBP", (512, 300))
    small = np.asarray(Image.fromarray(shown[0]).resize((512, 300)))
    assert np.abs(small.astype(int) - np.asarray(image.convert("RGB"))).mean() < 4


@pytest.mark.parametrize(
    ("count", "height", "width", "size"),
    [(9, 48, 64, (192, 144)), (8, 48, 64, (192, 144)), (25, 576, 1024, (1280, 720)), (1, 48, 64, (64, 48))],
)
def test_the_spritesheet_shows_all_frames(count: int, height: int, width: int, size: tuple[int, int]) -> None:
    image = Image.open(io.BytesIO(spritesheet(frames(count, height, width))))
    assert (image.format, image.size) == ("JPEG", size)
    across = np.ceil(count**0.5)
    sprite = size[0] / across
    last = int((count - 1) % across * sprite + sprite / 2), int((count - 1) // across * (size[1] / across))
    assert image.convert("RGB").getpixel((last[0], last[1] + 1)) != (0, 0, 0)
