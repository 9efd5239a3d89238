"""Which files make up a model, on the file lists of real repositories."""

from __future__ import annotations

import pytest

from jubako.catalog import Model, load_catalog
from jubako.weights.layout import PullFailed, choose_files


def names(text: str) -> list[str]:
    return text.split()


SD_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": True,
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
}

SD_FILES = names("""
.gitattributes README.md model_index.json v1-inference.yaml v1-5-pruned.ckpt v1-5-pruned.safetensors
v1-5-pruned-emaonly.ckpt v1-5-pruned-emaonly.safetensors
feature_extractor/preprocessor_config.json
safety_checker/config.json safety_checker/model.safetensors safety_checker/pytorch_model.bin
scheduler/scheduler_config.json
text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
text_encoder/pytorch_model.bin text_encoder/pytorch_model.fp16.bin
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json
unet/config.json unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.bin unet/openvino_model.bin
unet/diffusion_flax_model.msgpack unet/model.onnx unet/model.onnx_data unet/pipeline.py
vae/config.json vae/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.fp16.safetensors
vae_decoder/config.json vae_decoder/model.onnx
""")

SHARDED_FILES = names("""
model_index.json text_encoders/t5xxl_fp16.safetensors
text_encoder_3/config.json text_encoder_3/model-00001-of-00002.safetensors
text_encoder_3/model-00002-of-00002.safetensors text_encoder_3/model.fp16-00001-of-00002.safetensors
text_encoder_3/model.fp16-00002-of-00002.safetensors text_encoder_3/model.safetensors.index.json
text_encoder_3/model.safetensors.index.fp16.json text_encoder_3/pytorch_model.bin.index.json
""")


def model(variant: str | None = "fp16", left_out: tuple[str, ...] = ()) -> Model:
    sd = load_catalog().model("sd1.5")
    weights = sd.weights.model_copy(update={"variant": variant, "components_left_out": left_out})
    return sd.model_copy(update={"weights": weights})


def test_one_variant_of_the_safetensors_and_the_configs_are_taken() -> None:
    assert choose_files(SD_FILES, SD_INDEX, model(left_out=("safety_checker", "feature_extractor"))) == (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    )


def test_without_a_variant_the_plain_weights_are_taken() -> None:
    taken = choose_files(SD_FILES, SD_INDEX, model(variant=None))
    weights = [name for name in taken if name.endswith(".safetensors")]
    assert weights == [
        "safety_checker/model.safetensors",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_component_without_the_variant_comes_with_its_plain_weights() -> None:
    files = [name for name in SD_FILES if name != "vae/diffusion_pytorch_model.fp16.safetensors"]
    taken = choose_files(files, SD_INDEX, model())
    assert "vae/diffusion_pytorch_model.safetensors" in taken
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in taken


@pytest.mark.parametrize(
    ("variant", "shards", "index"),
    [
        ("fp16", "model.fp16-0000{}-of-00002.safetensors", "model.safetensors.index.fp16.json"),
        (None, "model-0000{}-of-00002.safetensors", "model.safetensors.index.json"),
    ],
)
def test_shards_come_with_the_index_of_their_own_variant(
    variant: str | None, shards: str, index: str
) -> None:
    taken = choose_files(
        SHARDED_FILES, {"text_encoder_3": ["transformers", "T5EncoderModel"]}, model(variant)
    )
    inside = {name.removeprefix("text_encoder_3/") for name in taken} - {"model_index.json"}
    assert inside == {"config.json", shards.format(1), shards.format(2), index}


@pytest.mark.parametrize(
    "only", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.non_ema.safetensors"]
)
def test_a_component_without_safe_weights_is_named(only: str) -> None:
    files = ["model_index.json", "unet/config.json", f"unet/{only}"]
    with pytest.raises(PullFailed, match=f"the component unet has no safetensors to take, only {only}"):
        choose_files(files, {"unet": ["diffusers", "UNet2DConditionModel"]}, model())


def test_a_component_without_files_is_named() -> None:
    with pytest.raises(PullFailed, match="names vae, but it has no files"):
        choose_files(["model_index.json"], {"vae": ["diffusers", "AutoencoderKL"]}, model())


def test_an_index_that_is_no_object_is_refused() -> None:
    with pytest.raises(PullFailed, match="not a JSON object"):
        choose_files(["model_index.json"], ["vae"], model())
