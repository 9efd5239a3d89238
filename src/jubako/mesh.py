"""What clients ask of 3D models: an object from a prompt, or from a picture."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import AliasChoices, Field

from jubako.request import PictureBytes, Request, Task

__all__ = ["ImageToMesh", "MeshFormat", "MeshRequest", "TextToMesh"]

MeshFormat = Literal["glb", "obj", "mp4", "gif"]


class MeshRequest(Request):
    """What all objects have: a model, the grid of the surface, the turntable."""

    task: ClassVar[Task]

    model: str | None = Field(default=None, description="A 3D model's name; unset: the first that fits")
    num_inference_steps: int | None = Field(
        default=None,
        gt=0,
        description="Denoising steps",
        validation_alias=AliasChoices("num_inference_steps", "steps"),
    )
    guidance_scale: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="How strongly the prompt or the picture steers",
        validation_alias=AliasChoices("guidance_scale", "cfg_scale"),
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="The same seed gives the same object; unset: drawn"
    )
    grid_size: int | None = Field(
        default=None,
        ge=8,
        description="Cells of the surface's grid along each side; more are finer and slower",
    )
    frame_size: int | None = Field(
        default=None, gt=0, description="Pixels of a side of the turntable's views"
    )
    turntable: bool = Field(
        default=False, description="Make a clip of the object turning once beside the mesh"
    )
    output_format: MeshFormat = Field(
        default="glb", description="glb and obj are meshes; mp4 and gif are the turntable"
    )


class ImageToMesh(MeshRequest):
    """A picture of one object on a plain or transparent background."""

    task: ClassVar[Task] = "img2mesh"

    image: PictureBytes = Field(description="The picture: an upload, base64 or a data: URL")


class TextToMesh(MeshRequest):
    """A prompt of one object: by a model that reads text, or by a picture that is drawn first."""

    task: ClassVar[Task] = "txt2mesh"

    prompt: str = Field(description="What the object is")
    negative_prompt: str | None = Field(
        default=None, description="What the picture that is drawn first should not show"
    )
    image_model: str | None = Field(
        default=None, description="The model that draws a picture first; unset: only where one is needed"
    )
    image_num_inference_steps: int | None = Field(
        default=None, gt=0, description="Denoising steps of the picture that is drawn first"
    )
    image_guidance_scale: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Guidance of the picture that is drawn first"
    )
