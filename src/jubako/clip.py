"""What clients ask of video models: a clip from a picture, or from a prompt by way of a picture."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import AliasChoices, Field

from jubako.request import PictureBytes, Request, ResizeMode, Task

__all__ = ["ClipFormat", "ClipRequest", "ImageToVideo", "TextToVideo"]

ClipFormat = Literal["mp4", "webp", "gif", "zip"]


class ClipRequest(Request):
    """What all clips have: a model, a size, how many frames and how much motion."""

    task: ClassVar[Task]

    model: str | None = Field(default=None, description="A video model's name; unset: the first that fits")
    width: int | None = Field(default=None, gt=0, description="Pixels; unset: the model's own size")
    height: int | None = Field(default=None, gt=0, description="Pixels; unset: the model's own size")
    num_frames: int | None = Field(default=None, gt=0, description="Frames of the clip")
    fps: int | None = Field(default=None, gt=0, description="Frames a second; the model is told as well")
    motion_bucket_id: int | None = Field(
        default=None, ge=0, description="How much moves: the higher the more, 127 as in training"
    )
    noise_aug_strength: float | None = Field(
        default=None, ge=0, le=10, description="Noise on the picture; more of it frees the motion from it"
    )
    min_guidance_scale: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Guidance of the first frame"
    )
    max_guidance_scale: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Guidance of the last frame",
        validation_alias=AliasChoices("max_guidance_scale", "guidance_scale", "cfg_scale"),
    )
    decode_chunk_size: int | None = Field(
        default=None, gt=0, description="Frames decoded at a time; fewer take less memory and may flicker"
    )
    num_inference_steps: int | None = Field(
        default=None,
        gt=0,
        description="Denoising steps",
        validation_alias=AliasChoices("num_inference_steps", "steps"),
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="The same seed gives the same clip; unset: drawn"
    )
    output_format: ClipFormat = Field(
        default="mp4", description="The clip's file format; zip holds the frames as PNG files"
    )
    output_compression: int = Field(default=90, ge=0, le=100, description="The quality of WebP, in per cent")


class ImageToVideo(ClipRequest):
    """A picture to set in motion."""

    task: ClassVar[Task] = "img2vid"

    image: PictureBytes = Field(description="The picture: an upload, base64 or a data: URL")
    resize_mode: ResizeMode = Field(
        default="cover",
        description="When sizes differ: cover fills and crops, fit changes the asked size, exact distorts",
    )


class TextToVideo(ClipRequest):
    """A prompt to film: by a model that reads text, or by a picture that is drawn first."""

    task: ClassVar[Task] = "txt2vid"

    prompt: str = Field(description="What the clip shows")
    negative_prompt: str | None = Field(default=None, description="What it should not show")
    image_model: str | None = Field(
        default=None, description="The model that draws the first frame; unset: the default model"
    )
    image_num_inference_steps: int | None = Field(
        default=None, gt=0, description="Denoising steps of the picture that is drawn first"
    )
    image_guidance_scale: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Guidance of the picture that is drawn first"
    )
