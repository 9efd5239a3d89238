"""Attention with one matrix for query, key and value where the library has three.

The arithmetic is that of the separate matrices. Those that a fused one stands for are dropped, so that a
module takes the memory that it took before. ``fuse_qkv_projections`` of diffusers 0.42 is not used: it keeps
them, not every denoiser has it, and for SD3 it leaves out the norms of query and key, which 3.5 has, and
fails on the second attention of 3.5 Medium.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from torch.nn import functional

__all__ = ["FusedJointAttention", "fuse"]


def fuse(module: torch.nn.Module) -> None:
    """Fuse the projections of every attention whose processor is one that there is a fused form of."""
    for attention in module.modules():
        if not isinstance(attention, Attention) or attention.fused_projections:
            continue
        processor = type(attention.processor)
        if processor is JointAttnProcessor2_0:
            _join(attention, "to_qkv", ("to_q", "to_k", "to_v"))
            if attention.add_k_proj is not None:
                _join(attention, "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))
        elif processor is AttnProcessor2_0 and attention.is_cross_attention:
            _join(attention, "to_kv", ("to_k", "to_v"))
        elif processor is AttnProcessor2_0:
            _join(attention, "to_qkv", ("to_q", "to_k", "to_v"))
        else:
            continue
        fused = FusedJointAttention() if processor is JointAttnProcessor2_0 else FusedAttnProcessor2_0()
        attention.set_processor(fused)
        attention.fused_projections = True


class FusedJointAttention:
    """``JointAttnProcessor2_0`` over fused projections: latents and text attend to both, or latents alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002 # part of a processor's signature
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[rows, tokens, width] of the latents and of the text; both again, or that of the latents."""
        tokens = hidden_states.shape[1]
        query, key, value = _heads(attn.to_qkv(hidden_states), attn.heads)
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        if encoder_hidden_states is not None:
            added_query, added_key, added_value = _heads(attn.to_added_qkv(encoder_hidden_states), attn.heads)
            query = torch.cat([query, _normed(attn.norm_added_q, added_query)], dim=2)
            key = torch.cat([key, _normed(attn.norm_added_k, added_key)], dim=2)
            value = torch.cat([value, added_value], dim=2)
        attended = functional.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).flatten(2).to(query.dtype)
        latents: torch.Tensor = attn.to_out[1](attn.to_out[0](attended[:, :tokens]))
        if encoder_hidden_states is None:
            return latents
        text = attended[:, tokens:]
        return latents, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(projected: torch.Tensor, heads: int) -> Sequence[torch.Tensor]:
    """Query, key and value, each [rows, heads, tokens, width of a head]."""
    parts = projected.unflatten(-1, (3, heads, -1))
    return [part.transpose(1, 2) for part in parts.unbind(2)]


def _normed(norm: Any, states: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = states if norm is None else norm(states)
    return normed


def _join(attention: Any, name: str, parts: Sequence[str]) -> None:
    """Put one layer in the place of several that take the same input."""
    layers = [getattr(attention, part) for part in parts]
    with torch.device("meta"):  # its own values would be drawn for nothing
        joined = torch.nn.Linear(layers[0].in_features, 1, bias=layers[0].bias is not None)
    joined.out_features = sum(layer.out_features for layer in layers)
    joined.weight = _constant([layer.weight for layer in layers])
    if layers[0].bias is not None:
        joined.bias = _constant([layer.bias for layer in layers])
    for part in parts:
        delattr(attention, part)
    setattr(attention, name, joined.train(attention.training))


def _constant(parts: Sequence[torch.Tensor]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=False)
