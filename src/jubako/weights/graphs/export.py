"""Writes a model as graphs in a vendor's layout: names, files and types as NVIDIA or AMD publish theirs.

So a fine-tune, or a model of which no vendor published graphs, can be served like one of which they did.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from jubako.weight_sets import Precision, Slot, Vendor
from jubako.weights.graphs.contract import RESIDUAL

__all__ = ["DTYPES", "Export", "export_graphs"]

OPSET = 18
_TOKENS = 77
_FOLDERS: Mapping[tuple[Vendor, Slot], str] = {
    ("nvidia", "text_encoder"): "clip.opt",
    ("nvidia", "text_encoder_2"): "clip2.opt",
    ("nvidia", "text_encoder_3"): "t5",
    ("nvidia", "unet"): "unet.opt",
    ("nvidia", "transformer"): "transformer",
    ("nvidia", "vae_decoder"): "vae.opt",
}
DTYPES: Mapping[Precision, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float16, torch.float32),
}


@dataclass(frozen=True)
class Export:
    """How to write graphs. ``rows`` and ``one_timestep`` fix what some of the vendors' graphs have fixed:
    the rows of a denoiser's call, and one timestep for all of them.
    """

    layout: Vendor
    precision: Precision
    rows: int | None = None
    one_timestep: bool = False

    def dtypes(self, slot: Slot) -> tuple[torch.dtype, torch.dtype]:
        """Of what is computed, and of inputs and outputs."""
        inside, edges = DTYPES[self.precision]
        # T5's mask is a constant, and PyTorch's exporter writes none in bfloat16.
        if slot == "text_encoder_3" and inside == torch.bfloat16:
            inside = torch.float32
        return inside, edges

    def file(self, slot: Slot) -> str:
        """Where a graph is written, relative to the folder of all."""
        return f"{_FOLDERS.get((self.layout, slot), slot)}/model.onnx"


@dataclass(frozen=True)
class _Traced:
    """A module to trace: example inputs by the vendor's names, which dims vary, and the outputs' names."""

    module: torch.nn.Module
    call: Callable[..., Any]
    inputs: Mapping[str, torch.Tensor]
    free: Mapping[str, Mapping[int, str]]
    outputs: Sequence[str]


def export_graphs(pipeline: Any, folder: Path, how: Export) -> dict[Slot, str]:
    """Write the graphs of a pipeline's text encoders, denoiser and decoder; where each lies in the folder.

    The pipeline's modules are cast while they are written and are of no use afterwards. What draws random
    numbers, the autoencoder's encoder, is left out: a graph would not heed a request's seed.
    """
    written: dict[Slot, str] = {}
    for slot, traced in _traced(pipeline, how):
        file = folder / how.file(slot)
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(traced, file, how, slot)
        written[slot] = how.file(slot)
    return written


class _Wrapper(torch.nn.Module):
    """The module under a vendor's signature, with casts at its edges where they differ from its inside."""

    def __init__(self, traced: _Traced, inside: torch.dtype, edges: torch.dtype) -> None:
        super().__init__()
        self.module = traced.module
        self._traced, self._inside, self._edges = traced, inside, edges

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self._traced.inputs, tensors, strict=True))
        outputs = self._traced.call(**_cast(given, self._inside))
        return tuple(output.to(self._edges) for output in outputs)


def _cast(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Numbers in a type, but for timesteps, of which bfloat16 can't tell one from the next."""
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and name != "timestep" else tensor
        for name, tensor in tensors.items()
    }


def _write(traced: _Traced, file: Path, how: Export, slot: Slot) -> None:
    import onnx

    inside, edges = how.dtypes(slot)
    wrapper = _Wrapper(traced, inside, edges).to(inside).eval()
    examples = tuple(_cast(traced.inputs, edges).values())
    with torch.inference_mode(), warnings.catch_warnings():
        # What tracing warns of are sizes that it takes for constants: the tests run graphs at other sizes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            wrapper,
            examples,
            str(file),
            input_names=list(traced.inputs),
            output_names=list(traced.outputs),
            dynamic_axes={name: dict(axes) for name, axes in traced.free.items()},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(str(file))
    for stray in file.parent.iterdir():
        stray.unlink()
    data = f"{uuid4()}" if how.layout == "nvidia" else f"{file.name}.data"
    onnx.save_model(model, str(file), save_as_external_data=True, location=data, size_threshold=1024)


def _traced(pipeline: Any, how: Export) -> Iterator[tuple[Slot, _Traced]]:
    components = pipeline.components
    for slot in ("text_encoder", "text_encoder_2"):
        if (encoder := components.get(slot)) is not None:
            yield slot, _clip(encoder, components, how, slot)
    if (t5 := components.get("text_encoder_3")) is not None:
        yield "text_encoder_3", _t5(t5, how)
    if components.get("transformer") is not None:
        yield "transformer", _transformer(pipeline, how)
    elif "num_frames" in components["unet"].config:
        yield "unet", _video_unet(pipeline, how)
        return  # the decoder of clips attends over frames, of which there may be any number
    else:
        yield "unet", _unet(pipeline, how)
    yield "vae_decoder", _decoder(pipeline, how)


def _clip(encoder: Any, components: Mapping[str, Any], how: Export, slot: Slot) -> _Traced:
    projected = type(encoder).__name__.endswith("WithProjection")
    two = components.get("text_encoder_2") is not None
    # Traced, the fused attention adds a mask of float32 and stays there whatever the model is in.
    encoder.set_attn_implementation("eager")
    names = {
        "nvidia": ["text_embeddings", *(["hidden_states"] if two else [])],
        "amd": [
            *(["text_embeds"] if projected else []),
            "last_hidden_state",
            *([f"hidden_states.{i}" for i in range(encoder.config.num_hidden_layers + 1)] if two else []),
        ],
    }[how.layout]

    def call(input_ids: torch.Tensor) -> list[torch.Tensor]:
        found = encoder(input_ids, output_hidden_states=True)
        last = found.last_hidden_state
        known = {
            "last_hidden_state": last,
            "text_embeds": found.text_embeds if projected else None,
            "text_embeddings": found.text_embeds if projected else last,
            "hidden_states": found.hidden_states[-2],
            **{f"hidden_states.{i}": state for i, state in enumerate(found.hidden_states)},
        }
        return [known[name] for name in names]

    # AMD's second encoder takes longer integers than its first.
    wide = how.layout == "amd" and slot != "text_encoder"
    ids = torch.ones(2, encoder.config.max_position_embeddings, dtype=torch.int64 if wide else torch.int32)
    free = {name: {0: "B"} for name in ("input_ids", *names)}
    return _Traced(encoder, call, {"input_ids": ids}, free, names)


def _t5(encoder: Any, how: Export) -> _Traced:
    name = "text_embeddings" if how.layout == "nvidia" else "last_hidden_state"
    ids = torch.ones(2, 32, dtype=torch.int32 if how.layout == "nvidia" else torch.int64)
    free = {"input_ids": {0: "B", 1: "tokens"}, name: {0: "B", 1: "tokens"}}

    def call(input_ids: torch.Tensor) -> list[torch.Tensor]:
        return [encoder(input_ids)[0]]

    return _Traced(encoder, call, {"input_ids": ids}, free, [name])


def _unet(pipeline: Any, how: Export) -> _Traced:
    unet, rows = pipeline.unet, how.rows or 2
    side = _side(pipeline)
    inputs = {
        "sample": torch.randn(rows, unet.config.in_channels, side, side),
        "timestep": torch.full((1 if how.one_timestep else rows,), 500.0),
        "encoder_hidden_states": torch.randn(rows, _TOKENS, unet.config.cross_attention_dim),
    }
    added = {}
    if unet.config.addition_embed_type == "text_time":
        width = pipeline.text_encoder_2.config.projection_dim
        both = unet.config.projection_class_embeddings_input_dim
        sizes = (both - width) // unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(rows, width), "time_ids": torch.randn(rows, sizes)}

    def call(
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        **told: torch.Tensor,
    ) -> Any:
        return unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=told, return_dict=False)

    return _Traced(
        unet, call, {**inputs, **added}, _free([*inputs, *added], how, {2: "H", 3: "W"}), [_prediction(how)]
    )


def _video_unet(pipeline: Any, how: Export) -> _Traced:
    unet, rows, frames, side = pipeline.unet, how.rows or 2, pipeline.unet.config.num_frames, _side(pipeline)
    inputs = {
        "sample": torch.randn(rows, frames, unet.config.in_channels, side, side),
        "timestep": torch.full((1 if how.one_timestep else rows,), 0.5),
        "encoder_hidden_states": torch.randn(rows, 1, unet.config.cross_attention_dim),
        "added_time_ids": torch.randn(rows, 3),
    }

    def call(**tensors: torch.Tensor) -> Any:
        return unet(**tensors, return_dict=False)

    return _Traced(unet, call, inputs, _free(list(inputs), how, {3: "H", 4: "W"}), [_prediction(how)])


def _transformer(pipeline: Any, how: Export) -> _Traced:
    transformer, rows, side = pipeline.transformer, how.rows or 2, _side(pipeline)
    config = transformer.config
    inputs = {
        "hidden_states": torch.randn(rows, config.in_channels, side, side),
        "encoder_hidden_states": torch.randn(rows, _TOKENS + 32, config.joint_attention_dim),
        "pooled_projections": torch.randn(rows, config.pooled_projection_dim),
        "timestep": torch.full((1 if how.one_timestep else rows,), 500.0),
    }
    if how.layout == "nvidia":
        layers, width = config.num_layers, config.num_attention_heads * config.attention_head_dim
        inputs[RESIDUAL] = torch.zeros(max(1, layers // 2), rows, side * side // 4, width)

    def call(**tensors: torch.Tensor) -> Any:
        residual = tensors.pop(RESIDUAL, None)
        blocks = {} if residual is None else {RESIDUAL: list(residual.unbind(0))}
        return transformer(**tensors, **blocks, return_dict=False)

    free = _free(list(inputs), how, {2: "H", 3: "W"})
    if RESIDUAL in inputs:
        free[RESIDUAL] = {1: "2B", 2: "patches"}
    return _Traced(transformer, call, inputs, free, [_prediction(how)])


def _decoder(pipeline: Any, how: Export) -> _Traced:
    vae, side = pipeline.vae, _side(pipeline)
    name, result = ("latent", "images") if how.layout == "nvidia" else ("latent_sample", "sample")

    def call(**latents: torch.Tensor) -> Any:
        return vae.decode(latents[name], return_dict=False)

    free = {each: {0: "B", 2: "H", 3: "W"} for each in (name, result)}
    return _Traced(vae, call, {name: torch.randn(1, vae.config.latent_channels, side, side)}, free, [result])


def _free(names: Sequence[str], how: Export, sides: Mapping[int, str]) -> dict[str, dict[int, str]]:
    """Rows and sides vary, but for what is to be fixed; the first input and the prediction have sides."""
    rows = {} if how.rows else {0: "2B"}
    free = {name: dict(rows) for name in names}
    free["encoder_hidden_states"] = {**rows, 1: "tokens"}
    if how.one_timestep:
        free["timestep"] = {}
    free[names[0]] = free[_prediction(how)] = {**rows, **sides}
    return free


def _prediction(how: Export) -> str:
    return "latent" if how.layout == "nvidia" else "out_sample"


def _side(pipeline: Any) -> int:
    """A small side of latents that every level of the denoiser can halve."""
    denoiser = pipeline.components.get("unet") or pipeline.components["transformer"]
    levels = len(denoiser.config.get("block_out_channels", ()))
    return 1 << max(levels, 3)
