"""The oracle of the engine: the stock pipeline's ``__call__`` with the same weights, seed and settings.

Samples arrive while others run: each submits the next one after its second step, so that a forward holds
samples at different steps, of different tasks, with and without guidance.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image, ImageDraw

from jubako.catalog import load_catalog
from jubako.engine.batcher import StepBatcher
from jubako.engine.samples import Sample
from jubako.engine.ticket import Ticket
from jubako.families import sd, sd3, sdxl
from jubako.families.latent import LatentModel
from jubako.families.loaded import LoadedModel
from jubako.job import Job, MicroConditioning
from jubako.pictures import png
from jubako.schedulers import resolve_scheduler

CATALOG = load_catalog()
SIDE = 64
TEN_SCHEDULERS = (
    "Euler",
    "Euler a",
    "Heun",
    "LMS",
    "DPM2 a",
    "DPM++ 2M Karras",
    "DPM++ 2M SDE",
    "UniPC",
    "DDIM",
    "PLMS",
)

_WRAP = {"sd": sd.wrap, "sdxl": sdxl.wrap, "sd3": sd3.wrap}
_CLASSES = {
    ("sd", "txt2img"): diffusers.StableDiffusionPipeline,
    ("sd", "img2img"): diffusers.StableDiffusionImg2ImgPipeline,
    ("sd", "inpaint"): diffusers.StableDiffusionInpaintPipeline,
    ("sdxl", "txt2img"): diffusers.StableDiffusionXLPipeline,
    ("sdxl", "img2img"): diffusers.StableDiffusionXLImg2ImgPipeline,
    ("sdxl", "inpaint"): diffusers.StableDiffusionXLInpaintPipeline,
    ("sd3", "txt2img"): diffusers.StableDiffusion3Pipeline,
    ("sd3", "img2img"): diffusers.StableDiffusion3Img2ImgPipeline,
    ("sd3", "inpaint"): diffusers.StableDiffusion3InpaintPipeline,
}
_numbers = itertools.count()


@dataclass
class Outcome:
    """The last latents, relative to which errors are judged, and the picture [3, H, W] from 0 to 1."""

    latents: torch.Tensor
    picture: torch.Tensor


@dataclass(frozen=True)
class Difference:
    """Of the latents, relative to the largest; of the picture, in steps of 1/255."""

    latents: float
    picture: float


def wrapped(pipeline: Any, model: str) -> LatentModel:
    """The pipeline as that model of the catalog."""
    entry = CATALOG.model(model)
    loaded: LatentModel = _WRAP[entry.family](pipeline, entry)
    return loaded


def photograph() -> bytes:
    """A picture with colours, edges and a slope."""
    image = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 8, 40, 38), "crimson")
    draw.rectangle((36, 34, 60, 58), "teal")
    return png(image)


def stencil() -> bytes:
    """A mask: white where to paint."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(mask).rectangle((16, 16, 50, 44), 255)
    return png(mask)


def job(model: str, task: str = "txt2img", **fields: Any) -> Job:
    """A job of that model; what is not given has a small value."""
    number = next(_numbers)
    entry = CATALOG.model(model)
    given: dict[str, Any] = {
        "id": f"{number}",
        "task": task,
        "family": entry.family,
        "model": model,
        "prompt": f"a red circle {number}",
        "negative_prompt": "",
        "width": SIDE,
        "height": SIDE,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "scheduler": entry.defaults.scheduler,
        "seed": 1000 + number,
        "output_format": "png",
        "output_compression": 90,
    }
    if entry.micro_conditioning:
        own = (SIDE, SIDE)
        given["micro_conditioning"] = MicroConditioning(original_size=own, crop=(0, 0), target_size=own)
    if task != "txt2img":
        given |= {"image": photograph(), "strength": 0.75}
    if task == "inpaint":
        given["mask"] = stencil()
    return Job.model_validate(given | fields)


def stock(pipeline: Any, job: Job, **more: Any) -> Outcome:
    """One call of the stock pipeline of the task, built anew around the asked scheduler as a user would."""
    flow = job.family == "sd3"
    choice = resolve_scheduler(job.scheduler, flow)
    options = dict(choice.options)
    if options.get("use_flow_sigmas"):
        options["flow_shift"] = pipeline.scheduler.config.shift
    scheduler_class = getattr(diffusers, choice.scheduler)
    if "clip_sample" in scheduler_class.__init__.__annotations__:
        # What SD's text pipeline does by itself. Those of SDXL and inpainting would clip latents as if they
        # were pixels where the config of another scheduler says nothing of it.
        options["clip_sample"] = pipeline.scheduler.config.get("clip_sample", False)
    scheduler = scheduler_class.from_config(pipeline.scheduler.config, **options)
    config = {
        name: pipeline.config[name]
        for name in ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
        if name in pipeline.config
    }
    if job.task == "txt2img":
        config.pop("requires_aesthetics_score", None)
    if job.family == "sd":
        config["requires_safety_checker"] = False
    kind = _CLASSES[job.family, job.task]
    parts = {
        name: part for name, part in pipeline.components.items() if name in kind.__init__.__annotations__
    }
    oracle = kind(**{**parts, "scheduler": scheduler}, **config)
    oracle.set_progress_bar_config(disable=True)
    latents = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        return {}

    arguments = _arguments(job) | more
    picture = oracle(**arguments, callback_on_step_end=keep).images[0]
    if job.family == "sd3" and job.task == "inpaint":
        # This one stock pipeline forgets the autoencoder's shift where it decodes; its latents are right.
        vae = oracle.vae
        raw = vae.decode(latents[-1] / vae.config.scaling_factor + vae.config.shift_factor).sample.detach()
        picture = oracle.image_processor.postprocess(raw, output_type="pt")[0]
    return Outcome(latents[-1], picture)


def _arguments(job: Job) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt or None,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(job.seed),
        "output_type": "pt",
    }
    if job.task != "img2img":
        arguments |= {"width": job.width, "height": job.height}
    if job.image is not None:
        arguments |= {"image": Image.open(io.BytesIO(job.image)), "strength": job.strength}
    if job.mask is not None:
        arguments["mask_image"] = Image.open(io.BytesIO(job.mask))
    if sizes := job.micro_conditioning:
        arguments |= {
            "original_size": sizes.original_size[::-1],
            "crops_coords_top_left": sizes.crop[::-1],
            "target_size": sizes.target_size[::-1],
        }
    if job.max_sequence_length:
        arguments["max_sequence_length"] = job.max_sequence_length
    if skipping := job.skip_layer_guidance:
        arguments |= {
            "skip_guidance_layers": list(skipping.layers),
            "skip_layer_guidance_scale": skipping.scale,
            "skip_layer_guidance_start": skipping.start,
            "skip_layer_guidance_stop": skipping.stop,
        }
    return arguments


def prepared(models: Mapping[str, LoadedModel], one: Job) -> Sample:
    """The job's sample, with the refiner's behind it where there is one."""
    sample = models[one.model].prepare(one)
    if one.refinement:
        sample.successor = models[one.refinement.model].prepare_refinement(one)
    return sample


def batched(models: Mapping[str, LoadedModel], jobs: Sequence[Job]) -> list[Outcome]:
    """All jobs through one batcher, each arriving while those before it run."""
    batcher = StepBatcher()
    samples: list[Sample] = []
    tickets: list[Ticket] = []

    def next_arrives() -> None:
        if len(samples) < len(jobs):
            samples.append(prepared(models, jobs[len(samples)]))
            tickets.append(Ticket(lambda step, steps: next_arrives() if step == min(2, steps) else None))
            batcher.submit(samples[-1], tickets[-1])

    next_arrives()
    # Tickets are added while this waits for earlier ones; each is there when the one before it is done.
    pictures: list[torch.Tensor] = []
    while len(pictures) < len(jobs):
        pictures.append(tickets[len(pictures)].decoded.result(60))
    if len(jobs) > 1 and all(len(sample.schedule) > 2 for sample in samples):
        assert batcher.rows > batcher.forwards, "nothing was batched"
    batcher.close()
    last = [sample.successor or sample for sample in samples]
    return [Outcome(s.latents, p) for s, p in zip(last, pictures, strict=True)]


def alone(models: Mapping[str, LoadedModel], one: Job) -> Outcome:
    """One job with the batcher to itself."""
    return batched(models, [one])[0]


def difference(ours: Outcome, theirs: Outcome) -> Difference:
    """How far apart two outcomes are."""
    largest = theirs.latents.abs().max()
    return Difference(
        float((ours.latents - theirs.latents).abs().max() / largest),
        float((ours.picture - theirs.picture).abs().max() * 255),
    )
