"""From trained parts to a folder that the stock pipeline loads: half precision, safetensors; and back."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from jubako.miniatures.denoiser import SCHEDULE
from jubako.weights.manifest import write_list


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1)


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in half precision; each file is replaced whole, so readers never see half a file."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    halved = copy.deepcopy(pipeline)
    for part in halved.components.values():
        if isinstance(part, nn.Module):
            part.half()
    halved.save_pretrained(partial, safe_serialization=True)
    for path in partial.glob("tokenizer*"):
        _write_vocabulary(path)
    for path in partial.rglob("*config.json"):
        _forget_origin(path)
    for source in sorted(path for path in partial.rglob("*") if path.is_file()):
        source.chmod(0o644)
        target = folder / source.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    shutil.rmtree(partial)
    write_list(folder)


def load(folder: Path, **replaced: Any) -> DiffusionPipeline:
    """The exported pipeline as a server without a GPU runs it: weights widened to float32."""
    pipeline = DiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, **replaced
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _forget_origin(config: Path) -> None:
    """Take out the folder that a part was read from: it means nothing on another machine."""
    values = json.loads(config.read_text())
    if values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_vocabulary(folder: Path) -> None:
    """CLIP's two files of the original layout, beside the single one that transformers writes today."""
    model: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())["model"]
    if model["type"] != "BPE":
        return
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
