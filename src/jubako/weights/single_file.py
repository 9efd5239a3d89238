"""Parts that are read from one checkpoint of a whole model, in the layouts of the original trainers.

diffusers knows how their tensors are named and turns them into its own; the config comes from a folder of a
model with the same networks, so nothing is asked of the network. A part that the file does not hold can still
come from that folder: some SD3 files hold no text encoders.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jubako.errors import UnusableWeights
from jubako.memory import out_of_memory
from jubako.weights.checkpoint import digest, tensors
from jubako.weights.parts import beginning, bytes_in, identity, placed
from jubako.weights.siblings import DENOISER

__all__ = ["SingleFilePart", "holds"]

# SD 1 and 2; SDXL; its refiner, whose only text encoder is the second; SD3.
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": (DENOISER,),
    "transformer": (DENOISER,),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    "text_encoder_2": (
        "conditioner.embedders.1.model.",
        "conditioner.embedders.0.model.",
        "text_encoders.clip_g.",
    ),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}

# SD3's first text encoder mostly has none in a file: it is 1 then.
_CLIP_L_PROJECTION = "text_encoders.clip_l.transformer.text_projection.weight"

# What ComfyUI puts beside eight-bit weights that stand for others: each is to be multiplied by its scale.
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")


@dataclass(frozen=True)
class SingleFilePart:
    """A component of a checkpoint, with the config of a folder."""

    name: str
    model: str
    file: Path
    folder: Path
    cls: type[Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def key(self) -> Hashable:
        where = (str(self.dtype), str(self.device))
        return (*identity(self.cls, self.folder / self.name), *where, (digest(self.file), self.name))

    @property
    def bytes(self) -> int:
        prefixes = _PREFIXES[self.name]
        own = {name: header for name, header in tensors(self.file).items() if name.startswith(prefixes)}
        return bytes_in(own, self.dtype, self.cls)

    def read(self) -> torch.nn.Module:
        try:
            module = self._converted()
        except NotImplementedError as error:  # a tensor that got no content can't be moved
            raise self._unusable("It lacks tensors") from error
        except Exception as error:
            if out_of_memory(error):
                raise
            raise self._unusable(beginning(error)) from error
        missing = [name for name, tensor in module.named_parameters() if tensor.is_meta]
        if missing:
            raise self._unusable(f"It lacks {len(missing)} tensors, such as {missing[0]}")
        return placed(module, self.device)

    def _unusable(self, why: str) -> UnusableWeights:
        return UnusableWeights(
            f"{self.file}: the {self.name} of {self.model} can't be read with the config in {self.folder}. "
            f"weights.config may name a model that fits better. {why}"
        )

    def _converted(self) -> torch.nn.Module:
        from diffusers import pipelines
        from diffusers.loaders.single_file import load_single_file_sub_model
        from safetensors.torch import load_file

        checkpoint = load_file(self.file)
        self._refuse_what_is_not_understood(checkpoint)
        projection = checkpoint.get(_CLIP_L_PROJECTION)
        module: Any = load_single_file_sub_model(
            library_name=self.cls.__module__.partition(".")[0],
            class_name=self.cls.__name__,
            name=self.name,
            checkpoint=checkpoint,
            pipelines=pipelines,
            is_pipeline_module=False,
            cached_model_config_path=str(self.folder),
            local_files_only=True,
            torch_dtype=self.dtype,
        )
        if self.name == "text_encoder" and projection is not None:
            # diffusers puts 1 there whatever the file holds.
            module.text_projection.weight = torch.nn.Parameter(projection.to(self.dtype))
        if self._is_of_transformers:
            module.tie_weights()  # a tensor with two names may be there under one, or twice
        result: torch.nn.Module = module
        return result

    @property
    def _is_of_transformers(self) -> bool:
        from transformers import PreTrainedModel

        return issubclass(self.cls, PreTrainedModel)

    def _refuse_what_is_not_understood(self, checkpoint: Mapping[str, torch.Tensor]) -> None:
        """ValueError for weights that diffusers would take for what they are not.

        It reads the folder's text encoder in place of one whose names it doesn't know.
        """
        from diffusers.loaders.single_file_utils import is_clip_model_in_single_file, is_t5_in_single_file

        own = [name for name in checkpoint if name.startswith(_PREFIXES[self.name])]
        if scale := next((name for name in own if name.endswith(_SCALES)), None):
            raise ValueError(f"Its weights are to be multiplied by scales, which is not supported: {scale}")
        known = is_clip_model_in_single_file(self.cls, checkpoint) or is_t5_in_single_file(checkpoint)
        if self._is_of_transformers and not known:
            raise ValueError(f"Its tensors have unknown names, such as {own[0]}")


def holds(file: Path, name: str) -> bool:
    """Whether the checkpoint has tensors of that component."""
    prefixes = _PREFIXES.get(name)
    return prefixes is not None and any(tensor.startswith(prefixes) for tensor in tensors(file))
