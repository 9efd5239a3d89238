"""What is encoded once: pictures' latents and prompts' states, kept in a file until the training ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from jubako.families.latent import LatentModel
from jubako.training.folder import replaced
from jubako.training.pictures import in_folder
from jubako.training.plan import TrainingPlan
from jubako.training.studio import Studio

__all__ = ["Encodings", "encoded", "views_of"]

MOVED = 0.04  # of the side: how far a view may be moved

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Encodings:
    """Latents of the subject and of its class, [n, c, h, w], and what the denoiser is told of each.

    ``subject_rows`` and ``class_rows`` say which row of ``conditioning`` belongs to which latents.
    """

    subject: torch.Tensor
    of_class: torch.Tensor
    subject_rows: torch.Tensor
    class_rows: torch.Tensor
    conditioning: Mapping[str, torch.Tensor]

    def told(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The conditioning of these rows."""
        return {name: values[rows] for name, values in self.conditioning.items()}

    def to(self, device: torch.device) -> Encodings:
        """The same on a device."""
        told = {name: values.to(device) for name, values in self.conditioning.items()}
        return Encodings(
            subject=self.subject.to(device),
            of_class=self.of_class.to(device),
            subject_rows=self.subject_rows.to(device),
            class_rows=self.class_rows.to(device),
            conditioning=told,
        )

    def write(self, file: Path) -> None:
        """Keep it as a safetensors file."""
        own = {name: getattr(self, name) for name in _OWN}
        told = {f"conditioning.{name}": values for name, values in self.conditioning.items()}
        with replaced(file) as partial:
            save_file({name: each.contiguous().cpu() for name, each in (own | told).items()}, partial)

    @staticmethod
    def read(file: Path) -> Encodings:
        """What ``write`` kept."""
        tensors = load_file(file)
        own = {name: tensors.pop(name) for name in _OWN}
        told = {name.removeprefix("conditioning."): each for name, each in tensors.items()}
        return Encodings(**own, conditioning=told)


_OWN = ("subject", "of_class", "subject_rows", "class_rows")


def encoded(
    plan: TrainingPlan, images: Path, model: LatentModel, studio: Studio, on_progress: OnProgress
) -> Encodings:
    """Encode the pictures of a folder, and draw and encode those of the class if the plan asks for them."""
    rng = np.random.default_rng((plan.seed, 21))
    views: list[Image.Image] = []
    rows: list[int] = []
    for number, file in enumerate(in_folder(images)):
        with Image.open(file) as image:
            found = views_of(image.convert("RGB"), plan, rng)
        views += found
        rows += [number % len(plan.captions)] * len(found)
    on_progress("encoding the pictures", 0, len(views))
    subject = _latents(model, views)
    drawn: list[Image.Image] = []
    prompts: tuple[str, ...] = ()
    if plan.prior_preservation:
        prompts = plan.class_prompts[: plan.class_pictures]
        count = plan.class_pictures
        drawn = studio.draw(
            [prompts[number % len(prompts)] for number in range(count)],
            [int(seed) for seed in np.random.default_rng((plan.seed, 31)).integers(2**62, size=count)],
            plan.sample_steps,
            lambda done, of: on_progress("drawing the class", done, of),
        )
    of_class = _latents(model, drawn) if drawn else subject[:0]
    texts = (*plan.captions, *prompts)
    on_progress("encoding the prompts", 0, len(texts))
    first = len(plan.captions)
    return Encodings(
        subject=subject,
        of_class=of_class,
        subject_rows=torch.tensor(rows),
        class_rows=torch.tensor([first + n % len(prompts) for n in range(len(drawn))], dtype=torch.int64),
        conditioning=_told(model, studio, texts),
    )


def views_of(image: Image.Image, plan: TrainingPlan, rng: np.random.Generator) -> list[Image.Image]:
    """Squares of the plan's side: the middle of the picture, and the same moved a little, edges drawn out.

    Nothing is scaled for it, which would blur small pictures.
    """
    side = plan.resolution
    middle = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    views = [middle]
    most = round(side * MOVED)
    wide = np.pad(np.asarray(middle), ((most, most), (most, most), (0, 0)), "edge")
    for _ in range(plan.views - 1):
        x, y = (int(offset) for offset in rng.integers(0, 2 * most + 1, 2))
        views.append(Image.fromarray(wide[y : y + side, x : x + side]))
    return views + [ImageOps.mirror(view) for view in views] if plan.flips else views


@torch.no_grad()
def _latents(model: LatentModel, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Latents [n, c, h, w] in float32, on the CPU: the posterior's means, which do not change the colours."""
    vae = model.pipeline.vae
    shift = vae.config.shift_factor or 0.0
    found = []
    for picture in pictures:
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / np.float32(127.5) - 1)
        posterior = vae.encode(pixels.permute(2, 0, 1)[None].to(model.device, vae.dtype)).latent_dist
        found.append(((posterior.mode() - shift) * vae.config.scaling_factor).float().cpu())
    return torch.cat(found)


@torch.no_grad()
def _told(model: LatentModel, studio: Studio, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the denoiser is told of each text, a row each."""
    each = [model.conditioning(studio.job(text, guided=False)) for text in texts]
    return {name: torch.cat([one[name] for one in each]).cpu() for name in each[0]}
