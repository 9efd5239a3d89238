"""The transformer and the text encoders of SD 3 under the names of their first releases."""

from __future__ import annotations

import re
from typing import Any

import torch

__all__ = ["sd3_text_encoders", "sd3_transformer"]

State = dict[str, torch.Tensor]

_AROUND = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
}
# Of the three projections of an attention, the first name stands for the one tensor that they are there.
_IN_BLOCK = {
    "attn.to_q.": "x_block.attn.qkv.",
    "attn.add_q_proj.": "context_block.attn.qkv.",
    "attn2.to_q.": "x_block.attn2.qkv.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
}


def sd3_transformer(transformer: Any) -> State:
    """All its tensors, with the position's table; projections are joined and two pairs of halves swapped."""
    state, result = dict(transformer.state_dict()), {}
    last = f"transformer_blocks.{transformer.config.num_layers - 1}.norm1_context."
    for name in [name for name in state if re.search(r"\.(to_q|add_q_proj)\.", name)]:
        state[name] = torch.cat([state.pop(re.sub(r"_q([._])", rf"_{kind}\1", name)) for kind in "qkv"])
    for name, tensor in state.items():
        # Shift and scale of the outermost norms stand there in the other order.
        swapped = name.startswith(("norm_out.", last))
        result[_renamed(name)] = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
    return result


def sd3_text_encoders(pipeline: Any) -> State:
    """Those that the pipeline has. T5's table of words is stored once, under its first name."""
    encoders = {
        "clip_l": pipeline.text_encoder,
        "clip_g": pipeline.text_encoder_2,
        "t5xxl": pipeline.text_encoder_3,
    }
    return {
        f"text_encoders.{kind}.transformer.{name}": tensor
        for kind, encoder in encoders.items()
        if encoder is not None
        for name, tensor in encoder.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }


def _renamed(name: str) -> str:
    block = re.match(r"transformer_blocks\.(\d+)\.", name)
    start = f"joint_blocks.{block[1]}." if block else ""
    rest = name.removeprefix(block[0]) if block else name
    names = _IN_BLOCK if block else _AROUND
    old = next((old for old in names if rest.startswith(old)), "")
    return start + names.get(old, "") + rest.removeprefix(old)
