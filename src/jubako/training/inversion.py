"""Textual inversion: the embeddings of a new word, the only thing that is learned (2208.01618).

The word's tokens are added to the tokenizers as they will be when the result is used; a hook puts the vectors
that are trained in their places, so that the text encoders' own embeddings stay untouched.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from jubako.errors import InvalidRequest
from jubako.families.latent import LatentModel
from jubako.training.encodings import Encodings
from jubako.training.folder import replaced
from jubako.training.plan import TrainingPlan

__all__ = ["Inversion"]

# What SDXL's encoders are called in files of embeddings, by their names in the pipeline.
_SDXL = {"": "clip_l", "_2": "clip_g"}
_SPREAD = 0.01


class Inversion:
    """What is learned by ``textual-inversion``."""

    def __init__(self, model: LatentModel, plan: TrainingPlan) -> None:
        pipeline = model.pipeline
        self._model = model
        self._captions = plan.captions
        self._trigger = plan.trigger
        names = [name for name in _SDXL if f"text_encoder{name}" in pipeline.components]
        self._keys = [_SDXL[name] for name in names] if len(names) > 1 else [plan.trigger]
        model.denoiser.requires_grad_(False)
        generator = torch.Generator().manual_seed(plan.seed)
        self._vectors = [_Word(pipeline, name, plan, generator).vectors for name in names]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The vectors of each text encoder, [vectors, width]."""
        return list(self._vectors)

    def told(self, encodings: Encodings, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the denoiser is told of these rows, the prompts encoded anew with the vectors as they are."""
        told = encodings.told(rows)
        texts = [self._captions[row] for row in rows.tolist()]
        encoded = self._model.pipeline.encode_prompt(
            texts, device=self._model.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        told["encoder_hidden_states"] = encoded[0]
        if "text_embeds" in told:
            told["text_embeds"] = encoded[2]
        return told

    def write(self, file: Path) -> None:
        """As ``load_textual_inversion`` reads it: SDXL's has a tensor for each encoder."""
        tensors = {
            key: vectors.detach().float().cpu().clone()
            for key, vectors in zip(self._keys, self._vectors, strict=True)
        }
        with replaced(file) as partial:
            save_file(tensors, partial)

    def read(self, file: Path) -> None:
        """Go on from what ``write`` wrote."""
        tensors = load_file(file)
        with torch.no_grad():
            for key, vectors in zip(self._keys, self._vectors, strict=True):
                vectors.copy_(tensors[key])

    def resting(self) -> AbstractContextManager[None]:
        """The denoiser is the base's at all times."""
        return nullcontext()


class _Word:
    """The new word in one text encoder and its tokenizer."""

    def __init__(self, pipeline: Any, name: str, plan: TrainingPlan, generator: torch.Generator) -> None:
        encoder, tokenizer = (
            pipeline.components[f"text_encoder{name}"],
            pipeline.components[f"tokenizer{name}"],
        )
        encoder.requires_grad_(False)
        table = encoder.get_input_embeddings()
        if plan.trigger in tokenizer.get_vocab():
            raise InvalidRequest(
                f"trigger: {plan.trigger!r} is a token of {plan.model} already; choose another word",
                param="trigger",
            )
        nouns = tokenizer(plan.class_noun, add_special_tokens=False)["input_ids"]
        start = table.weight[torch.tensor(nouns, device=table.weight.device)].float().mean(dim=0)
        noise = torch.randn(plan.vectors, len(start), generator=generator).to(start.device)
        spread = _SPREAD if plan.vectors > 1 else 0.0
        self.vectors = torch.nn.Parameter(start + spread * noise)
        pipeline.load_textual_inversion(
            {plan.trigger: self.vectors.detach().to(table.weight.dtype)},
            token=plan.trigger,
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
        tokens = [plan.trigger, *(f"{plan.trigger}_{number}" for number in range(1, plan.vectors))]
        self._numbers = tokenizer.convert_tokens_to_ids(tokens)
        # Loading may have made a new table.
        encoder.requires_grad_(False)
        encoder.get_input_embeddings().register_forward_hook(self._put)

    def _put(
        self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """The embeddings [rows, tokens, width] with the trained vectors at the new tokens' places."""
        ids = inputs[0]
        for number, vector in zip(self._numbers, self.vectors, strict=True):
            output = torch.where((ids == number)[..., None], vector.to(output.dtype), output)
        return output
