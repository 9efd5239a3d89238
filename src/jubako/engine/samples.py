"""One picture, clip or object under denoising: its latents, its own scheduler, generator and step index.

Latents are [1, …]: [1, c, h, w] of a picture, [1, frames, c, h, w] or [1, c, frames, h, w] of a clip, or
whatever else the denoiser takes.

The arithmetic is that of the stock pipelines' loops, one step of it at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from jubako.engine.schedule import Schedule
from jubako.request import SkipLayerGuidance

__all__ = ["Decode", "Denoiser", "Kept", "Sample", "predict_together"]


class Decode(Protocol):
    """A way from latents to what they stand for."""

    def __call__(self, latents: torch.Tensor, *, sparing: bool = False, upcast: bool = False) -> torch.Tensor:
        """Latents [n, …] to pictures [n, 3, H, W] with values from 0 to 1, and so on.

        ``sparing`` asks for less memory, at the cost of time and of seams or flicker that one hardly sees;
        ``upcast`` for float32, whatever the autoencoder is in. Who has no such way takes the usual one.
        """
        ...


class Denoiser(Protocol):
    """A loaded model as the batcher sees it."""

    max_rows: int

    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """One forward: inputs [rows, …], timesteps [rows], conditioning [rows, …]; as many out."""
        ...

    @property
    def decode(self) -> Decode:
        """How its latents become what they stand for."""
        ...

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Roughly what clean latents [1, …] will be: a small picture [3, h, w] from 0 to 1, on the CPU.

        None where a model has none to show.
        """
        ...


@dataclass(frozen=True)
class Kept:
    """What inpainting keeps: the picture's latents where the mask is 0, and the noise that they began with.

    ``mask`` is [1, 1, h, w], ``latents`` and ``noise`` are [1, c, h, w].
    """

    mask: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor

    def around(self, latents: torch.Tensor, schedule: Schedule) -> torch.Tensor:
        """The new latents inside of the mask, outside the picture's, as noisy as the next step expects."""
        kept = self.latents if schedule.done else schedule.noised(self.latents, self.noise)
        return (1 - self.mask) * kept + self.mask * latents


@dataclass
class Sample:
    """A picture, clip or object in the making.

    ``conditioning`` holds one row, or two with the negative one first. ``channels`` [1 or rows, …, k, h, w]
    are given to the denoiser beside the latents. ``guidance`` [1, …] has a scale for each frame, of which
    ``guidance_scale`` is the largest. ``decode`` stands for the denoiser's where a sample is decoded in a way
    of its own, and then alone. ``adapters`` are what its rows have beside the base, in the model's words, and
    ``adapted`` gives a forward those of each of its rows: samples of one bucket may have others or none.
    ``successor`` goes on from this one's latents with another denoiser; ``earlier`` counts the forwards of
    those before it.
    """

    denoiser: Denoiser
    schedule: Schedule
    latents: torch.Tensor
    conditioning: Mapping[str, torch.Tensor]
    guidance_scale: float
    kept: Kept | None = None
    channels: torch.Tensor | None = None
    guidance: torch.Tensor | None = None
    decode: Decode | None = None
    skip_layer_guidance: SkipLayerGuidance | None = None
    adapters: tuple[Any, ...] = ()
    adapted: Callable[[Sequence[Any]], AbstractContextManager[None]] | None = None
    successor: Sample | None = None
    earlier: int = 0

    @property
    def rows(self) -> int:
        """Rows of a forward that this sample takes: two with guidance, one without."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def last(self) -> Sample:
        """The one whose latents are decoded: the last of its successors, or itself."""
        return self.successor.last if self.successor else self

    @property
    def bucket(self) -> Hashable:
        """Samples with the same bucket can share a forward: one model, one shape of everything it takes."""
        shapes = (tuple(tensor.shape[1:]) for tensor in self.conditioning.values())
        return id(self.denoiser), tuple(self.latents.shape), *shapes

    @property
    def progress(self) -> tuple[int, int]:
        """Forwards done and forwards in all, those before and after this sample included."""
        after = len(self.successor.schedule) if self.successor else 0
        return self.earlier + self.schedule.step, self.earlier + len(self.schedule) + after

    @property
    def skipped_layers(self) -> tuple[int, ...]:
        """The layers that a third prediction of this step is made without; none for no such prediction."""
        skipping, step, steps = self.skip_layer_guidance, self.schedule.step, len(self.schedule)
        if skipping is None or self.rows == 1 or not skipping.start * steps < step < skipping.stop * steps:
            return ()
        return skipping.layers

    def inputs(self) -> torch.Tensor:
        """The denoiser's input, [rows, …]."""
        scaled = self._rows_of(self.schedule.scaled(self.latents))
        if self.channels is not None:
            scaled = torch.cat([scaled, self._rows_of(self.channels)], dim=-3)
        return scaled

    def guided(self, prediction: torch.Tensor) -> torch.Tensor:
        """The denoiser's output of this sample's rows as one, [1, …]; that without layers stands last."""
        if self.rows == 1:
            return prediction
        negative, positive, *without_layers = prediction.split(1)
        scale = self.guidance_scale if self.guidance is None else self.guidance
        guided: torch.Tensor = negative + scale * (positive - negative)
        if without_layers and self.skip_layer_guidance:
            guided = guided + self.skip_layer_guidance.scale * (positive - without_layers[0])
        return guided

    def estimate(self, guided: torch.Tensor) -> torch.Tensor:
        """The clean latents [1, …] that a guided prediction at this step amounts to."""
        return self.schedule.estimate(guided, self.latents)

    def advance(self, guided: torch.Tensor) -> None:
        """Take one step with the guided prediction."""
        self.latents = self.schedule.advance(guided, self.latents)
        if self.kept is not None:
            self.latents = self.kept.around(self.latents, self.schedule)

    def _rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(self.rows, *tensor.shape[1:])

    def handed_over(self) -> Sample | None:
        """The successor with this sample's latents, or None when there is none."""
        if self.successor is not None:
            self.successor.latents = self.latents
            self.successor.earlier = self.earlier + len(self.schedule)
        return self.successor


def predict_together(samples: Sequence[Sample], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One forward for samples of one bucket and their inputs; their predictions apart again, in order.

    Samples under skip-layer guidance take a second forward, of their positive rows, which those that skip the
    same layers share.
    """
    predictions = _forward(samples, inputs, [sample.conditioning for sample in samples])
    for layers in {layers for sample in samples if (layers := sample.skipped_layers)}:
        chosen = [i for i, sample in enumerate(samples) if sample.skipped_layers == layers]
        without = _forward(
            [samples[i] for i in chosen],
            [inputs[i][-1:] for i in chosen],
            [{name: rows[-1:] for name, rows in samples[i].conditioning.items()} for i in chosen],
            layers,
        )
        for i, prediction in zip(chosen, without, strict=True):
            predictions[i] = torch.cat([predictions[i], prediction])
    return predictions


def _placed(timesteps: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Timesteps of the CPU on the device; nothing waits for what the device has to do before."""
    if device.type != "cuda":
        return timesteps.to(device)
    return timesteps.pin_memory().to(device, non_blocking=True)


def _forward(
    samples: Sequence[Sample],
    inputs: Sequence[torch.Tensor],
    conditioning: Sequence[Mapping[str, torch.Tensor]],
    skip_layers: tuple[int, ...] = (),
) -> list[torch.Tensor]:
    order = _by_adapters(samples)
    members = [samples[i] for i in order]
    counts = [len(inputs[i]) for i in order]
    each_row = [sample for sample, count in zip(members, counts, strict=True) for _ in range(count)]
    together = torch.cat([inputs[i] for i in order])
    adapted = next((sample.adapted for sample in members if sample.adapted), None)
    with adapted([sample.adapters for sample in each_row]) if adapted else nullcontext():
        predictions = members[0].denoiser.predict(
            together,
            _placed(torch.stack([sample.schedule.timestep for sample in each_row]), together.device),
            {name: torch.cat([conditioning[i][name] for i in order]) for name in conditioning[0]},
            skip_layers,
        )
    found = dict(zip(order, predictions.split(counts), strict=True))
    return [found[i] for i in range(len(samples))]


def _by_adapters(samples: Sequence[Sample]) -> list[int]:
    """Their places, those with equal adapters side by side: one product serves them all."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample.adapters, []).append(place)
    return [place for group in groups.values() for place in group]
