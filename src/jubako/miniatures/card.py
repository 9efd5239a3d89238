"""The model card that lies beside the weights, written from the figures of the training."""

from __future__ import annotations

from typing import Any

from jubako.miniatures.motion import FARTHEST
from jubako.miniatures.world import COLOURS, PLACES, RELATIONS, SHAPES, SIZES

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

{opening} {megabytes:.1f} MB; 64 x 64 pixels; weights in half precision. It follows prompts, so that a server
can be tried, and its pictures judged, without a GPU or a download.

Ask it in these words:

    a [{sizes}] <colour> <shape> on the <place> of a <colour> background
    a [{sizes}] <colour> <shape> <relation> a [{sizes}] <colour> <shape> on a <colour> background

- colours: {colours}
- shapes: {shapes}
- places: {places} ("in the center of")
- relations: {relations}

An object never has the background's colour. Say all of it: without the background or the place it errs more.

## Figures

{prompts} fresh prompts of each kind, {steps} steps, guidance {guidance}, {scheduler}, judged by pixels:

{table}
{further}
## Limits

It knows this world and nothing else: other words are read as noise, three objects or other sizes of picture
were never shown to it. Trained on a CPU with `scripts/train_miniatures`; settings, steps, seconds, losses and
versions are in `training.json`. No third party's pictures or weights went in. Licence: Apache-2.0.
"""
_CLIP_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-video
---

# {name}

{opening} {megabytes:.1f} MB; {frames} frames of 64 x 64 pixels; weights in half precision. It sets a picture
in motion, so that a server can be tried, and its clips judged, without a GPU or a download.

Give it a picture of one object as tiny-sd draws it: a {shapes}, on the left, right, top, bottom or in the
center of a plain background of another colour ({colours}). The object glides to the right, or to the left
when it stands on the right. How far, `motion_bucket_id` says, from nothing (0) to {farthest:.0%} of the side
(255). The frame rate and the seed change next to nothing.

## Figures

{clips} fresh pictures, motion spread evenly over 0 to 255, {steps} steps, guidance {min_guidance_scale} to
{guidance}, fps {fps}, {scheduler}, judged by pixels:

{table}

Rank correlation (Spearman) of the distance gone with `motion_bucket_id`: {spearman:.3f}.

## Limits

It knows this world and nothing else: other pictures, two objects, other sizes, other numbers of frames and
other noise augmentations than {noise_aug_strength} were never shown to it. Trained on a CPU with
`scripts/train_miniatures`; settings, steps, seconds, losses and versions are in `training.json`. No third
party's pictures or weights went in. Licence: Apache-2.0.
"""
_OPENINGS = {
    "tiny-sd": """\
A Stable Diffusion in the exact folder layout of `StableDiffusionPipeline`, trained from nothing on drawn and
captioned coloured shapes.""",
    "tiny-sdxl": """\
A Stable Diffusion XL in the exact folder layout of `StableDiffusionXLPipeline`: two text encoders, a pooled
caption and micro-conditioning. Grown out of `tiny-sd` and trained on with captioned coloured shapes, some of
them cropped or blown up.""",
    "tiny-sdxl-lightning": """\
`tiny-sdxl` distilled to four steps without guidance, in the exact folder layout of
`StableDiffusionXLPipeline`. Only the UNet differs from its teacher's; every other part is the same file. Ask
for exactly 4 steps and guidance 0.""",
    "tiny-sd3": """\
A Stable Diffusion 3 in the exact folder layout of `StableDiffusion3Pipeline`: an MMDiT trained from nothing
on drawn and captioned coloured shapes, 16 latent channels and three text encoders, of which the T5 may be
dropped. Ask with `max_sequence_length=32`.""",
    "tiny-svd": """\
A Stable Video Diffusion in the exact folder layout of `StableVideoDiffusionPipeline`. Its autoencoder speaks
tiny-sd's latents; its UNet and image encoder were trained on drawn clips of one moving coloured shape.""",
}
_PARTS = {
    "ok": "all right",
    "count": "number of objects",
    "colour": "colours",
    "shape": "shapes",
    "size": "sizes",
    "background": "background",
    "position": "place or relation",
}
_CLIP_PARTS = {
    "ok": "all right",
    "kept": "colour, shape and background kept in every frame",
    "first": "first frame is the picture",
    "straight": "straight and even way",
}


def card(name: str, report: dict[str, Any], size_bytes: int) -> str:
    """The card of the miniature of this name with this training report."""
    evaluation = report["evaluation"]
    if "clips" in evaluation:
        return _clip_card(name, evaluation, size_bytes)
    columns = [("one object", evaluation["one_object"]), ("two objects", evaluation["two_objects"])]
    if without := report.get("evaluation_without_t5"):
        columns += [("one, no T5", without["one_object"]), ("two, no T5", without["two_objects"])]
    return _CARD.format(
        name=name,
        opening=_OPENINGS[name],
        megabytes=size_bytes / 1e6,
        sizes="|".join(SIZES),
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
        places=", ".join(PLACES),
        relations=", ".join(RELATIONS),
        prompts=evaluation["prompts_each"],
        steps=evaluation["steps"],
        guidance=evaluation["guidance"],
        scheduler=evaluation["scheduler"],
        table=_table(columns),
        further="".join(f"\n{sentence}\n" for sentence in _further(report)),
    )


def _clip_card(name: str, evaluation: dict[str, Any], size_bytes: int) -> str:
    return _CLIP_CARD.format(
        **evaluation | {"frames": evaluation["num_frames"]},
        name=name,
        opening=_OPENINGS[name],
        megabytes=size_bytes / 1e6,
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        farthest=FARTHEST,
        table=_table([("share of clips", evaluation)], _CLIP_PARTS),
    )


def _table(columns: list[tuple[str, dict[str, float]]], parts: dict[str, str] = _PARTS) -> str:
    head = ["" if parts is _CLIP_PARTS else "share of pictures", *(title for title, _ in columns)]
    rows = [[label, *(f"{shares[part]:.1%}" for _, shares in columns)] for part, label in parts.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _further(report: dict[str, Any]) -> list[str]:
    sentences = []
    if shares := report.get("share_of_teacher"):
        one, two = shares["one_object"], shares["two_objects"]
        sentences.append(f"That is {one:.1%} (one object) and {two:.1%} (two) of what its teacher reaches.")
    if autoencoder := report.get("autoencoder"):
        gate = autoencoder["gate"]
        sentences.append(
            f"The autoencoder alone: {gate['ok']:.1%} of {gate['scenes']} reconstructions are read right."
        )
    return sentences
