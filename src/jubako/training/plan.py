"""The plan of a fine-tuning: a request with every field filled, within bounds. No torch.

Unset fields are chosen by the model: miniatures learn in minutes on a CPU, with high rates and many layers;
real models have the settings of DreamBooth's authors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from jubako.catalog import Catalog, Model
from jubako.errors import InvalidRequest
from jubako.miniatures.world import random_scene
from jubako.planning.bounds import drawn_seed, legal_prompt, legal_steps
from jubako.training.request import Method, Targets, TrainingRequest

__all__ = ["TrainingPlan", "is_miniature", "plan_training", "trainable"]

MINIATURE_PARAMETERS = 50_000_000
_OF_THE_CLASS = ("prior_weight", "class_pictures", "class_prompts")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")


class TrainingPlan(BaseModel):
    """A request made complete and legal. ``rank`` and ``targets`` or ``vectors``: what the method has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    trigger: str
    class_noun: str
    method: Method
    rank: int
    targets: Targets
    vectors: int
    steps: int
    learning_rate: float
    batch_size: int
    prior_preservation: bool
    prior_weight: float
    class_pictures: int
    sample_steps: int
    captions: tuple[str, ...]
    class_prompts: tuple[str, ...]
    resolution: int
    views: int
    flips: bool
    min_snr_gamma: float
    seed: int
    validation_prompt: str
    validation_every: int
    checkpoint_every: int

    def caption(self, picture: int) -> str:
        """What the picture of that number, counted from 0, is trained to be the picture of."""
        return self.captions[picture % len(self.captions)]


@dataclass(frozen=True)
class _Choice:
    """What a kind of model does where nothing is asked."""

    steps: int
    learning_rate: float
    batch_size: int = 1
    rank: int = 4
    targets: Targets = "attention"
    vectors: int = 1
    prior_preservation: bool = False
    class_pictures: int = 200
    prior_weight: float = 1.0
    views: int = 1
    min_snr_gamma: float = 5.0


_REAL: Mapping[str, _Choice] = {
    "sd": _Choice(steps=500, learning_rate=1e-4),
    "sdxl": _Choice(steps=500, learning_rate=1e-4),
    "sd3": _Choice(steps=500, learning_rate=4e-4),
}
_MINIATURE = _Choice(
    steps=240,
    learning_rate=2e-3,
    batch_size=5,
    rank=8,
    targets="all",
    prior_preservation=True,
    class_pictures=48,
    prior_weight=2.0,
    views=4,
    min_snr_gamma=0.0,
)
_REAL_INVERSION = _Choice(steps=3000, learning_rate=5e-4, vectors=5)
_MINIATURE_INVERSION = _Choice(
    steps=300, learning_rate=2e-2, batch_size=5, vectors=4, views=4, min_snr_gamma=0.0
)


def plan_training(request: TrainingRequest, catalog: Catalog, pictures: int | None = None) -> TrainingPlan:
    """The plan of a request, for this number of pictures if it is known already.

    InvalidRequest or UnknownModel name the field.
    """
    model = trainable(catalog, request.model)
    _refuse_contradictions(request, model, pictures)
    choice = _choice(model, request.method)
    steps = request.steps or choice.steps
    seed = drawn_seed(request.seed)
    phrase = f"a {request.trigger} {request.class_noun}"
    prior = choice.prior_preservation if request.prior_preservation is None else request.prior_preservation
    every = max(1, -(-steps // 4)) if request.validation_every is None else request.validation_every
    return TrainingPlan(
        model=model.name,
        trigger=request.trigger,
        class_noun=request.class_noun,
        method=request.method,
        rank=request.rank or choice.rank,
        targets=request.targets or choice.targets,
        vectors=request.vectors or choice.vectors,
        steps=steps,
        learning_rate=request.learning_rate or choice.learning_rate,
        batch_size=request.batch_size or choice.batch_size,
        prior_preservation=prior,
        prior_weight=request.prior_weight or choice.prior_weight,
        class_pictures=request.class_pictures or choice.class_pictures,
        sample_steps=legal_steps(
            request.sample_steps or max(model.limits.min_num_inference_steps, _half(model)),
            model,
            "sample_steps",
        ),
        captions=request.captions or (phrase,),
        class_prompts=request.class_prompts or _class_prompts(request, model, choice, seed),
        resolution=_resolution(request, model),
        views=request.views or choice.views,
        flips=request.flips,
        min_snr_gamma=choice.min_snr_gamma if request.min_snr_gamma is None else request.min_snr_gamma,
        seed=seed,
        validation_prompt=legal_prompt("validation_prompt", request.validation_prompt or phrase, model),
        validation_every=every,
        checkpoint_every=request.checkpoint_every or max(1, -(-steps // 10)),
    )


def is_miniature(model: Model) -> bool:
    """Whether it is one of the small models of the captioned world."""
    return model.parameters < MINIATURE_PARAMETERS


def trainable(catalog: Catalog, name: str) -> Model:
    """The model of that name, if it can be trained here."""
    model = catalog.model(name)
    able = [each.name for each in catalog if _hindrance(each) is None]
    if (why := _hindrance(model)) is not None:
        raise InvalidRequest(
            f"model: {name} can't be fine-tuned: {why}. Models that can: {', '.join(able)}", param="model"
        )
    return model


def _hindrance(model: Model) -> str | None:
    if model.pipeline not in _PIPELINES or "txt2img" not in model.tasks:
        return "only text-to-image models of the families sd, sdxl and sd3 are trained"
    if not model.guidance or model.defaults.guidance_scale <= 1:
        return "it is distilled to few steps, which training would undo; train the model it was made from"
    if model.weights.worker is not None:
        return "it runs in a worker of its own"
    return None


def _choice(model: Model, method: Method) -> _Choice:
    small = is_miniature(model)
    if method == "textual-inversion":
        return _MINIATURE_INVERSION if small else _REAL_INVERSION
    return _MINIATURE if small else _REAL[model.family]


def _refuse_contradictions(request: TrainingRequest, model: Model, pictures: int | None) -> None:
    if request.method == "textual-inversion":
        if not model.takes_embeddings:
            raise InvalidRequest(
                f"method: {model.name} takes no textual inversion; use dreambooth-lora", param="method"
            )
        _refuse(request, "goes with dreambooth-lora", "rank", "targets", *_OF_THE_CLASS)
        if request.prior_preservation:
            raise InvalidRequest(
                "prior_preservation: textual inversion changes no layer, so there is nothing to preserve",
                param="prior_preservation",
            )
    else:
        _refuse(request, "goes with textual-inversion", "vectors")
    if request.prior_preservation is False:
        _refuse(request, "goes with prior_preservation", *_OF_THE_CLASS)
    for number, caption in enumerate(request.captions or ()):
        if request.trigger not in caption.split():
            raise InvalidRequest(
                f"captions[{number}]: the trigger {request.trigger!r} is not a word of it",
                param=f"captions[{number}]",
            )
    if request.captions is not None and pictures not in {None, len(request.captions)}:
        raise InvalidRequest(
            f"captions: {len(request.captions)} for {pictures} pictures; give one for each", param="captions"
        )


def _refuse(request: TrainingRequest, why: str, *fields: str) -> None:
    for field in fields:
        if getattr(request, field) is not None:
            raise InvalidRequest(f"{field}: it {why}", param=field)


def _class_prompts(request: TrainingRequest, model: Model, choice: _Choice, seed: int) -> tuple[str, ...]:
    """A miniature knows scenes, not nouns: its own ones are what must be kept."""
    if not is_miniature(model):
        return (f"a {request.class_noun}",)
    rng = np.random.default_rng((seed % 2**32, 11))
    count = request.class_pictures or choice.class_pictures
    return tuple(random_scene(rng, 1 + number % 2).caption() for number in range(count))


def _half(model: Model) -> int:
    return -(-model.defaults.num_inference_steps // 2)


def _resolution(request: TrainingRequest, model: Model) -> int:
    side = request.resolution or min(model.defaults.width, model.defaults.height)
    limits = model.limits
    step = max(limits.multiple_of, 8)
    if side % step or not limits.min_side <= side <= limits.max_side or side**2 > limits.max_pixels:
        raise InvalidRequest(
            f"resolution: {model.name} takes multiples of {step} from {limits.min_side} to "
            f"{limits.max_side}, not {side}",
            param="resolution",
        )
    return side
