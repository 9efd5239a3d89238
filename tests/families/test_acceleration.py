"""Every option gives the plain module's predictions, can be switched off alone, and is documented."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import sd3_pipeline, sd_pipeline, sdxl_pipeline
from server import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from video_pipelines import animatediff_pipeline, svd_pipeline

from jubako.catalog import load_catalog
from jubako.engine.samples import Sample
from jubako.families import sd, sd3, sdxl
from jubako.families.acceleration import (
    OPTIONS,
    Acceleration,
    Option,
    accelerate,
    acceleration_for,
    attention_order,
    in_effect,
    uncompiled,
)
from jubako.families.row_buckets import CapturedForwards, RowBuckets, fast_predict, row_counts
from jubako.families.warm_up import warm_up
from jubako.planning import plan
from jubako.request import TextToImage

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
OFF = Acceleration()

Make = Callable[[], torch.nn.Module]
DENOISERS: Mapping[str, Make] = {
    "sd": lambda: sd_pipeline().unet,
    "sdxl": lambda: sdxl_pipeline().unet,
    "sd3": lambda: sd3_pipeline(dual=(0, 1)).transformer,
}


FAMILIES: Mapping[str, tuple[Callable[[], Any], Callable[[Any, Any], Any]]] = {
    "sd": (sd_pipeline, sd.wrap),
    "sdxl": (sdxl_pipeline, sdxl.wrap),
    "sd3": (sd3_pipeline, sd3.wrap),
}


def given(kind: str, rows: int = 3, device: str = "cpu") -> dict[str, Any]:
    """A forward's arguments, the same for every call."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator).to(device)

    timesteps = torch.linspace(1, 900, rows, device=device)
    if kind == "sd3":
        return {
            "hidden_states": drawn(16, 8, 8),
            "timestep": timesteps,
            "encoder_hidden_states": drawn(20, 64),
            "pooled_projections": drawn(64),
            "return_dict": False,
        }
    arguments = {"sample": drawn(4, 8, 8), "timestep": timesteps, "return_dict": False}
    if kind == "sd":
        return arguments | {"encoder_hidden_states": drawn(7, 32)}
    added = {"text_embeds": drawn(48), "time_ids": drawn(6).abs() * 64}
    return arguments | {"encoder_hidden_states": drawn(7, 80), "added_cond_kwargs": added}


def predicted(module: torch.nn.Module, kind: str) -> torch.Tensor:
    with torch.inference_mode():
        prediction: torch.Tensor = module(**given(kind))[0]
    return prediction


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def of(kind: str, wanted: Acceleration) -> torch.nn.Module:
    name = "transformer" if kind == "sd3" else "unet"
    return accelerate(DENOISERS[kind](), name, wanted)


def norms_that_matter(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of the norms of query and key that are not one, as in a trained model."""
    for name, parameter in module.named_parameters():
        if re.search(r"norm_(added_)?[qk]\.weight$", name):
            parameter.data = torch.linspace(0.2, 3, len(parameter))
    return module


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize(
    "wanted",
    [
        Acceleration(channels_last=True),
        Acceleration(fused_qkv=True),
        Acceleration(channels_last=True, fused_qkv=True),
    ],
    ids=["channels_last", "fused_qkv", "both"],
)
def test_a_denoiser_predicts_the_same_with_another_layout(kind: str, wanted: Acceleration) -> None:
    expected = predicted(DENOISERS[kind](), kind)
    assert apart(predicted(of(kind, wanted), kind), expected) < 1e-4


def test_fused_attention_heeds_the_norms_of_query_and_key() -> None:
    plain, fused = (norms_that_matter(DENOISERS["sd3"]()) for _ in range(2))
    expected = predicted(plain, "sd3")
    assert apart(expected, predicted(DENOISERS["sd3"](), "sd3")) > 1e-3
    assert (
        apart(predicted(accelerate(fused, "transformer", Acceleration(fused_qkv=True)), "sd3"), expected)
        < 1e-4
    )


@pytest.mark.parametrize("kind", DENOISERS)
def test_fusing_takes_no_memory_and_no_random_numbers(kind: str) -> None:
    plain, other = DENOISERS[kind](), DENOISERS[kind]()
    state = torch.get_rng_state()
    fused = accelerate(other, "transformer", Acceleration(fused_qkv=True))
    assert torch.equal(torch.get_rng_state(), state)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (plain, fused)]
    assert counts[0] == counts[1]
    names = {name.rpartition(".")[2] for name, _ in fused.named_modules()}
    assert "to_qkv" in names
    assert "to_v" not in names
    assert not any(parameter.requires_grad for name, parameter in fused.named_parameters() if "qkv" in name)


@pytest.mark.parametrize("make", [svd_pipeline, animatediff_pipeline], ids=["svd", "animatediff"])
def test_denoisers_of_clips_predict_the_same(make: Callable[[], Any]) -> None:
    plain, fast = make().unet, make().unet
    accelerate(fast, "unet", Acceleration(channels_last=True, fused_qkv=True))
    assert any("to_qkv" in name for name, _ in fast.named_modules())
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    arguments = {"timestep": torch.tensor([1.0, 500.0]), "return_dict": False}
    if make is svd_pipeline:
        arguments |= {"sample": drawn(2, 4, 8, 8, 8), "encoder_hidden_states": drawn(2, 1, 32)}
        arguments |= {"added_time_ids": drawn(2, 3)}
    else:
        arguments |= {"sample": drawn(2, 4, 4, 8, 8), "encoder_hidden_states": drawn(2 * 4, 7, 32)}
    with torch.inference_mode():
        assert apart(fast(**arguments)[0], plain(**arguments)[0]) < 1e-4


@pytest.mark.parametrize("make", [sd_pipeline, sd3_pipeline], ids=["sd", "sd3"])
def test_an_autoencoder_encodes_and_decodes_the_same(make: Callable[[], Any]) -> None:
    plain, fast = make().vae, make().vae
    accelerate(fast, "vae", Acceleration(channels_last=True, fused_qkv=True))
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(2, 3, 64, 64, generator=generator)
    with torch.inference_mode():
        latents = plain.encode(picture).latent_dist.mean
        assert apart(fast.encode(picture).latent_dist.mean, latents) < 1e-4
        assert apart(fast.decode(latents).sample, plain.decode(latents).sample) < 1e-4


def test_convolutions_lie_channels_last_but_not_in_transformers() -> None:
    def laid_out(module: torch.nn.Module) -> set[bool]:
        # Where a side or the number of channels is one, both layouts are the same.
        weights = [part.weight for part in module.modules() if isinstance(part, torch.nn.Conv2d)]
        large = [weight for weight in weights if min(weight.shape) > 1]
        return {weight.is_contiguous(memory_format=torch.channels_last) for weight in large}

    wanted = Acceleration(channels_last=True)
    assert laid_out(of("sd", OFF)) == {False}
    assert laid_out(of("sd", wanted)) == {True}
    assert laid_out(of("sd3", wanted)) == {False}


def test_other_components_are_left_as_they_are() -> None:
    encoder = sd_pipeline().text_encoder
    before = dict(encoder.named_modules())
    everything = Acceleration(channels_last=True, fused_qkv=True, compile="whole", float8=True)
    assert accelerate(encoder, "text_encoder", everything) is encoder
    assert dict(encoder.named_modules()) == before
    assert not uncompiled(encoder)


def test_a_compiled_transformer_predicts_the_same_and_keeps_its_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    wanted = Acceleration(fused_qkv=True, compile="blocks")
    # One block, so that one compilation is all: it takes some 20 s on a core.
    plain, fast = (sd3_pipeline().transformer for _ in range(2))
    for module in (plain, fast):
        module.transformer_blocks = module.transformer_blocks[-1:]
    with in_effect(wanted, torch.device("cpu"), tmp_path / "compiled"):
        accelerate(fast, "transformer", wanted)
        assert apart(predicted(fast, "sd3"), predicted(plain, "sd3")) < 1e-4
    assert any((tmp_path / "compiled").rglob("*.so"))


def test_what_repeats_is_compiled_or_the_whole_and_both_are_taken_back() -> None:
    def compiled(module: torch.nn.Module) -> set[str]:
        return {type(part).__name__ for part in module.modules() if part._compiled_call_impl is not None}

    assert compiled(of("sd", OFF)) == set()
    blocks = of("sd", Acceleration(compile="blocks"))
    assert compiled(blocks) == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert compiled(of("sd3", Acceleration(compile="blocks"))) == {"JointTransformerBlock"}
    assert compiled(of("sdxl", Acceleration(compile="whole"))) == {"UNet2DConditionModel"}
    vae = sd_pipeline().vae
    assert compiled(accelerate(vae, "vae", Acceleration(compile="whole"))) == {"Decoder"}
    assert uncompiled(blocks)
    assert compiled(blocks) == set()


def test_a_cpu_has_all_off_and_a_gpu_what_the_options_say() -> None:
    assert acceleration_for("cpu") == OFF
    on = acceleration_for("cuda")
    assert {option.word for option in OPTIONS if on.on(option)} == {
        "channels-last",
        "fused-qkv",
        "attention",
        "tf32",
        "compile",
        "warm-up",
    }
    assert (on.attention, on.compile) == ("fastest", "blocks")
    assert not any(option.on_gpu for option in OPTIONS if option.lossy)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.word)
def test_each_option_is_switched_on_and_off_alone(option: Option) -> None:
    on, off = (acceleration_for("cuda", (prefix + option.word,)) for prefix in ("", "no-"))
    assert on.on(option)
    assert not off.on(option)
    default = acceleration_for("cuda")
    for other in OPTIONS:
        if other is not option:
            assert on.on(other) == off.on(other) == default.on(other)
    alone = acceleration_for("cuda", ("none", option.word))
    assert [other for other in OPTIONS if alone.on(other)] == [option]
    assert acceleration_for("cuda", (option.word, "none")) == OFF


def test_words_choose_from_left_to_right() -> None:
    assert acceleration_for("cpu", ("compile=whole", "fused-qkv")) == Acceleration(
        compile="whole", fused_qkv=True
    )
    assert acceleration_for("cuda", ("attention=flash", "no-compile")).attention == "flash"
    assert acceleration_for("cpu", ("compile=whole", "compile")).compile == "blocks"


@pytest.mark.parametrize(
    "word",
    ["fast", "compile=all", "no-compile=whole", "tf32=yes", "no-none", "no-", "", "fused_qkv", "compile="],
)
def test_unknown_words_are_refused_with_those_that_there_are(word: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(word))) as caught:
        acceleration_for("cuda", (word,))
    for known in ("none", "compile=whole", "no-compile", "attention=math", "float8"):
        assert known in str(caught.value)


@pytest.mark.parametrize("word", [option.word for option in OPTIONS if option.gpu_only])
def test_a_cpu_refuses_what_only_gpus_have(word: str) -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        acceleration_for("cpu", (word,))
    assert acceleration_for("cpu", (f"no-{word}",)) == OFF


def test_nothing_of_the_process_is_changed_on_a_cpu_but_the_folder_of_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

    def state() -> tuple[object, ...]:
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            tuple(torch._C._get_sdp_priority_order()),
            os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
        )

    before = state()
    with in_effect(acceleration_for("cuda"), torch.device("cpu"), tmp_path):
        assert state() == (*before[:-1], str(tmp_path))
    assert state() == before
    with in_effect(OFF, torch.device("cpu"), tmp_path):
        assert state() == before
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    with in_effect(acceleration_for("cuda"), torch.device("cpu"), tmp_path):
        assert state()[-1] == "mine"
    assert state()[-1] == "mine"


@pytest.mark.parametrize("choice", ["cudnn", "flash", "efficient", "math"])
def test_the_chosen_attention_is_tried_first_and_all_others_after_it(choice: str) -> None:
    order = attention_order(choice, torch.device("cpu"))
    assert choice.upper() in order[0].name
    assert len(set(order)) == 4
    assert SDPBackend.ERROR not in order
    states = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    expected = scaled_dot_product_attention(states, states, states)
    with sdpa_kernel(order, set_priority=True):
        assert apart(scaled_dot_product_attention(states, states, states), expected) < 1e-5


def family(kind: str) -> Any:
    """A model of each family in memory, of at most four rows."""
    make, wrap = FAMILIES[kind]
    entry = load_catalog().model(f"tiny-{kind}").model_copy(update={"max_rows": 4})
    return wrap(make(), entry)


def sample_of(model: Any, guidance: float) -> Sample:
    request = TextToImage(
        prompt="abc", model=model.model.name, guidance_scale=guidance, width=64, height=64, seed=3
    )
    sample: Sample = model.prepare(plan(request, load_catalog()))
    return sample


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_padded_forward_gives_what_the_same_rows_give_alone(kind: str, rows: int) -> None:
    model = family(kind)
    row = sample_of(model, 1.0)
    sizes: list[int] = []

    def noted(inputs: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(inputs))
        prediction: torch.Tensor = model.predict(inputs, *others)
        return prediction

    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, *row.latents.shape[1:], generator=generator)
    told = {name: tensor.repeat(rows, *[1] * (tensor.dim() - 1)) for name, tensor in row.conditioning.items()}
    steps = torch.linspace(1, 900, rows)
    with torch.inference_mode():
        expected = model.predict(inputs, steps, told)
        found = RowBuckets(noted, (4,))(inputs, steps, told)
    assert sizes == [4]
    assert found.shape == expected.shape
    assert apart(found, expected) < 1e-4


def test_rows_are_padded_to_the_next_count_and_never_cut() -> None:
    def told(inputs: torch.Tensor, timesteps: torch.Tensor, conditioning: Any, skip: Any) -> torch.Tensor:
        assert len(inputs) == len(timesteps) == len(conditioning["text"])
        assert skip == (1,)
        sizes.append(len(inputs))
        doubled: torch.Tensor = inputs * 2 + timesteps[:, None] + conditioning["text"]
        return doubled

    sizes: list[int] = []
    bucketed = RowBuckets(told, row_counts(6))
    for rows in (1, 2, 3, 4, 5, 6, 7):
        inputs, text = torch.rand(rows, 3), torch.rand(rows, 3)
        steps = torch.arange(rows).float()
        assert torch.equal(bucketed(inputs, steps, {"text": text}, (1,)), inputs * 2 + steps[:, None] + text)
    assert sizes == [1, 2, 4, 4, 6, 6, 7]


def test_the_counts_end_with_the_most_that_a_forward_holds() -> None:
    assert row_counts(8) == (1, 2, 4, 6, 8)
    assert row_counts(5) == (1, 2, 4, 5)
    assert row_counts(1) == (1,)


def test_a_predict_is_wrapped_only_by_what_is_on() -> None:
    predict = family("sd").predict
    assert fast_predict(predict, OFF, 8) is predict
    assert isinstance(fast_predict(predict, Acceleration(cuda_graphs=True), 8), CapturedForwards)
    assert isinstance(fast_predict(predict, Acceleration(row_buckets=True, cuda_graphs=True), 8), RowBuckets)


def test_warming_up_runs_every_row_count_and_one_decoding() -> None:
    model = family("sd")
    seen: list[int] = []
    model.denoiser.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    model.pipeline.vae.decoder.register_forward_pre_hook(lambda *_: seen.append(0))
    assert warm_up(model, sample_of(model, 7.5)) == (1, 2, 4)
    assert seen == [1, 2, 4, 0]


def test_a_model_that_cannot_be_compiled_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    model = family("sd")
    torch.compiler.reset()

    def refuses(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    model.denoiser.mid_block.compile(backend=refuses)
    sample = sample_of(model, 1.0)
    assert warm_up(model, sample, [model.denoiser, model.pipeline.vae]) == (1, 2, 4)
    assert "no-compile" in caplog.text
    model.denoiser.mid_block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        warm_up(model, sample, [model.denoiser])


def test_the_table_of_the_options_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "acceleration.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if re.match(r"\| `[a-z0-9-]+`", line)]
    table = {cells[0].strip(" `"): cells for cells in (line.strip("|").split("|") for line in lines)}
    assert list(table) == [option.word for option in OPTIONS]
    for option in OPTIONS:
        _, says, on_cpu, on_gpu, lossy, off = (cell.strip() for cell in table[option.word])
        expected = [f"`{option.word}={choice}`" for choice in option.choices[1:]]
        assert re.findall(r"`[a-z-]+=[a-z]+`", says) == expected
        assert on_cpu == ("none" if option.gpu_only else "off")
        assert on_gpu == ((option.choices or ("on",))[0] if option.on_gpu else "off")
        assert lossy == ("lossy" if option.lossy else "equal")
        assert off == f"`no-{option.word}`"
    assert "Nothing on this page has run on a GPU" in page


@needs_gpu
@pytest.mark.parametrize("words", [("no-compile", "no-tf32"), ("no-tf32",)], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", DENOISERS)
def test_a_gpu_predicts_the_same_with_its_defaults(kind: str, words: tuple[str, ...], tmp_path: Path) -> None:
    device, wanted = torch.device("cuda"), acceleration_for("cuda", words)
    plain = DENOISERS[kind]().to(device)
    with torch.inference_mode(), in_effect(wanted, device, tmp_path):
        fast = accelerate(DENOISERS[kind]().to(device), "transformer" if kind == "sd3" else "unet", wanted)
        expected = plain(**given(kind, device="cuda"))[0]
        assert apart(fast(**given(kind, device="cuda"))[0], expected) < 1e-4


@needs_gpu
def test_the_order_of_attention_and_tf32_hold_as_long_as_the_context() -> None:
    device = torch.device("cuda")
    before = torch._C._get_sdp_priority_order(), torch.backends.cudnn.allow_tf32
    with in_effect(acceleration_for("cuda", ("attention=efficient", "no-tf32")), device):
        assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.EFFICIENT_ATTENTION)  # type: ignore[call-overload] # it is an enumeration of C++
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert before == (torch._C._get_sdp_priority_order(), torch.backends.cudnn.allow_tf32)


@needs_gpu
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_a_replayed_forward_gives_what_a_plain_one_gives(kind: str) -> None:
    make, wrap = FAMILIES[kind]
    model = wrap(make().to("cuda"), load_catalog().model(f"tiny-{kind}"))
    captured = CapturedForwards(model.predict)
    sample = sample_of(model, 7.5)
    with torch.inference_mode():
        for turn in range(4):
            inputs = torch.randn(2, *sample.latents.shape[1:], device="cuda")
            steps = torch.full((2,), 100.0 * turn + 1, device="cuda")
            found = captured(inputs, steps, sample.conditioning)
            assert apart(found, model.predict(inputs, steps, sample.conditioning)) < 1e-4
    assert len(captured._graphs) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_forward_with_adapters_is_neither_captured_nor_replayed(device: str) -> None:
    adapters: list[float] = []

    def adapted(inputs: torch.Tensor, *_: Any) -> torch.Tensor:
        return inputs + sum(adapters)

    captured = CapturedForwards(adapted, adapted=lambda: bool(adapters))
    for turn in ([1.0], [1.0], [], [], [], [2.0], []):
        adapters[:] = turn
        inputs = torch.rand(2, 4, device=device)
        assert torch.equal(captured(inputs, torch.zeros(2, device=device), {}), inputs + sum(turn))
        # Only what it has seen can it capture.
        assert bool(captured._seen) == (turn != [1.0])


@needs_gpu
def test_no_more_graphs_are_kept_than_wanted() -> None:
    def doubled(inputs: torch.Tensor, *_: Any) -> torch.Tensor:
        return inputs * 2

    captured = CapturedForwards(doubled, most=2)
    for rows in (1, 2, 3, 1, 2, 3, 1):
        inputs = torch.rand(rows, 4, device="cuda")
        assert torch.equal(captured(inputs, torch.zeros(rows, device="cuda"), {}), inputs * 2)
    assert len(captured._graphs) == 2
