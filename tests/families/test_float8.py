"""Float8 linear layers: their arithmetic against one that is written out, and which layers they replace."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped] # it has no types
from pipelines import sd3_pipeline, sd_pipeline, sdxl_pipeline
from torch.nn import functional

from benchmarks.architectures import ARCHITECTURES
from jubako.families.acceleration import Acceleration, accelerate
from jubako.families.float8 import Float8Linear, float8_layers, has_float8_matmul, quantized, to_float8

MOST = 448.0


def linear(inputs: int = 48, outputs: int = 32, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias)


def states(*shape: int) -> torch.Tensor:
    """Values of rows that are apart by three powers of ten, as activations are."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return drawn * torch.logspace(-2, 1, shape[-2])[:, None]


def nearest(value: float) -> float:
    """The float8 of three bits of mantissa that is nearest, ties to even, counted and not converted."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = max(torch.tensor(magnitude).log2().floor().item(), -6.0)
    step = 2 ** (exponent - 3)
    rounded = min(round(magnitude / step) * step, MOST)
    return rounded if value > 0 else -rounded


def by_hand(layer: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    """The layer in float64, with a scale for each row and for each output."""

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        lines = []
        for line in matrix.double():
            scale = line.abs().max().item() / MOST
            lines.append([nearest(value.item() / scale) * scale for value in line])
        return torch.tensor(lines, dtype=torch.float64)

    return rounded(rows) @ rounded(layer.weight.detach()).T + layer.bias.detach().double()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The root of the mean square of the difference, in parts of that of what is expected."""
    found, expected = found.double(), expected.double()
    return ((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@torch.no_grad()
def test_a_layer_gives_what_its_arithmetic_written_out_gives() -> None:
    layer, rows = linear(), states(6, 48)
    found = Float8Linear(layer)(rows)
    # A quotient of float32 may fall on the other side of a tie.
    assert apart(found, by_hand(layer, rows)) < 1e-3
    assert 1e-3 < apart(found, layer(rows)) < 0.05


@torch.no_grad()
def test_the_call_for_matrix_units_computes_the_same_up_to_bfloat16() -> None:
    layer = Float8Linear(linear())
    expected = layer(states(2, 8, 48))
    layer.on_matrix_units = True  # PyTorch has this call for CPUs too
    found = layer(states(2, 8, 48))
    assert found.shape == expected.shape == (2, 8, 32)
    assert apart(found, expected) < 2**-8


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_shape_and_bias_are_those_of_the_layer(dtype: torch.dtype) -> None:
    for bias in (True, False):
        layer = linear(bias=bias).to(dtype)
        rows = states(2, 3, 5, 48).to(dtype)
        found = Float8Linear(layer)(rows)
        assert found.dtype == dtype
        assert found.shape == (2, 3, 5, 32)
        assert apart(found, layer(rows)) < 0.06


@torch.no_grad()
def test_a_row_has_its_own_scale_and_does_not_see_the_others() -> None:
    layer, rows = Float8Linear(linear()), states(6, 48)
    alone = torch.cat([layer(row[None]) for row in rows])
    assert apart(layer(rows), alone) < 1e-6
    for row, value in zip(layer(rows), by_hand(linear(), rows), strict=True):
        assert apart(row, value) < 5e-3


@torch.no_grad()
def test_zeros_stay_zeros_and_nothing_overflows() -> None:
    layer = Float8Linear(linear(bias=False))
    assert torch.equal(layer(torch.zeros(3, 48)), torch.zeros(3, 32))
    values, scale = quantized(torch.tensor([[1e30, -1e30, 1.0]]), torch.float8_e4m3fn)
    assert values.float().tolist() == [[MOST, -MOST, 0.0]]
    assert scale.item() == pytest.approx(1e30 / MOST)


def test_a_layer_takes_a_quarter_of_float32_s_memory() -> None:
    layer = Float8Linear(linear(512, 512))
    taken = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    assert taken == 512 * 512 + 512 * 4 + 512 * 4


def sd3() -> torch.nn.Module:
    transformer: torch.nn.Module = sd3_pipeline(dual=(0, 1)).transformer
    return transformer


@torch.inference_mode()
@pytest.mark.parametrize("fused", [False, True])
def test_a_transformer_s_prediction_is_off_by_some_per_cent(fused: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=generator),
        "timestep": torch.tensor([10.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 20, 64, generator=generator),
        "pooled_projections": torch.randn(2, 64, generator=generator),
        "return_dict": False,
    }
    plain, lossy = sd3(), accelerate(sd3(), "transformer", Acceleration(fused_qkv=fused))
    assert to_float8(lossy, least=16) > 0
    error = apart(lossy(**arguments)[0], plain(**arguments)[0])
    assert 1e-4 < error < 0.03, f"relative error {error:.2e}"


def test_only_layers_over_the_latents_tokens_are_replaced() -> None:
    names = {name.partition("transformer_blocks.")[2].partition(".")[2] for name in float8_layers(sd3(), 16)}
    assert names == {
        *(f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    }
    unet = sdxl_pipeline().unet
    kinds = {name.partition("transformer_blocks.")[2].partition(".")[2] for name in float8_layers(unet, 16)}
    assert kinds == {
        *(f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn2.{part}" for part in ("to_q", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    }
    accelerate(unet, "unet", Acceleration(fused_qkv=True))
    assert not any("to_kv" in name for name in float8_layers(unet, 16))
    assert any("to_qkv" in name for name in float8_layers(unet, 16))


def test_small_layers_are_left_alone() -> None:
    assert float8_layers(sd3()) == []
    assert to_float8(sd_pipeline().unet) == 0


@pytest.mark.parametrize(
    ("name", "part", "share"), [("sdxl", "unet", 0.718), ("sd3.5-medium", "transformer", 0.358)]
)
def test_this_share_of_the_real_architectures_weights_becomes_float8(
    name: str, part: str, share: float
) -> None:
    with init_empty_weights():
        denoiser = ARCHITECTURES[name].components()[part]
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    layers = [denoiser.get_submodule(each).weight.numel() for each in float8_layers(denoiser)]
    assert sum(layers) / total == pytest.approx(share, abs=1e-3)


def test_float8_is_asked_for_by_name_and_for_denoisers_only() -> None:
    wanted = Acceleration(float8=True)
    with torch.device("meta"):
        block = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([torch.nn.Linear(512, 512)])})
    assert isinstance(accelerate(block, "vae", wanted)["transformer_blocks"][0], torch.nn.Linear)  # type: ignore[index] # a ModuleDict
    assert not has_float8_matmul(torch.device("cpu"))


@pytest.mark.skipif(
    not torch.cuda.is_available() or not has_float8_matmul(torch.device("cuda")),
    reason="needs a GPU with float8: NVIDIA from 8.9 on, gfx942 or gfx950",
)
@torch.no_grad()
def test_matrix_units_give_what_the_reference_gives() -> None:
    layer = linear(1024, 512).to("cuda", torch.bfloat16)
    rows = states(77, 1024).to("cuda", torch.bfloat16)
    fast = Float8Linear(layer)
    assert fast.on_matrix_units
    found = fast(rows)
    fast.on_matrix_units = False
    assert apart(found, fast(rows)) < 0.01
    assert apart(found, functional.linear(rows, layer.weight, layer.bias)) < 0.06
