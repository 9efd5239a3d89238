"""Shap-E: a transformer denoises the weights of a small network that is an object's shape and colours.

https://arxiv.org/abs/2305.02463. What it predicts is the clean sample itself and, beside it, a variance that
nobody needs. Its latents [1, n, d] are rows of the network's first matrices; asked at a place, that network
gives the signed distance to the surface and the colour there.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.shap_e.renderer import volume_query_points
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from jubako.catalog import Model
from jubako.engine.samples import Sample
from jubako.engine.schedule import Schedule, make_scheduler
from jubako.errors import GenerationFailed, InvalidRequest
from jubako.families.latent import PROMPTS_KEPT, guided
from jubako.families.loaded import Finished
from jubako.isosurface import EmptyFieldError, isosurface
from jubako.job import Job
from jubako.solids import solid_files
from jubako.surface import Surface, upright

__all__ = ["ShapE", "wrap"]

# Places asked at a time: as many as the stock decoder asks, whose numbers stay in a CPU's cache.
PLACES = 4096


def wrap(pipeline: Any, model: Model) -> ShapE:
    """A model of this family around its pipeline in memory."""
    return ShapE(pipeline, model)


class ShapE:
    """A ``ShapEPipeline`` or ``ShapEImg2ImgPipeline``. Nothing of the pipeline is changed by a job."""

    def __init__(self, pipeline: Any, model: Model) -> None:
        self.pipeline = pipeline
        self.model = model
        self.max_rows = model.max_rows
        self.device: torch.device = pipeline.device
        self.denoiser: Any = pipeline.prior
        self.encode = lru_cache(PROMPTS_KEPT)(self._encode)

    @torch.inference_mode()
    def prepare(self, job: Job) -> Sample:
        """Encode the prompt or the picture, draw the noise, set the timesteps."""
        embeds = self.encode(job.prompt, guided(job)) if job.image is None else self._encode_picture(job)
        generator = torch.Generator("cpu").manual_seed(job.seed)
        schedule = Schedule(
            make_scheduler(self.pipeline.scheduler.config, job.scheduler), job.num_inference_steps, generator
        )
        rows, width = self.denoiser.config.num_embeddings, self.denoiser.config.embedding_dim
        # Drawn flat, as the stock pipelines do: the last rounding of a draw depends on the shape.
        noise = randn_tensor((1, rows * width), generator, self.device, embeds.dtype)
        return Sample(
            denoiser=self,
            schedule=schedule,
            latents=(noise * schedule.init_noise_sigma).reshape(1, rows, width),
            conditioning={"proj_embedding": embeds},
            guidance_scale=job.guidance_scale,
        )

    def prepare_refinement(self, job: Job) -> Sample:  # noqa: ARG002 # no job gets this far
        """This family has no refiners."""
        raise InvalidRequest(f"refiner: {self.model.name} is none", param="refiner")

    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),  # noqa: ARG002 # it has no layers to leave out
    ) -> torch.Tensor:
        """One forward of the prior: [rows, n, d] with one timestep a row, the variance dropped."""
        prediction: torch.Tensor = self.denoiser(inputs, timesteps, **conditioning, return_dict=False)[0]
        return prediction[..., : inputs.shape[-1]]

    def decode(
        self,
        latents: torch.Tensor,
        *,
        sparing: bool = False,  # noqa: ARG002 # nothing is decoded here
        upcast: bool = False,  # noqa: ARG002 # as above
    ) -> torch.Tensor:
        """The latents as they are: what is made of them takes long, and the denoiser must not wait for it."""
        return latents

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:  # noqa: ARG002 # the same for all
        """None: a picture of an object takes longer than its steps."""
        return None

    def finish(self, decoded: torch.Tensor, job: Job, facts: Mapping[str, object]) -> Finished:
        """The object's files; GenerationFailed when the latents [n, d] hold no object."""
        assert job.solid is not None  # noqa: S101 # planning fills it in for this family
        surface = upright(self.surface(decoded, job.solid.grid_size))
        return Finished(*solid_files(surface, job, facts))

    @torch.inference_mode()
    def surface(self, latents: torch.Tensor, grid_size: int) -> Surface:
        """The surface of the object that latents [n, d] stand for, +Z up, in the model's box of -1 to 1."""
        renderer = self.pipeline.shap_e_renderer
        network = _network(renderer, latents[None])
        places = volume_query_points(renderer.volume, grid_size)
        distances = self._asked(network, places, "signed_distance").reshape((grid_size,) * 3)
        lower, upper = renderer.volume.bbox.float().numpy()
        try:
            vertices, faces = isosurface(distances, lower, upper)
        except EmptyFieldError as error:
            raise GenerationFailed("an empty object came out; try another seed or prompt") from error
        return Surface(vertices, faces, self._asked(network, torch.from_numpy(vertices), "channels"))

    def _asked(self, network: Any, places: torch.Tensor, what: str) -> npt.NDArray[np.float32]:
        """What the network says of these places [n, 3], [n, 1 or 3]."""
        answers = [
            network(
                position=some[None].to(self.device, network.dtype),
                direction=None,
                ts=None,
                nerf_level="fine",
                rendering_mode="stf",
            )[what][0]
            for some in places.split(PLACES)
        ]
        return torch.cat(answers).float().cpu().numpy()

    def _encode(self, text: str, with_guidance: bool) -> torch.Tensor:
        """The text encoder's state of one prompt, [1, width], with guidance one of zeros before it."""
        embeds: torch.Tensor = self.pipeline._encode_prompt(  # noqa: SLF001 # it has no other name
            text, self.device, 1, with_guidance
        )
        return embeds

    def _encode_picture(self, job: Job) -> torch.Tensor:
        """The image encoder's states of the job's picture, [rows, patches, width]."""
        image = Image.open(io.BytesIO(job.image or b""))
        embeds: torch.Tensor = self.pipeline._encode_image(  # noqa: SLF001 # it has no other name
            image, self.device, 1, guided(job)
        )
        return embeds


def _network(renderer: Any, latents: torch.Tensor) -> Any:
    """The renderer's network with the weights that latents [1, n, d] stand for.

    The stock pipelines write them into the renderer; a copy keeps it fit for other jobs at the same time, and
    for other models that share it.
    """
    network = copy.deepcopy(renderer.mlp)
    weights = renderer.params_proj(latents.to(renderer.device, renderer.dtype))
    own = dict(network.named_parameters())
    for name, weight in weights.items():
        own[name.removeprefix("nerstf.")].copy_(weight[0])
    return network
