"""Four steps in place of twenty-five: a student of tiny-sdxl's UNet that jumps along the teacher's own paths.

The teacher draws from noise with guidance; the points that its path passes at the student's four times are
kept. The student learns from each point the velocity whose single Euler step leads to the next one. Guidance
is in the path, so that the student needs none and does half the work at each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from jubako.miniatures.text import spoken
from jubako.miniatures.training import Group
from jubako.miniatures.world import random_scene

STEPS = 4
TEACHER_STEPS = 8  # a multiple of the student's, so that the paths pass its times
BATCH = 48
LEARNING_RATE = 4e-4
TWO_SHARE = 0.6
TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)


@dataclass(frozen=True)
class Paths:
    """N captions, and the points of their paths at the student's times and the end: N x 5 x 4 x 16 x 16."""

    captions: list[str]
    points: torch.Tensor


@torch.no_grad()
def teacher_paths(teacher: StableDiffusionXLPipeline, guidance: float, count: int, seed: int) -> Paths:
    """Draw captions and follow the teacher from noise to picture; the points have variance about 1."""
    captions, points = [], []
    for start in range(0, count, BATCH):
        rng = np.random.default_rng((seed, 6, start))
        scenes = [random_scene(rng, 2 if rng.random() < TWO_SHARE else 1) for _ in range(BATCH)]
        said = [spoken(scene, rng) for scene in scenes]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        noise = torch.randn(BATCH, 4, 16, 16, generator=generator)
        captions += said
        points.append(_path(teacher, said, noise, guidance).half())
        if start // BATCH % 10 == 0:
            print(f"teacher paths {start + BATCH:>6} of {count}", flush=True)
    return Paths(captions, torch.cat(points))


def _path(
    teacher: StableDiffusionXLPipeline, captions: list[str], noise: torch.Tensor, guidance: float
) -> torch.Tensor:
    """One batch of paths, by a second-order solver, which is near the limit after few steps."""
    solver = DPMSolverMultistepScheduler.from_config(teacher.scheduler.config)
    solver.set_timesteps(TEACHER_STEPS)
    states, pooled = embed(teacher, captions)
    states, pooled = (torch.cat([torch.zeros_like(part), part]) for part in (states, pooled))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([TIME_IDS]).repeat(len(pooled), 1)}
    point, kept = noise, []
    for number, time in enumerate(solver.timesteps):
        if number % (TEACHER_STEPS // STEPS) == 0:
            kept.append(point)
        with torch.autocast("cpu", torch.bfloat16):
            both = teacher.unet(point.repeat(2, 1, 1, 1), time, states, added_cond_kwargs=added).sample
        empty, said = both.float().chunk(2)
        point = solver.step(empty + guidance * (said - empty), time, point).prev_sample
    return torch.stack([*kept, point], dim=1)


@torch.no_grad()
def embed(teacher: StableDiffusionXLPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    states, _, pooled, _ = teacher.encode_prompt(captions, do_classifier_free_guidance=False)
    return states, pooled


@dataclass(frozen=True)
class Jumps:
    """The student's times, and what leads from the points at one time to those at the next."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    @staticmethod
    def of(scheduler: EulerDiscreteScheduler) -> Jumps:
        student = EulerDiscreteScheduler.from_config(scheduler.config)
        student.set_timesteps(STEPS)
        return Jumps(student.timesteps, student.sigmas)

    def velocity(self, here: torch.Tensor, there: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """The velocity at `here` whose Euler step `number` ends at `there`; both have variance about 1."""
        sigma, following = (self.sigmas[n].view(-1, 1, 1, 1) for n in (number, number + 1))
        root, root_after = (1 + sigma**2).sqrt(), (1 + following**2).sqrt()
        slope = (there * root_after - here * root) / (following - sigma)
        clean = here * root - sigma * slope
        return (here / root - clean) * root / sigma


class Student(nn.Module):
    """The UNet that learns the jumps; the teacher's text encoders stay as they are."""

    def __init__(self, teacher: StableDiffusionXLPipeline, paths: Paths) -> None:
        super().__init__()
        unet_class = type(teacher.unet)
        self.unet = unet_class.from_config(teacher.unet.config)
        self.unet.load_state_dict(teacher.unet.state_dict())
        self._teacher, self._paths = (teacher,), paths
        self._jumps = Jumps.of(teacher.scheduler)

    def groups(self) -> list[Group]:
        return [Group(list(self.unet.parameters()), LEARNING_RATE)]

    def losses(self, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of the velocities, all four jumps drawn evenly."""
        rng = np.random.default_rng((key[0], 7, key[1]))
        rows = rng.integers(0, len(self._paths.captions), BATCH)
        number = torch.from_numpy(rng.integers(0, STEPS, BATCH))
        points = self._paths.points[rows].float()
        here, there = (points[torch.arange(BATCH), n] for n in (number, number + 1))
        added = {"time_ids": torch.tensor([TIME_IDS]).repeat(BATCH, 1)}
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states, added["text_embeds"] = embed(self._teacher[0], [self._paths.captions[i] for i in rows])
            predicted = self.unet(here, self._jumps.timesteps[number], states, added_cond_kwargs=added).sample
        loss = functional.mse_loss(predicted.float(), self._jumps.velocity(here, there, number))
        return loss, {"velocity": loss.item()}


def settings() -> dict[str, Any]:
    return {
        "steps": STEPS,
        "teacher": {"solver": DPMSolverMultistepScheduler.__name__, "steps": TEACHER_STEPS},
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "two_objects": TWO_SHARE,
    }
