"""Plans of trainings: what is chosen by the model, what is refused and how."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from trainings import CATALOG

from jubako.errors import InvalidRequest, UnknownModel, refusal
from jubako.miniatures.world import parse
from jubako.training.plan import TrainingPlan, plan_training
from jubako.training.request import TrainingRequest


def plan(pictures: int | None = 5, **fields: Any) -> TrainingPlan:
    asked = {"model": "tiny-sd", "trigger": "zog", "class_noun": "shape"} | fields
    return plan_training(TrainingRequest.model_validate(asked), CATALOG, pictures)


def test_a_miniature_and_a_real_model_get_settings_of_their_own() -> None:
    small, real = plan(), plan(model="sd1.5")
    assert small.learning_rate > 5 * real.learning_rate
    assert (real.rank, real.steps, real.batch_size, real.targets) == (4, 500, 1, "attention")
    assert plan(model="sd3.5-medium").learning_rate == 4e-4
    assert real.resolution == 512
    assert plan(model="sdxl").resolution == 1024
    assert real.class_prompts == ("a shape",)
    assert not real.prior_preservation


def test_a_miniature_s_class_is_its_world() -> None:
    prompts = plan(seed=3, class_pictures=10).class_prompts
    assert len(prompts) == 10
    assert {len(parse(prompt).items) for prompt in prompts} == {1, 2}
    assert plan(seed=3, class_pictures=10).class_prompts == prompts
    assert plan(seed=4, class_pictures=10).class_prompts != prompts


def test_what_is_asked_is_planned() -> None:
    captions = tuple(f"a red zog on the {place}" for place in ("left", "right", "top"))
    asked = plan(3, captions=captions, rank=16, steps=7, seed=5, flips=True, checkpoint_every=3)
    assert (asked.rank, asked.steps, asked.seed, asked.flips) == (16, 7, 5, True)
    assert asked.captions == captions
    assert asked.checkpoint_every == 3
    assert plan().validation_prompt == "a zog shape"


def test_a_plan_survives_being_written() -> None:
    whole = plan(seed=2**62)
    assert TrainingPlan.model_validate_json(whole.model_dump_json()) == whole


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("model", {"model": "tiny-sdxl-lightning"}),
        ("model", {"model": "sd-turbo"}),
        ("model", {"model": "tiny-svd"}),
        ("method", {"model": "tiny-sd3", "method": "textual-inversion"}),
        ("rank", {"method": "textual-inversion", "rank": 4}),
        ("vectors", {"vectors": 2}),
        ("prior_preservation", {"method": "textual-inversion", "prior_preservation": True}),
        ("class_pictures", {"prior_preservation": False, "class_pictures": 10}),
        ("captions[1]", {"captions": ["a zog", "a zogling", "a zog"]}),
        ("captions", {"captions": ["a zog", "the zog"]}),
        ("resolution", {"resolution": 65}),
        ("resolution", {"resolution": 512}),
        ("sample_steps", {"sample_steps": 151}),
        ("trigger", {"trigger": "two words"}),
        ("trigger", {"trigger": "../zog"}),
        ("class_noun", {"class_noun": " "}),
        ("steps", {"steps": 0}),
        ("rank", {"rank": 1000}),
        ("learning_rate", {"learning_rate": float("nan")}),
        ("prompt", {"prompt": "a zog"}),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(field: str, fields: dict[str, Any]) -> None:
    try:
        plan(**fields)
    except ValidationError as error:
        refused: InvalidRequest = refusal(error.errors())  # type: ignore[assignment] # never a file here
    except InvalidRequest as error:
        refused = error
    else:
        pytest.fail("it was planned")
    assert refused.param == field
    assert field.partition("[")[0] in refused.message


def test_an_unknown_model_is_told() -> None:
    with pytest.raises(UnknownModel, match="Did you mean 'tiny-sd'"):
        plan(model="tiny-sdd")
