"""Several models in one process: what it takes of the machine's memory, and that no request is lost to it."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from pipelines import sd_pipeline
from server import serving

from jubako.catalog import Catalog, load_catalog
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.result import Result
from jubako.runner import Runner
from jubako.settings import load_settings

HERE = Path(__file__).parent
MODELS = ("sd1.4", "sd1.5", "sd2-base")
MB = 10**6


def heavy_unet(seed: int) -> UNet2DConditionModel:
    """A random UNet of some 120 MB."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(176, 352),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def write_models(folder: Path, *, heavy: bool) -> int:
    """A catalog whose three models have weights of their own here; the bytes of the largest."""
    entries = ["family: sd", "models:"]
    sd_pipeline().save_pretrained(folder / "warm-up")
    entries.append("  tiny-sd: {weights: {folder: warm-up}}")
    sizes = []
    for seed, name in enumerate(MODELS):
        pipeline = sd_pipeline(seed=seed)
        if heavy:
            pipeline.register_modules(unet=heavy_unet(seed))
        pipeline.save_pretrained(folder / name)
        entries.append(f"  {name}: {{weights: {{repo: null, folder: {name}}}}}")
        modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        sizes.append(sum(tensor.nbytes for module in modules for tensor in module.parameters()))
    (folder / "sd.yaml").write_text("\n".join(entries) + "\n", encoding="utf-8")
    return int(max(sizes))


def served_in_its_own_process(folder: Path, budget: int, rounds: int) -> dict[str, Any]:
    command = [sys.executable, HERE / "thirsty.py", folder, folder / "home", str(budget), str(rounds)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def test_three_models_under_a_budget_for_two_take_the_memory_of_two(tmp_path: Path) -> None:
    largest = write_models(tmp_path, heavy=True)
    budget = int(2.2 * largest)
    free = served_in_its_own_process(tmp_path, 0, 1)
    kept = served_in_its_own_process(tmp_path, budget, 4)
    print(f"\nlargest model {largest / MB:.0f} MB, budget {budget / MB:.0f} MB")
    for name, figures in (("without", free), ("within", kept)):
        print(f"{name} the budget: peak {figures['peak'] / MB:.0f} MB, after {figures['after'] / MB:.0f} MB")
    assert largest > 100 * MB
    # All three are there when nothing forbids it, so the figures do see models.
    assert set(MODELS) <= set(free["resident"])
    assert free["after"] > 2.9 * largest
    assert sum(kept["resident"].values()) <= budget
    assert kept["peak"] <= budget + largest
    assert kept["after"] <= budget


def test_200_requests_in_turn_over_three_models_lose_none(tmp_path: Path) -> None:
    largest = write_models(tmp_path, heavy=False)
    catalog = load_catalog(tmp_path)
    budget = int(2.2 * largest)
    home = str(tmp_path / "home")
    settings = load_settings(
        {"JUBAKO_HOME": home, "JUBAKO_DEVICE": "cpu", "JUBAKO_MEMORY_BUDGET": str(budget)}
    )
    runner = Runner(catalog.families["sd"], settings)
    turns = iter([(seed, MODELS[seed % 3]) for seed in range(200)])
    results: list[Result] = []

    async def client() -> None:
        for seed, model in turns:
            results.append(await runner.generate(job(catalog, model, seed)))
            resident = [state.bytes for state in runner.states().values() if state.state == "resident"]
            assert sum(resident) <= budget

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(6)))

    asyncio.run(clients())
    runner.close()
    assert [result.error for result in results] == [None] * 200
    assert Counter(result.seed for result in results) == Counter(range(200))
    # What came back is each model's own picture, whatever was evicted in between.
    by_seed = {result.seed: result for result in results}
    alone = Runner(catalog.families["sd"], settings)
    for seed in (0, 1, 2, 197, 198, 199):
        again = asyncio.run(alone.generate(job(catalog, MODELS[seed % 3], seed)))
        pairs = zip(pixels(again), pixels(by_seed[seed]), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1
    alone.close()


def job(catalog: Catalog, model: str, seed: int) -> Any:
    fields = {"prompt": "a red circle", "model": model, "seed": seed, "steps": 2, "width": 64, "height": 64}
    return plan(TextToImage.model_validate(fields), catalog)


def pixels(result: Result) -> bytes:
    return Image.open(io.BytesIO(result.checked().content)).tobytes()


def test_the_list_of_models_follows_a_load(tmp_path: Path) -> None:
    with serving(tmp_path, target="slow:Gateway", cwd=HERE, wait=False, SLOW_LOAD_SECONDS="5") as server:
        seen: list[str | None] = []
        deadline = time.monotonic() + 120
        while (not seen or seen[-1] in {None, "loading"}) and time.monotonic() < deadline:
            try:
                entries = httpx.get(f"{server.url}/v1/models", timeout=5).json()["data"]
            except (httpx.TransportError, ValueError):
                continue
            (sleeper,) = (entry for entry in entries if entry["id"] == "sleeper")
            assert sleeper["loaded"] is (None if sleeper["state"] is None else sleeper["state"] == "resident")
            if sleeper["state"] == "loading":
                assert 0 <= sleeper["loading_fraction"] <= 1
            seen.append(sleeper["state"])
            time.sleep(0.1)
        # None is what the list says while the family does not answer in time.
        assert list(dict.fromkeys(state for state in seen if state is not None)) == ["loading", "resident"]
