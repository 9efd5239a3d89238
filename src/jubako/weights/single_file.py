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
        except torch.OutOfMemoryError:
            raise
        except NotImplementedError as error:  # a tensor that got no content can't be moved
            raise self._unusable("It lacks tensors") from error
        except Exception as error:
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

        module: torch.nn.Module = load_single_file_sub_model(
            library_name=self.cls.__module__.partition(".")[0],
            class_name=self.cls.__name__,
            name=self.name,
            checkpoint=load_file(self.file),
            pipelines=pipelines,
            is_pipeline_module=False,
            cached_model_config_path=str(self.folder),
            local_files_only=True,
            torch_dtype=self.dtype,
        )
        return module


def holds(file: Path, name: str) -> bool:
    """Whether the checkpoint has tensors of that component."""
    prefixes = _PREFIXES.get(name)
    return prefixes is not None and any(tensor.startswith(prefixes) for tensor in tensors(file))
