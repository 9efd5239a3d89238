"""The shapes that engines are built for and what providers are told, by the inputs of vendors' graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from jubako.errors import UnusableWeights
from jubako.weight_sets import Profile
from jubako.weights.engines import (
    migraphx_environment,
    migraphx_options,
    profile_shapes,
    tensorrt_options,
)

SDXL_UNET: dict[str, tuple[int | str, ...]] = {
    "sample": ("2B", 4, "H", "W"),
    "timestep": (1,),
    "encoder_hidden_states": ("2B", 77, 2048),
    "text_embeds": ("2B", 1280),
    "time_ids": ("2B", 6),
}
SD35_TRANSFORMER: dict[str, tuple[int | str, ...]] = {
    "hidden_states": ("2B", 16, "H", "W"),
    "encoder_hidden_states": ("2B", 333, 4096),
    "pooled_projections": ("2B", 2048),
    "timestep": ("2B",),
    "block_controlnet_hidden_states": (19, "2B", "HW/4", 2432),
}
SD3_MMDIT: dict[str, tuple[int | str, ...]] = {
    "sample": ("2B", 16, "H", "W"),
    "sigma": ("2B",),
    "c_crossattn": ("2B", 154, 4096),
    "y": ("2B", 2048),
}
SVD_UNET: dict[str, tuple[int | str, ...]] = {
    "sample": ("2B", "num_frames", 8, "H", "W"),
    "timestep": (1,),
    "encoder_hidden_states": ("2B", 1, 1024),
    "added_time_ids": ("2B", 3),
}


def test_sdxl_s_unet_has_its_profile_s_shapes() -> None:
    assert profile_shapes(SDXL_UNET, Profile(), size=(1024, 768)) == {
        "sample": ((1, 4, 32, 32), (2, 4, 96, 128), (8, 4, 170, 170)),
        "encoder_hidden_states": ((1, 77, 2048), (2, 77, 2048), (8, 77, 2048)),
        "text_embeds": ((1, 1280), (2, 1280), (8, 1280)),
        "time_ids": ((1, 6), (2, 6), (8, 6)),
    }


def test_sd3_s_transformers_have_their_profile_s_shapes() -> None:
    profile = Profile(min_side=512, max_side=1536, rows=(2, 4))
    assert profile_shapes(SD35_TRANSFORMER, profile, size=(1024, 1024)) == {
        "hidden_states": ((2, 16, 64, 64), (2, 16, 128, 128), (4, 16, 192, 192)),
        "encoder_hidden_states": ((2, 333, 4096), (2, 333, 4096), (4, 333, 4096)),
        "pooled_projections": ((2, 2048), (2, 2048), (4, 2048)),
        "timestep": ((2,), (2,), (4,)),
        "block_controlnet_hidden_states": ((19, 2, 1024, 2432), (19, 2, 4096, 2432), (19, 4, 9216, 2432)),
    }
    shapes = profile_shapes(SD3_MMDIT, profile, size=(1024, 1024), rows=4)
    assert shapes["sample"] == ((2, 16, 64, 64), (4, 16, 128, 128), (4, 16, 192, 192))
    assert shapes["sigma"] == ((2,), (4,), (4,))


def test_svd_s_unet_has_frames_between_rows_and_channels() -> None:
    profile = Profile(min_side=256, max_side=1024, rows=(2,))
    for fixed in ({"num_frames": 25}, {"frames": 25}):
        assert profile_shapes(SVD_UNET, profile, size=(1024, 576), fixed=fixed) == {
            "sample": ((2, 25, 8, 32, 32), (2, 25, 8, 72, 128), (2, 25, 8, 128, 128)),
            "encoder_hidden_states": ((2, 1, 1024),) * 3,
            "added_time_ids": ((2, 3),) * 3,
        }


def test_a_free_dim_that_nothing_tells_is_named() -> None:
    with pytest.raises(UnusableWeights, match="'num_frames' of the graph's input sample"):
        profile_shapes(SVD_UNET, Profile(), size=(1024, 576))
    with pytest.raises(UnusableWeights, match="'tokens' of the graph's input encoder_hidden_states"):
        profile_shapes({"encoder_hidden_states": ("B", "tokens", 64)}, Profile(), size=(64, 64))


def test_a_profile_of_named_sizes_spans_them_and_prefers_the_one_that_is_asked() -> None:
    profile = Profile(sizes=((1024, 1024), (1344, 768)), rows=(1, 2))
    sample = {"sample": SDXL_UNET["sample"]}
    (tall,) = profile_shapes(sample, profile, size=(1344, 768)).values()
    assert tall == ((1, 4, 96, 128), (2, 4, 96, 168), (2, 4, 128, 168))
    (square,) = profile_shapes(sample, profile, size=(512, 512), rows=1).values()
    assert square == ((1, 4, 96, 128), (1, 4, 128, 128), (2, 4, 128, 168))


def test_graphs_of_text_and_of_pictures_have_rows_and_sides_too() -> None:
    text: dict[str, tuple[int | str, ...]] = {"input_ids": ("B", 77)}
    assert profile_shapes(text, Profile(), size=(64, 64)) == {"input_ids": ((1, 77), (2, 77), (8, 77))}
    picture: dict[str, tuple[int | str, ...]] = {"images": ("B", 3, "8H", "8W")}
    (shapes,) = profile_shapes(picture, Profile(), size=(2048, 64), latent_factor=1).values()
    assert shapes == ((1, 3, 256, 256), (2, 3, 256, 1360), (8, 3, 1360, 1360))


def test_a_graph_of_fixed_dims_needs_no_profile(tmp_path: Path) -> None:
    inputs: dict[str, tuple[int | str, ...]] = {"sample": (2, 4, 128, 128), "timestep": ()}
    assert profile_shapes(inputs, Profile(), size=(1024, 1024)) == {}
    assert "trt_profile_min_shapes" not in tensorrt_options(tmp_path, {}, "float16")


def test_tensorrt_s_options_are_words(tmp_path: Path) -> None:
    shapes = profile_shapes(SDXL_UNET, Profile(), size=(1024, 1024))
    assert tensorrt_options(tmp_path, shapes, "float16") == {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(tmp_path),
        "trt_profile_min_shapes": (
            "sample:1x4x32x32,encoder_hidden_states:1x77x2048,text_embeds:1x1280,time_ids:1x6"
        ),
        "trt_profile_opt_shapes": (
            "sample:2x4x128x128,encoder_hidden_states:2x77x2048,text_embeds:2x1280,time_ids:2x6"
        ),
        "trt_profile_max_shapes": (
            "sample:8x4x170x170,encoder_hidden_states:8x77x2048,text_embeds:8x1280,time_ids:8x6"
        ),
        "trt_fp16_enable": "True",
    }


@pytest.mark.parametrize(
    ("precision", "enabled"),
    [
        ("float32", set()),
        ("float16", {"trt_fp16_enable"}),
        ("mixed", {"trt_fp16_enable"}),
        ("bfloat16", {"trt_bf16_enable"}),
        ("float8", set()),
    ],
)
def test_tensorrt_may_choose_the_precision_of_the_graph(
    tmp_path: Path, precision: str, enabled: set[str]
) -> None:
    options = tensorrt_options(tmp_path, {}, precision)  # type: ignore[arg-type] # the parameters are words
    assert {name for name in options if name in {"trt_fp16_enable", "trt_bf16_enable"}} == enabled


def test_migraphx_is_told_in_both_ways(tmp_path: Path) -> None:
    assert migraphx_options(tmp_path) == {"migraphx_model_cache_dir": str(tmp_path)}
    assert migraphx_environment(tmp_path) == {"ORT_MIGRAPHX_MODEL_CACHE_PATH": str(tmp_path)}
