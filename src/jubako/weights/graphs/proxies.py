"""Modules that look to a pipeline like its own and run graphs: text encoders, denoisers, autoencoders.

They have the ``config``, ``dtype``, ``device`` and ``forward`` of what they stand for, and no parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from jubako.weights.graphs.adapter import Adapter

__all__ = ["GraphAutoencoder", "GraphDenoiser", "GraphModule", "GraphTextEncoder"]


class GraphModule(torch.nn.Module):
    """What all have. ``graph_bytes`` is what the graph takes in memory, which no parameter tells."""

    def __init__(self, graph: Adapter, config: Any, device: torch.device, graph_bytes: int) -> None:
        super().__init__()
        self.graph = graph
        self.config = config
        self.device = device
        self.dtype = graph.dtype
        self.graph_bytes = graph_bytes


class GraphTextEncoder(GraphModule):
    """A CLIP text model, with a projection or without, or a T5 encoder."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,  # noqa: ARG002 # a graph gives all that it has
        **_: object,
    ) -> Any:
        """Token ids [rows, tokens] to states [rows, tokens, width] and, with a projection, [rows, width].

        Of the hidden states the last but one is there, which is all that a pipeline reads.
        """
        masked = {"attention_mask": attention_mask} if attention_mask is not None else {}
        found = self.graph(input_ids=input_ids, **masked)
        layers = sorted((int(name.rpartition(".")[2]), name) for name in found if "hidden_states." in name)
        penultimate = found.get("penultimate", found[layers[-2][1]] if len(layers) > 1 else None)
        last = found.get("last_hidden_state")
        hidden = None if penultimate is None else (penultimate, penultimate if last is None else last)
        if "text_embeds" in found:
            return CLIPTextModelOutput(
                text_embeds=found["text_embeds"], last_hidden_state=last, hidden_states=hidden
            )
        return BaseModelOutputWithPooling(
            last_hidden_state=penultimate if last is None else last,
            pooler_output=found.get("pooler_output"),
            hidden_states=hidden,
        )


class GraphDenoiser(GraphModule):
    """A UNet of pictures or clips, or SD3's transformer."""

    def check(self, size: tuple[int, int], latents: Sequence[int], **conditioning: Sequence[int]) -> None:
        """InvalidRequest for a size in pixels, or shapes of inputs, that the graph does not take."""
        self.graph.check(size, {self._latents: latents, **conditioning})

    @property
    def _latents(self) -> str:
        return "sample" if self.graph.takes("sample") else "hidden_states"

    def forward(
        self,
        inputs: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        *,
        hidden_states: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        skip_layers: list[int] | None = None,  # noqa: ARG002 # refused before
        return_dict: bool = False,  # noqa: ARG002 # whoever asks takes the tuple
        **conditioning: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        """Latents [rows, …] with a timestep a row to the prediction [rows, …], in their type."""
        latents = inputs if inputs is not None else hidden_states
        assert latents is not None  # noqa: S101 # a pipeline gives one of the two
        assert timestep is not None  # noqa: S101 # as above
        told = {**conditioning, **(added_cond_kwargs or {})}
        found = self.graph(**{self._latents: latents}, timestep=timestep, **told)
        return (found["prediction"].to(latents.dtype),)


@dataclass(frozen=True)
class _Drawn:
    """Latents that a graph has drawn already: nobody's generator has a say in it."""

    latents: torch.Tensor

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:  # noqa: ARG002 # see above
        return self.latents

    def mode(self) -> torch.Tensor:
        return self.latents


@dataclass(frozen=True)
class _Encoded:
    latent_dist: Any


class GraphAutoencoder(GraphModule):
    """An autoencoder of which the decoder, the encoder or both are graphs; ``module`` does what is left."""

    def __init__(
        self,
        decoder: Adapter | None,
        encoder: Adapter | None,
        module: Any,
        *,
        config: Any,
        device: torch.device,
        graph_bytes: int,
    ) -> None:
        graph = decoder or encoder
        assert graph is not None  # noqa: S101 # without one this would be the module itself
        super().__init__(graph, config, device, graph_bytes)
        self.decoder_graph, self.encoder_graph = decoder, encoder
        self.module = module

    def encode(self, pictures: torch.Tensor, return_dict: bool = True) -> Any:
        """Pictures [n, 3, H, W] from -1 to 1 to a distribution of latents [n, c, h, w]."""
        if self.encoder_graph is None:
            encoded = self.module.encode(pictures.to(self.module.dtype))
        else:
            encoded = _Encoded(_Drawn(self.encoder_graph(images=pictures)["latent"].to(pictures.dtype)))
        return encoded if return_dict else (encoded.latent_dist,)

    def decode(self, latents: torch.Tensor, return_dict: bool = True, **_: object) -> Any:  # noqa: ARG002 # the tuple
        """Latents [n, c, h, w] to pictures [n, 3, H, W] from -1 to 1."""
        if self.decoder_graph is None:
            decoded = self.module.decode(latents.to(self.module.dtype), return_dict=False)[0]
        else:
            decoded = self.decoder_graph(latent=latents)["images"]
        return (decoded.to(latents.dtype),)
