"""The autoencoder of the miniatures: 64 x 64 pixels to 16 x 16 x 4 latents and back, trained from nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from jubako.miniatures.dataset import Drawn
from jubako.miniatures.training import (
    Average,
    Budget,
    Progress,
    Record,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
)

PEAK_LEARNING_RATE = 2e-3
BATCH = 16
KL_WEIGHT = 1e-6
SQUARE_WEIGHT = 4.0
EDGE_WEIGHT = 1.0
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


def train_autoencoder(
    data: Drawn, budget: Budget, seed: int, checkpoint: Path
) -> tuple[AutoencoderKL, Record]:
    """Train until the budget is spent and return the averaged weights; resumes from `checkpoint`."""
    torch.manual_seed(seed)
    model = new_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, betas=(0.9, 0.99))
    average = Average(model)
    progress, step = Progress("autoencoder", budget), 0
    if state := load_checkpoint(checkpoint):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, step = state["average"], progress.resume(state)
    while budget.progress(step) < 1:
        rows = np.random.default_rng((seed, step)).integers(0, len(data.pixels), BATCH)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(PEAK_LEARNING_RATE, step, budget.progress(step))
        pixel, edge, loss = _losses(model, data.batch(rows), (seed, step), budget.progress(step))
        optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.MATH):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        step += 1
        progress.report(step, (("pixel", pixel), ("edge", edge)))
        if step % 500 == 0 or budget.progress(step) >= 1:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.values,
            }
            save_checkpoint(checkpoint, state | progress.state(step))
    average.copy_to(model)
    return model.eval(), progress.record(step)


def _losses(
    model: AutoencoderKL, pictures: torch.Tensor, key: tuple[int, int], progress: float
) -> tuple[float, float, torch.Tensor]:
    """Squares and L1 on pixels, L1 on differences of neighbours (crisp edges), a trace of KL.

    L1 alone is content with the median, a picture without its small objects, and so are edges: the squares
    find the objects, the edges, weighted in with the training's progress, sharpen them.
    """
    # The fused attention's bfloat16 backward is many times slower than plain arithmetic on a CPU.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        posterior = model.encode(pictures).latent_dist
        generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
        decoded = model.decode(posterior.sample(generator)).sample.float()
    error = decoded - pictures
    pixel = error.abs().mean()
    edge = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = posterior.kl().float().mean()
    loss = pixel + SQUARE_WEIGHT * error.square().mean() + EDGE_WEIGHT * progress * edge + KL_WEIGHT * kl
    return pixel.item(), edge.item(), loss


@torch.no_grad()
def standardize(model: AutoencoderKL, data: Drawn) -> None:
    """Give every latent channel mean 0 and the same spread, and set the scaling factor to 1 / spread.

    The change is folded into the two 1 x 1 convolutions around the latents, so pictures stay the same.
    """
    means = encode_all(model, data).float()
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    common = spread.mean()
    factor = common / spread
    into, out_of = model.quant_conv, model.post_quant_conv
    into.weight[:4] *= factor.view(4, 1, 1, 1)
    into.bias[:4] = (into.bias[:4] - centre) * factor
    into.bias[4:] += 2 * factor.log()
    out_of.bias += (out_of.weight[:, :, 0, 0] * centre).sum(1)
    out_of.weight /= factor.view(1, 4, 1, 1)
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
