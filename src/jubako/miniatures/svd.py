"""The miniature of Stable Video Diffusion: a UNet that looks along time, and an image encoder.

Trained the EDM way on the continuous sigma, as SVD is: the UNet is told a quarter of the logarithm of sigma
and predicts the velocity, whose plain squares weigh every sigma alike. The given picture reaches it twice: as
latents beside the noise, not scaled, and as what the image encoder says of it. Where the picture is left out
both are zeros, as in the stock pipeline's negative row, so that guidance has something to lead away from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel, UNetSpatioTemporalConditionModel
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from jubako.miniatures.motion import FRAMES, Clips
from jubako.miniatures.orthogonal import OrthogonalGroup
from jubako.miniatures.training import Group
from jubako.miniatures.world import COLOURS, SHAPES

BATCH = 5
INNER_LEARNING_RATE = 5e-3
LEARNING_RATE = 1e-3
DROPPED_SHARE = 0.12  # of the clips are seen without their picture
NOISE_AUGMENTATION = 0.02
PICTURE_NOISE = (
    0.05  # on the picture's latents: the augmentation's, and the encoder's distance from tiny-sd's
)
NAMES_WEIGHT = 0.02
# Log-normal sigmas as SVD has them, and some spread evenly over all that the sampler passes, from 700 down.
SIGMA_MEAN, SIGMA_SPREAD, EVEN_SHARE = 1.0, 1.6, 0.2
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}
WIDTH = 64
_NUMBER_WIDTH = 32
SHAPE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
    "up_block_types": ("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
    "block_out_channels": (64, 64),
    "layers_per_block": 1,
    "num_attention_heads": 2,
    "cross_attention_dim": WIDTH,
    "addition_time_embed_dim": _NUMBER_WIDTH,
    "projection_class_embeddings_input_dim": 3 * _NUMBER_WIDTH,
    "num_frames": FRAMES,
}
_COLOURS = tuple(COLOURS)
_NAMES = (len(_COLOURS), len(SHAPES), len(_COLOURS))  # object's colour, shape, background


def new_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**SCHEDULE)


def new_feature_extractor() -> CLIPImageProcessor:
    return CLIPImageProcessor()


def new_image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
    )
    return CLIPVisionModelWithProjection(config)


def new_unet(origin: UNet2DConditionModel) -> UNetSpatioTemporalConditionModel:
    """A new UNet with tiny-sd's weights wherever name and shape agree; all that looks along time is new."""
    unet = UNetSpatioTemporalConditionModel(**SHAPE)
    old = origin.state_dict()
    with torch.no_grad():
        for name, value in unet.state_dict().items():
            known = old.get(name.replace("spatial_res_block.", ""))
            if known is not None and known.shape == value.shape and not name.startswith("time_embedding"):
                value.copy_(known)
        unet.conv_in.weight[:, :4] = origin.conv_in.weight
    for module in unet.modules():
        if isinstance(module, nn.Conv3d):
            module.__class__ = _AlongTime
    return unet


class _AlongTime(nn.Conv3d):
    """The same convolution along time, counted in two dimensions: on a CPU 2.5 times as fast."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        flat = functional.conv2d(values.flatten(3), self.weight.flatten(3), self.bias, padding=(1, 0))
        return flat.view(values.shape)


@dataclass(frozen=True)
class Seen:
    """What is learned from: clips as scaled latents, their first pictures, motions and names."""

    latents: torch.Tensor
    scaling_factor: float
    pictures: NDArray[np.uint8]
    buckets: NDArray[np.int64]
    names: torch.Tensor

    @staticmethod
    def of(latents: torch.Tensor, scaling_factor: float, clips: Clips) -> Seen:
        names = [
            (_COLOURS.index(item.colour), SHAPES.index(item.shape), _COLOURS.index(scene.background or ""))
            for scene in clips.scenes
            for item in scene.items
        ]
        buckets = np.array([motion.bucket for motion in clips.motions])
        return Seen(latents, scaling_factor, clips.pixels[:, 0], buckets, torch.tensor(names))


class TinySVD(nn.Module):
    """The parts of `tiny-svd` that are trained together."""

    def __init__(self, origin: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = new_unet(origin)
        self.image_encoder = new_image_encoder()
        # Thrown away in the end: they make the image encoder name what it sees.
        self.heads = nn.Linear(WIDTH, sum(_NAMES))
        extractor = new_feature_extractor()
        self._mean = torch.tensor(extractor.image_mean).view(1, 3, 1, 1)
        self._spread = torch.tensor(extractor.image_std).view(1, 3, 1, 1)

    def groups(self) -> list[Group]:
        """The matrices and convolutions between the UNet's ends are stepped by Muon, the rest by AdamW."""
        ends = {*self.unet.conv_in.parameters(), *self.unet.conv_out.parameters()}
        inner = [p for p in self.unet.parameters() if p.ndim > 1 and p not in ends]
        known = set(inner)
        rest = [p for p in self.parameters() if p not in known]
        return [OrthogonalGroup(inner, INNER_LEARNING_RATE), Group(rest, LEARNING_RATE)]

    def embed(self, pictures: NDArray[np.uint8]) -> torch.Tensor:
        """What the image encoder says of pictures, resized and normalized as the pipeline does it."""
        values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        values = functional.interpolate(values, (224, 224), mode="bicubic", align_corners=True)
        said: torch.Tensor = self.image_encoder((values - self._mean) / self._spread).image_embeds
        return said

    def losses(self, seen: Seen, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of the velocity, and the cross-entropy of the names."""
        rng = np.random.default_rng((key[0], 10, key[1]))
        generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
        rows = rng.integers(0, len(seen.buckets), BATCH)
        encoded = seen.latents[rows].float()
        first = encoded[:, :1] + PICTURE_NOISE * torch.randn(encoded[:, :1].shape, generator=generator)
        shown = torch.from_numpy(rng.random(BATCH) >= DROPPED_SHARE).float().view(-1, 1, 1, 1, 1)
        # Any frame rate: it says nothing about the way from the first frame to the last.
        rate = np.where(rng.random(BATCH) < 0.5, 6, rng.integers(0, 30, BATCH))
        numbers = np.stack([rate, seen.buckets[rows], np.full(BATCH, NOISE_AUGMENTATION)], axis=1)
        clean = encoded * seen.scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.from_numpy(_sigmas(BATCH, rng)).float().view(-1, 1, 1, 1, 1)
        root = (1 + sigma**2).sqrt()
        beside = (first * shown).expand(-1, FRAMES, -1, -1, -1)
        with sdpa_kernel(SDPBackend.MATH):
            said = self.embed(seen.pictures[rows])
            predicted = self.unet(
                torch.cat([(clean + sigma * noise) / root, beside], dim=2),
                sigma.flatten().log() / 4,
                said.unsqueeze(1) * shown.view(-1, 1, 1),
                torch.from_numpy(numbers).float(),
            ).sample
        velocity = functional.mse_loss(predicted, (noise - sigma * clean) / root)
        named = self._names_loss(said, seen.names[rows])
        return velocity + NAMES_WEIGHT * named, {"velocity": velocity.item(), "names": named.item()}

    def _names_loss(self, said: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        guesses = self.heads(said).split(_NAMES, dim=1)
        parts = [functional.cross_entropy(g, n) for g, n in zip(guesses, names.T, strict=True)]
        return torch.stack(parts).mean()


def _sigmas(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    usual = rng.normal(SIGMA_MEAN, SIGMA_SPREAD, count)
    even = rng.uniform(np.log(SCHEDULE["sigma_min"]), np.log(SCHEDULE["sigma_max"]), count)
    return np.asarray(np.exp(np.where(rng.random(count) < EVEN_SHARE, even, usual)))


def settings() -> dict[str, Any]:
    return {
        "batch": BATCH,
        "inner_learning_rate": INNER_LEARNING_RATE,
        "learning_rate": LEARNING_RATE,
        "channels": SHAPE["block_out_channels"],
        "dropped_pictures": DROPPED_SHARE,
        "picture_noise": PICTURE_NOISE,
        "names_weight": NAMES_WEIGHT,
        "sigmas": {"log_mean": SIGMA_MEAN, "log_spread": SIGMA_SPREAD, "even_share": EVEN_SHARE},
        "schedule": SCHEDULE,
    }
