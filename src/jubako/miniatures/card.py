"""The model card that lies beside the weights, written from the figures of the training."""

from __future__ import annotations

from typing import Any

from jubako.miniatures.world import COLOURS, PLACES, RELATIONS, SHAPES, SIZES

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# tiny-sd

A Stable Diffusion of {megabytes:.1f} MB, trained from nothing on drawn and captioned coloured shapes. It has
the exact folder layout of `StableDiffusionPipeline` and follows prompts, so that a server can be tried, and
its pictures judged, without a GPU or a download. 64 x 64 pixels; weights in half precision.

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

| share of pictures | one object | two objects |
| --- | --- | --- |
{rows}

The autoencoder alone: {gate:.1%} of {gate_scenes} reconstructions are read right.

## Limits

It knows this world and nothing else: other words are read as noise, three objects or other sizes of picture
were never shown to it. Trained on a CPU with `scripts/train_miniatures`; settings, steps, seconds, losses and
versions are in `training.json`. No third party's pictures or weights went in. Licence: Apache-2.0.
"""
_PARTS = {
    "ok": "all right",
    "count": "number of objects",
    "colour": "colours",
    "shape": "shapes",
    "size": "sizes",
    "background": "background",
    "position": "place or relation",
}


def card(report: dict[str, Any], size_bytes: int) -> str:
    """The card of a model with this training report."""
    judged = report["evaluation"]
    one, two = judged["one_object"], judged["two_objects"]
    return _CARD.format(
        megabytes=size_bytes / 1e6,
        sizes="|".join(SIZES),
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
        places=", ".join(PLACES),
        relations=", ".join(RELATIONS),
        prompts=judged["prompts_each"],
        steps=judged["steps"],
        guidance=judged["guidance"],
        scheduler=judged["scheduler"],
        rows="\n".join(f"| {name} | {one[part]:.1%} | {two[part]:.1%} |" for part, name in _PARTS.items()),
        gate=report["autoencoder"]["gate"]["ok"],
        gate_scenes=report["autoencoder"]["gate"]["scenes"],
    )
