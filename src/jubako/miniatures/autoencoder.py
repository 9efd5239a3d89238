"""The autoencoder of the miniatures: 64 x 64 pixels to 16 x 16 x 4 latents and back, trained from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from jubako.miniatures.dataset import Drawn
from jubako.miniatures.training import Budget, Group, Record, fit

PEAK_LEARNING_RATE = 2e-3
BATCH = 16
KL_WEIGHT = 1e-6
SQUARE_WEIGHT = 4.0
EDGE_WEIGHT = 1.0
CENTRE_WEIGHT = 0.1
# The mean of SD3's latents is not zero, so that nobody may forget to add it.
SHIFT = 0.1
# The posterior starts with little noise; at 0 it drowns the small objects for 2,000 steps.
_LOG_VARIANCE = -6.0


def new_autoencoder() -> AutoencoderKL:
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )
    with torch.no_grad():
        model.quant_conv.bias[4:] = _LOG_VARIANCE
    return model


def widened(model: AutoencoderKL, channels: int) -> AutoencoderKL:
    """The same autoencoder with more latent channels and no 1 x 1 convolutions around them, as SD3 has it.

    Those are folded into their neighbours. The first channels are the old ones; the new ones are mixtures of
    the encoder's features that the decoder does not look at yet.
    """
    old = model.config.latent_channels
    wide = AutoencoderKL.from_config(
        model.config,
        latent_channels=channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=SHIFT,
        force_upcast=False,
    )
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if "quant_conv" not in name and not name.startswith(("encoder.conv_out", "decoder.conv_in"))
    }
    wide.load_state_dict(kept, strict=False)
    into, out_of = model.quant_conv, model.post_quant_conv
    with torch.no_grad():
        last, first = wide.encoder.conv_out, wide.decoder.conv_in
        last.weight[:old] = torch.einsum(
            "om,mikl->oikl", into.weight[:old, :, 0, 0], model.encoder.conv_out.weight
        )
        last.bias[:old] = into.weight[:old, :, 0, 0] @ model.encoder.conv_out.bias + into.bias[:old]
        last.weight[channels:] = 0
        last.bias[channels:] = _LOG_VARIANCE
        first.weight.zero_()
        first.weight[:, :old] = torch.einsum(
            "omkl,mi->oikl", model.decoder.conv_in.weight, out_of.weight[:, :, 0, 0]
        )
        first.bias[:] = model.decoder.conv_in.bias + model.decoder.conv_in.weight.sum((2, 3)) @ out_of.bias
    return wide


def train_autoencoder(
    model: AutoencoderKL, data: Drawn, budget: Budget, seed: int, *, checkpoint: Path, noise: float = 0.0
) -> Record:
    """Train until the budget is spent and leave the averaged weights in `model`; resumes from `checkpoint`.

    `noise` is added to the latents in units of their spread: a decoder that has seen it forgives a denoiser's
    errors.
    """

    def losses(step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        rows = np.random.default_rng((seed, step)).integers(0, len(data.pixels), BATCH)
        return _losses(model, data.batch(rows), (seed, step), progress, noise)

    record = fit(
        model,
        [Group(list(model.parameters()), PEAK_LEARNING_RATE, weight_decay=1e-4)],
        losses,
        title="autoencoder",
        budget=budget,
        checkpoint=checkpoint,
    )
    model.eval()
    return record


def _losses(
    model: AutoencoderKL, pictures: torch.Tensor, key: tuple[int, int], progress: float, noise: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Squares and L1 on pixels, L1 on differences of neighbours (crisp edges), a trace of KL.

    L1 alone is content with the median, a picture without its small objects, and so are edges: the squares
    find the objects, the edges, weighted in with the training's progress, sharpen them. Without 1 x 1
    convolutions around the latents, their means are held at the shift: zero padding prevents folding.
    """
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        posterior = model.encode(pictures).latent_dist
        generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
        latents = posterior.sample(generator)
        if noise:
            spread = latents.detach().std((0, 2, 3), keepdim=True)
            latents = latents + noise * spread * torch.randn(latents.shape, generator=generator)
        decoded = model.decode(latents).sample.float()
    error = decoded - pictures
    pixel = error.abs().mean()
    edge = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = posterior.kl().float().mean()
    loss = pixel + SQUARE_WEIGHT * error.square().mean() + EDGE_WEIGHT * progress * edge + KL_WEIGHT * kl
    if model.quant_conv is None:
        off_centre = posterior.mean.float().mean((0, 2, 3)) - model.config.shift_factor
        loss = loss + CENTRE_WEIGHT * off_centre.square().mean()
    return loss, {"pixel": pixel.item(), "edge": edge.item()}


@torch.no_grad()
def standardize(model: AutoencoderKL, data: Drawn) -> None:
    """Give every latent channel the same spread and its mean at the shift; the scaling factor is 1 / spread.

    The change is folded into the convolutions around the latents, so pictures stay the same: exactly with
    1 x 1 convolutions, but for the outermost pixels with the 3 x 3 ones of a model that lacks those.
    """
    means = encode_all(model, data).float()
    channels = model.config.latent_channels
    shift = model.config.shift_factor or 0.0
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    common = spread.mean()
    factor = common / spread
    into = model.encoder.conv_out if model.quant_conv is None else model.quant_conv
    out_of = model.decoder.conv_in if model.post_quant_conv is None else model.post_quant_conv
    into.weight[:channels] *= factor.view(-1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - centre) * factor + shift
    into.bias[channels:] += 2 * factor.log()
    out_of.bias += out_of.weight.sum((2, 3)) @ (centre - shift / factor)
    out_of.weight /= factor.view(1, -1, 1, 1)
    model.register_to_config(scaling_factor=round(1 / common.item(), 5))


@torch.no_grad()
def encode_all(model: AutoencoderKL, data: Drawn, batch: int = 64) -> torch.Tensor:
    """Posterior means of all pictures, N x 4 x 16 x 16, float16, not scaled."""
    parts = []
    for start in range(0, len(data.pixels), batch):
        rows = np.arange(start, min(start + batch, len(data.pixels)))
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            moments = model.encode(data.batch(rows)).latent_dist
        parts.append(moments.mean.half())
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(model: AutoencoderKL, data: Drawn, batch: int = 64) -> NDArray[np.uint8]:
    """Pictures after one trip through the autoencoder, uint8, N x side x side x 3."""
    parts = []
    for start in range(0, len(data.pixels), batch):
        rows = np.arange(start, min(start + batch, len(data.pixels)))
        decoded = model.decode(model.encode(data.batch(rows)).latent_dist.mean).sample
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def settings() -> dict[str, Any]:
    return {
        "batch": BATCH,
        "learning_rate": PEAK_LEARNING_RATE,
        "weights": {"squares": SQUARE_WEIGHT, "edges": EDGE_WEIGHT, "kl": KL_WEIGHT},
    }
