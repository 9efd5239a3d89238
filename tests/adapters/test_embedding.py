"""Prompts with embeddings in them, against stock pipelines into which they were loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_files import embedding_file
from lora_files import lora_file, tensors_of
from oracle import job, wrapped
from pipelines import refiner_pipeline, sd_pipeline, sdxl_pipeline
from safetensors.torch import load_file, save_file

from jubako.adapters.bank import AdapterBank
from jubako.adapters.embedding import read_embedding, spoken
from jubako.adapters.store import AdapterStore
from jubako.errors import InvalidRequest
from jubako.families.latent import LatentModel
from jubako.job import EmbeddingUse, Job, LoraUse

PIPELINES: dict[str, Callable[[], Any]] = {"tiny-sd": sd_pipeline, "tiny-sdxl": sdxl_pipeline}
KEYS = {"clip_l": "", "clip_g": "_2"}
LONG = "a blue star " * 8 + "b"  # 73 letters, each of them a token: there is room for two more


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Peft warns of patterns that fit more layers than a file has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """Embeddings of one, four and three vectors for SD, and the last two for SDXL."""
    store, files = AdapterStore(tmp_path / "home"), tmp_path / "files"
    store.add("zog", embedding_file(files / "1.safetensors", 1, **{"<zog>": (32,)}))
    store.add("plim", embedding_file(files / "2.safetensors", 2, emb_params=(4, 32)))
    store.add("quuz", embedding_file(files / "3.safetensors", 3, quuz=(3, 32)), {"trigger": "<quuz>"})
    store.add("plim-xl", embedding_file(files / "4.safetensors", 4, clip_l=(4, 32), clip_g=(4, 48)))
    store.add("quuz-xl", embedding_file(files / "5.safetensors", 5, clip_l=(3, 32), clip_g=(3, 48)))
    return store


def adapted(pipeline: Any, name: str, store: AdapterStore, budget: int = 10**6) -> LatentModel:
    model = wrapped(pipeline, name)
    model.bank = AdapterBank(pipeline, name, store, budget)
    return model


def asked(store: AdapterStore, name: str, prompt: str, *embeddings: str, **fields: Any) -> Job:
    uses = tuple(EmbeddingUse(name=each) for each in embeddings)
    return store.resolved(job(name, prompt=prompt, embeddings=uses, **fields))


def stock_states(
    pipeline: Any, store: AdapterStore, one: Job, prompts: tuple[str, str], lora: Path | None = None
) -> dict[str, torch.Tensor]:
    """What the stock pipeline is told, with the job's embeddings loaded into a copy of it."""
    stock = copy.deepcopy(pipeline)
    if "tokenizer_2" in stock.components:
        stock.tokenizer_2 = copy.deepcopy(stock.tokenizer_2)  # the small pipelines have one for both
    for use in one.embeddings:
        adapter = store.wanted(use.name, "embedding")
        for key, vectors in load_file(adapter.file).items():
            part = KEYS.get(key, "")
            stock.load_textual_inversion(
                {adapter.word: vectors},
                token=adapter.word,
                tokenizer=stock.components[f"tokenizer{part}"],
                text_encoder=stock.components[f"text_encoder{part}"],
            )
    if lora is not None:
        stock.load_lora_weights(lora)
    prompt, negative = prompts
    states, no_states, *pooled = stock.encode_prompt(
        prompt=prompt,
        negative_prompt=negative,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )
    found = {"encoder_hidden_states": torch.cat([no_states, states])}
    return found | ({"text_embeds": torch.cat(pooled[::-1])} if pooled else {})


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, tensor in theirs.items():
        apart = float((ours[name] - tensor).abs().max())
        assert apart < 1e-5, f"{name} differ by {apart:.1e}"


CASES = {
    "one vector": ("tiny-sd", "a zog on the left", "", ("zog",)),
    "four vectors": ("tiny-sd", "a plim, on the left", "", ("plim",)),
    "in both prompts": ("tiny-sd", "a zog and a zog", "a plim of a zog", ("zog", "plim")),
    "beside another": ("tiny-sd", "a plim by a <quuz>", "a star", ("quuz", "plim")),
    "at the cut": ("tiny-sd", f"{LONG} plim", f"{LONG} {LONG} plim", ("plim",)),
    "two encoders": ("tiny-sdxl", "a plim-xl on the left", "a star", ("plim-xl",)),
    "two encoders, both prompts": ("tiny-sdxl", "a plim-xl", "a quuz-xl, a quuz-xl", ("quuz-xl", "plim-xl")),
    "two encoders, at the cut": ("tiny-sdxl", f"{LONG} plim-xl", f"{LONG} {LONG} plim-xl", ("plim-xl",)),
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_states_are_those_of_the_stock_pipeline(store: AdapterStore, case: str) -> None:
    name, prompt, negative, embeddings = CASES[case]
    pipeline = PIPELINES[name]()
    model = adapted(pipeline, name, store)
    plain = job(name, prompt="a zog by a plim", negative_prompt="a star")
    before = model.conditioning(plain)
    one = asked(store, name, prompt, *embeddings, negative_prompt=negative)
    ours = model.conditioning(one)
    compare(ours, stock_states(pipeline, store, one, (prompt, negative)))
    # The base is what it was, bit for bit, also where nothing is kept of it.
    model.forget_prompts()
    for key, tensor in model.conditioning(plain).items():
        assert torch.equal(tensor, before[key])
    assert not torch.equal(ours["encoder_hidden_states"], before["encoder_hidden_states"])


@torch.inference_mode()
def test_so_are_the_pooled_ones_of_the_configs_that_released_models_have(store: AdapterStore) -> None:
    pipeline = sdxl_pipeline()
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.config.eos_token_id = 2
        next(part for part in encoder.modules() if hasattr(part, "eos_token_id")).eos_token_id = 2
    one = asked(store, "tiny-sdxl", "a plim-xl on the left", "plim-xl", negative_prompt="a star")
    ours = adapted(pipeline, "tiny-sdxl", store).conditioning(one)
    compare(ours, stock_states(pipeline, store, one, ("a plim-xl on the left", "a star")))


@pytest.mark.parametrize(("name", "word"), [("tiny-sd", "plim"), ("tiny-sdxl", "plim-xl")])
@torch.inference_mode()
def test_loras_of_the_text_encoders_work_beside_them(store: AdapterStore, name: str, word: str) -> None:
    pipeline = PIPELINES[name]()
    parts = {
        each: tensors_of(module, 7, targets=("q_proj", "v_proj"))
        for each, module in pipeline.components.items()
        if each.startswith("text_encoder")
    }
    file = lora_file(store._folder / "words.safetensors", unet=tensors_of(pipeline.unet, 7), **parts)
    model = adapted(pipeline, name, store)
    use = (LoraUse(name="words", weight=1.0),)
    one = asked(store, name, f"a {word} on the left", word, negative_prompt=f"no {word}", loras=use)
    ours = model.conditioning(one)
    compare(ours, stock_states(pipeline, store, one, (f"a {word} on the left", f"no {word}"), file))
    without = model.conditioning(one.model_copy(update={"loras": ()}))
    assert not torch.allclose(ours["encoder_hidden_states"], without["encoder_hidden_states"], atol=1e-4)


@torch.inference_mode()
def test_the_refiner_has_those_of_its_one_encoder(store: AdapterStore) -> None:
    pipeline = refiner_pipeline(sdxl_pipeline())
    one = asked(store, "sdxl-refiner", "a plim-xl", "plim-xl", negative_prompt="a star")
    ours = adapted(pipeline, "sdxl-refiner", store).conditioning(one)
    stock = copy.deepcopy(pipeline)
    vectors = load_file(store.find("plim-xl").file)["clip_g"]
    stock.load_textual_inversion(
        {"plim": vectors}, tokenizer=stock.tokenizer_2, text_encoder=stock.text_encoder_2
    )
    states = stock.encode_prompt("a plim", do_classifier_free_guidance=False)[0]
    compare({"states": ours["encoder_hidden_states"][1:]}, {"states": states})


@torch.inference_mode()
def test_what_others_encode_meanwhile_is_the_base_s(store: AdapterStore) -> None:
    pipeline = sd_pipeline()
    pipeline.text_encoder.requires_grad_(False)  # as what is served
    words, states = pipeline.tokenizer.get_vocab(), pipeline.encode_prompt("a zog", "cpu", 1, False)[0]
    table = pipeline.text_encoder.get_input_embeddings()
    embedding = read_embedding("plim", store.find("plim").file, pipeline, "tiny-sd")
    with (
        spoken(pipeline, "a <embedding:plim>", {"plim": embedding}) as (view, text),
        ThreadPoolExecutor(1) as other,
    ):
        there = other.submit(pipeline.encode_prompt, "a zog", "cpu", 1, False).result(60)[0]
        strange = other.submit(table, torch.tensor([len(words)]))
        assert not torch.equal(view.encode_prompt(text, "cpu", 1, False)[0], states)
        with pytest.raises(IndexError):
            strange.result(60)
    assert torch.equal(there, states)
    assert pipeline.tokenizer.get_vocab() == words
    assert not table._forward_hooks
    assert not table._forward_pre_hooks


def test_tags_of_no_embedding_of_the_job_are_text(store: AdapterStore) -> None:
    pipeline = sd_pipeline()
    embedding = read_embedding("zog", store.find("zog").file, pipeline, "tiny-sd")
    with spoken(pipeline, "a <embedding:plim> by <embedding:zog>", {"zog": embedding}) as (view, text):
        assert text.startswith("a <embedding:plim> by <|")
        assert len(view.tokenizer) == len(pipeline.tokenizer) + 1


@pytest.mark.parametrize(
    ("name", "model", "reason"),
    [
        ("zog", "tiny-sdxl", "it was made for another number of text encoders"),
        ("plim-xl", "tiny-sd", "it was made for another number of text encoders"),
        ("wide", "tiny-sd", "its vectors are 33 wide, not 32"),
        ("wide-xl", "tiny-sdxl", "its vectors are 32 wide, not 48"),
        ("many", "tiny-sd", "it has 76 vectors, and a prompt has room for 1 to 75"),
        ("none", "tiny-sd", "it has 0 vectors, and a prompt has room for 1 to 75"),
        ("uneven", "tiny-sdxl", "it has more vectors for one text encoder than for the other"),
        ("nan", "tiny-sd", "it has numbers that are not finite"),
        ("torn", "tiny-sd", "its file is torn"),
    ],
)
def test_one_that_does_not_fit_is_refused_with_the_reason(
    store: AdapterStore, tmp_path: Path, name: str, model: str, reason: str
) -> None:
    made: dict[str, dict[str, tuple[int, ...]]] = {
        "wide": {"x": (2, 33)},
        "wide-xl": {"clip_l": (2, 32), "clip_g": (2, 32)},
        "many": {"x": (76, 32)},
        "none": {"x": (0, 32)},
        "uneven": {"clip_l": (2, 32), "clip_g": (3, 48)},
        "torn": {"x": (2, 32)},
    }
    file = tmp_path / f"{name}.safetensors"
    if name == "nan":
        save_file({"x": torch.tensor([0.0, float("nan")] * 16)}, file)
    elif name in made:
        embedding_file(file, **made[name])
    if name == "torn":  # put there by hand: it would not be taken in
        (store.find("zog").file.parents[1] / file.name).write_bytes(file.read_bytes()[:-9])
    elif file.exists():
        store.add(name, file)
    one = asked(store, model, f"a <embedding:{name}>", name)
    with pytest.raises(InvalidRequest) as refusal:
        adapted(PIPELINES[model](), model, store).conditioning(one)
    assert refusal.value.message == f"embeddings: {name} does not fit {model}: {reason}"
    assert refusal.value.param == "embeddings"


@torch.inference_mode()
def test_memory_is_bounded_and_a_job_is_bound_to_the_content(store: AdapterStore, tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    model = adapted(pipeline, "tiny-sd", store, budget=4 * 32 * 4)
    assert model.bank is not None
    one = asked(store, "tiny-sd", "a plim", "plim")
    first = model.conditioning(one)["encoder_hidden_states"]
    assert model.bank.bytes == 4 * 32 * 4
    model.conditioning(asked(store, "tiny-sd", "a quuz <quuz>", "quuz"))
    assert model.bank.bytes == 3 * 32 * 4
    assert torch.equal(model.conditioning(one)["encoder_hidden_states"], first)
    model.conditioning(asked(store, "tiny-sd", "a <quuz>", "quuz"))
    store.remove("plim")
    store.add("plim", embedding_file(tmp_path / "other.safetensors", 9, emb_params=(4, 32)))
    with pytest.raises(InvalidRequest, match="embeddings: plim was replaced meanwhile; ask again"):
        model.conditioning(one)
