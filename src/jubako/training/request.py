"""What a client asks of a fine-tuning: unset fields stay unset, unknown ones are refused. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, Field

from jubako.request import ADAPTER_NAME, PictureBytes, Request

__all__ = ["FineTuning", "Method", "Targets", "TrainingRequest"]

Method = Literal["dreambooth-lora", "textual-inversion"]
Targets = Literal["attention", "transformer", "all"]


def _words(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that can't be printed")
    words = " ".join(text.split())
    if not words:
        raise ValueError("it is empty")
    return words


Text = Annotated[str, Field(max_length=400), AfterValidator(_words)]


class TrainingRequest(Request):
    """Which model is to learn which word for which subject, and how; unset fields are the model's choice."""

    model: str = Field(
        description="The model to train, by its name in the catalog",
        validation_alias=AliasChoices("model", "base"),
    )
    trigger: str = Field(
        max_length=32,
        pattern=r"^[a-z][a-z0-9-]*[a-z0-9]$",
        description="The new word that stands for the subject: lower-case letters, digits, hyphens",
    )
    class_noun: Annotated[Text, Field(max_length=64)] = Field(
        description="What kind of thing the subject is, as `dog` or `shape`"
    )
    method: Method = Field(
        default="dreambooth-lora",
        description="`dreambooth-lora` trains layers of the denoiser, `textual-inversion` the word alone",
    )
    rank: int | None = Field(
        default=None, ge=1, le=128, description="Rank of the LoRA; its alpha is the same"
    )
    targets: Targets | None = Field(
        default=None,
        description="Layers that the LoRA touches: `attention`, the whole `transformer` blocks, or `all`, "
        "convolutions too",
    )
    vectors: int | None = Field(
        default=None, ge=1, le=16, description="Textual inversion: how many tokens the word becomes"
    )
    steps: int | None = Field(default=None, ge=1, le=20_000, description="Optimizer's steps")
    learning_rate: float | None = Field(
        default=None, gt=0, le=0.1, description="AdamW's rate after a warm-up"
    )
    batch_size: int | None = Field(
        default=None, ge=1, le=32, description="Pictures of the subject a step, and as many of its class"
    )
    prior_preservation: bool | None = Field(
        default=None, description="Train on the model's own pictures of the class too, so that it keeps them"
    )
    prior_weight: float | None = Field(default=None, gt=0, le=10, description="Weight of the class's loss")
    class_pictures: int | None = Field(
        default=None, ge=1, le=1000, description="Pictures of the class that the model draws beforehand"
    )
    sample_steps: int | None = Field(
        default=None,
        ge=1,
        le=150,
        description="Denoising steps of the pictures that the training draws; unset: half the model's own",
    )
    captions: tuple[Text, ...] | None = Field(
        default=None,
        description="What each picture shows, in the pictures' order, with the trigger in it; unset: "
        "`a TRIGGER CLASS_NOUN` for all",
    )
    class_prompts: tuple[Text, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="What the class's pictures are drawn of, in turn; unset: `a CLASS_NOUN`, for a miniature "
        "what its world has",
    )
    resolution: int | None = Field(
        default=None, ge=32, le=2048, description="Side in pixels of the squares that are trained on"
    )
    views: int | None = Field(
        default=None, ge=1, le=16, description="How often each picture is taken, moved a little; 1: as it is"
    )
    flips: bool = Field(default=False, description="Add the pictures mirrored; not for writing or faces")
    min_snr_gamma: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Min-SNR weighting of the loss for epsilon and velocity models; 0: none",
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Of all chance in it; unset: drawn")
    validation_prompt: Text | None = Field(
        default=None, description="Of the pictures on the way; unset: `a TRIGGER CLASS_NOUN`"
    )
    validation_every: int | None = Field(
        default=None, ge=0, description="Steps between two validation pictures; 0: none; unset: four in all"
    )
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="Steps between two checkpoints; unset: ten in all"
    )


class FineTuning(TrainingRequest):
    """``POST /v1/fine_tuning/jobs``: the request with its pictures, and what becomes of both."""

    images: tuple[PictureBytes, ...] = Field(
        default=(),
        description="3 to 50 pictures of the subject, or a zip of them: uploads, base64 or data: URLs",
        validation_alias=AliasChoices("images", "image"),
    )
    name: str | None = Field(
        default=None, pattern=ADAPTER_NAME, description="The adapter's name; unset: the trigger"
    )
    keep_images: bool = Field(
        default=False,
        description="Keep the pictures beside the adapter; otherwise they are deleted at the end",
    )
