"""Miniatures served from graphs in the vendors' layouts, against their standard weights in PyTorch."""

from __future__ import annotations

import io
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_graphs import Exported
from PIL import Image

from jubako.adapters.bank import AdapterBank
from jubako.adapters.store import AdapterStore
from jubako.catalog import Catalog, load_catalog
from jubako.clip import ImageToVideo
from jubako.engine.batcher import StepBatcher
from jubako.engine.ticket import Ticket
from jubako.errors import InvalidRequest
from jubako.job import EmbeddingUse, Job
from jubako.planning import plan
from jubako.request import ImageToImage, TextToImage
from jubako.weight_sets import Precision, Vendor
from jubako.weights.components import ComponentStore
from jubako.weights.graphs.proxies import GraphDenoiser
from jubako.weights.graphs.runtime import GraphRuntime

CATALOG: Catalog = load_catalog()
HOME = Path("/nowhere")
CPU = torch.device("cpu")

# Largest difference of a pixel, of 255, by what is computed in.
BOUNDS: dict[Precision, float] = {"float32": 0.01, "mixed": 1.5, "float16": 1.5, "bfloat16": 6.0}


def loaded(name: str, runtime: GraphRuntime | None = None) -> Any:
    model = CATALOG.model(name)
    store = ComponentStore(CATALOG.families[model.family].models)
    pipeline = store.load(model, HOME, CPU, torch.float32, runtime=runtime).pipeline
    return import_module(f"jubako.families.{model.family}").wrap(pipeline, model)


standard = cache(loaded)


def jobs_of(name: str) -> list[Job]:
    """Requests of other steps, guidance and schedulers, so that no two of them are ever in step."""
    model = CATALOG.model(name)
    if "img2vid" in model.tasks:
        picture = Image.new("RGB", (64, 64), (40, 80, 220))
        picture.paste((220, 40, 40), (10, 20, 30, 40))
        file = io.BytesIO()
        picture.save(file, "PNG")
        return [
            plan(
                ImageToVideo(image=file.getvalue(), model=name, seed=seed, num_inference_steps=steps), CATALOG
            )
            for seed, steps in ((1, 3), (2, 4))
        ]
    prompt = "a large red circle on the left of a blue background"
    flow = model.flow
    return [
        plan(TextToImage(prompt=prompt, model=name, seed=1, num_inference_steps=4), CATALOG),
        plan(
            TextToImage(prompt=prompt, model=name, seed=2, num_inference_steps=5, guidance_scale=1), CATALOG
        ),
        plan(
            TextToImage(
                prompt="a small green star above a white ring on a black background",
                model=name,
                seed=3,
                num_inference_steps=6,
                scheduler="Heun" if not flow else "FlowMatchHeunDiscreteScheduler",
                width=96,
                height=64,
            ),
            CATALOG,
        ),
        plan(
            TextToImage(
                prompt=prompt, model=name, seed=4, num_inference_steps=4, negative_prompt="a green star"
            ),
            CATALOG,
        ),
    ]


def pictures(model: Any, jobs: list[Job], *, together: bool = True) -> list[torch.Tensor]:
    """What becomes of the jobs in one batcher, all at once or one after the other."""
    batcher = StepBatcher()
    tickets = []
    for job in jobs:
        tickets.append(Ticket())
        batcher.submit(model.prepare(job), tickets[-1])
        if not together:
            tickets[-1].decoded.result(60)
    decoded = [ticket.decoded.result(60) for ticket in tickets]
    batcher.close()
    return decoded


def apart(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True)) * 255


@pytest.mark.parametrize(
    ("name", "layout", "precision", "fixed"),
    [
        ("tiny-sd", "nvidia", "float32", {"one_timestep": True}),
        ("tiny-sd", "amd", "float16", {}),
        ("tiny-sdxl", "nvidia", "float16", {"one_timestep": True}),
        ("tiny-sdxl", "amd", "float32", {}),
        ("tiny-sdxl", "amd", "mixed", {}),
        ("tiny-sd3", "nvidia", "float32", {}),
        ("tiny-sd3", "nvidia", "bfloat16", {}),
        ("tiny-sd3", "amd", "mixed", {"rows": 1}),
        ("tiny-svd", "nvidia", "float32", {"one_timestep": True}),
    ],
)
def test_pictures_are_those_of_the_standard_weights(
    exported: Exported, name: str, layout: Vendor, precision: Precision, fixed: dict[str, Any]
) -> None:
    model, jobs = loaded(name, exported(name, layout, precision, **fixed)), jobs_of(name)
    assert isinstance(model.pipeline.components.get("unet") or model.pipeline.transformer, GraphDenoiser)
    together = pictures(model, jobs)
    assert apart(together, pictures(standard(name), jobs)) <= BOUNDS[precision]
    # In company as alone, also where the graph takes one row or one timestep a call.
    assert apart(together, pictures(model, jobs, together=False)) <= 1e-3 * 255


def test_a_picture_to_start_from_is_encoded_by_pytorch_with_the_request_s_seed(exported: Exported) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (220, 40, 40)).save(file, "PNG")
    jobs = [
        plan(
            ImageToImage(
                prompt="a blue star", image=file.getvalue(), model="tiny-sd", seed=seed, num_inference_steps=4
            ),
            CATALOG,
        )
        for seed in (1, 2)
    ]
    graphs = pictures(loaded("tiny-sd", exported("tiny-sd", "nvidia", "float32", one_timestep=True)), jobs)
    assert apart(graphs, pictures(standard("tiny-sd"), jobs)) <= BOUNDS["float32"]
    assert apart(graphs[:1], graphs[1:]) > 1


def test_what_a_graph_can_not_do_is_refused_before_it_shares_a_forward(
    exported: Exported, tmp_path: Path
) -> None:
    model = loaded("tiny-svd", exported("tiny-svd", "nvidia", "float32", one_timestep=True))
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    short = plan(ImageToVideo(image=file.getvalue(), model="tiny-svd", num_frames=4), CATALOG)
    with pytest.raises(InvalidRequest, match=r"num_frames: .*sample: float32\[2B, 8, 8, H, W\]") as refusal:
        model.prepare(short)
    assert refusal.value.param == "num_frames"
    layered = jobs_of("tiny-sd3")[0].model_copy(
        update={"skip_layer_guidance": CATALOG.model("sd3.5-medium").skip_layer_guidance}
    )
    transformer = loaded("tiny-sd3", exported("tiny-sd3", "nvidia", "float32"))
    with pytest.raises(InvalidRequest, match="skip_layer_guidance: tiny-sd3 is served from graphs"):
        transformer.prepare(layered)
    worded = jobs_of("tiny-sd")[0].model_copy(update={"embeddings": (EmbeddingUse(name="zog"),)})
    unet = loaded("tiny-sd", exported("tiny-sd", "nvidia", "float32", one_timestep=True))
    unet.bank = AdapterBank(unet.pipeline, "tiny-sd", AdapterStore(tmp_path), 10**6)
    with pytest.raises(InvalidRequest, match="embeddings: tiny-sd is served from graphs"):
        unet.prepare(worded)
