"""Small random Shap-E pipelines in the real layout, and one whose objects have a surface."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import HeunDiscreteScheduler, PriorTransformer, ShapEImg2ImgPipeline, ShapEPipeline
from diffusers.pipelines.shap_e import ShapERenderer
from diffusers.pipelines.shap_e.renderer import MeshDecoder, volume_query_points
from pipelines import text_encoder, tokenizer
from skimage import measure
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
)

WIDTH = 16
VECTORS = 8


def scheduler() -> HeunDiscreteScheduler:
    """The scheduler of the real repositories."""
    return HeunDiscreteScheduler(
        beta_schedule="exp",
        num_train_timesteps=1024,
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
        clip_sample_range=1.0,
    )


def shap_e_pipeline(seed: int = 0) -> ShapEPipeline:
    """A random text-to-3D pipeline."""
    torch.manual_seed(seed)
    words = tokenizer()
    pipeline = ShapEPipeline(
        prior=_prior(embedding_proj_dim=32),
        text_encoder=text_encoder(words, CLIPTextModelWithProjection),
        tokenizer=words,
        scheduler=scheduler(),
        shap_e_renderer=_renderer(),
    )
    return _with_surfaces(pipeline)


def shap_e_img2img_pipeline(seed: int = 0) -> ShapEImg2ImgPipeline:
    """A random image-to-3D pipeline."""
    torch.manual_seed(seed)
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=224,
            patch_size=56,
            projection_dim=32,
        )
    )
    pipeline = ShapEImg2ImgPipeline(
        prior=_prior(embedding_proj_dim=32, embedding_proj_norm_type="layer"),
        image_encoder=encoder.eval(),
        image_processor=CLIPImageProcessor(),
        scheduler=scheduler(),
        shap_e_renderer=_renderer(),
    )
    return _with_surfaces(pipeline)


def _prior(**config: Any) -> PriorTransformer:
    """The real prior's config but for the sizes: one latent vector a row of the renderer's matrices."""
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=4 * VECTORS,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        time_embed_dim=32,
        clip_embed_dim=2 * WIDTH,
        **config,
    )
    torch.nn.init.normal_(prior.positional_embedding, std=0.1)
    return prior.eval()


def _renderer() -> ShapERenderer:
    """A random renderer of smooth objects: of a place it sees the two lowest frequencies only."""
    renderer = ShapERenderer(
        param_shapes=((VECTORS, 93), (VECTORS, VECTORS), (VECTORS, VECTORS), (VECTORS, VECTORS)),
        d_latent=WIDTH,
        d_hidden=VECTORS,
        n_output=12,
    )
    # Three numbers of the place itself, then fifteen frequencies of each, sines before cosines.
    seen = torch.zeros(93)
    seen[[*range(9), *range(48, 54)]] = 1
    first = renderer.params_proj.projections["nerstf__mlp__0__weight"]
    with torch.no_grad():
        first.norm.weight *= seen
        first.proj.bias *= seen.repeat(VECTORS)
    return renderer.eval()


def _with_surfaces(pipeline: Any) -> Any:
    """Shift the distances so that about half of the box is inside of an object, by an object of noise."""
    pipeline.set_progress_bar_config(disable=True)
    renderer = pipeline.shap_e_renderer
    network, places = renderer.mlp, volume_query_points(renderer.volume, 8)[None]
    with torch.no_grad():
        weights = renderer.params_proj(torch.randn(1, 4 * VECTORS, WIDTH).clamp(-1, 1))
        network.load_state_dict(
            {name.removeprefix("nerstf."): weight[0] for name, weight in weights.items()}, strict=False
        )
        answer = network(position=places, direction=None, ts=None, rendering_mode="stf")
        network.mlp[-1].bias[0] -= answer.signed_distance.atanh().median()
    return pipeline


def fill_tables(decoder: MeshDecoder) -> None:
    """Give the stock decoder the tables of marching cubes, which the real weights bring as buffers.

    Corner x, y, z of a cell is bit x + 2y + 4z of a case; edges are numbered along x, then y, then z.
    """
    marching_cubes: Any = measure.marching_cubes
    corners = np.array([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)])
    first = {0: (0, 2, 4, 6), 1: (0, 1, 4, 5), 2: (0, 1, 2, 3)}
    middles = np.array([corners[at] + np.eye(3)[axis] / 2 for axis in range(3) for at in first[axis]])
    for case in range(1, 255):
        field = np.full((2, 2, 2), -1.0)
        for bit, corner in enumerate(corners):
            if case >> bit & 1:
                field[tuple(corner)] = 1.0
        vertices, faces, _, _ = marching_cubes(field, 0.0, method="lorensen", gradient_direction="ascent")
        edges = np.abs(vertices[faces][:, :, None] - middles).sum(axis=3).argmin(axis=2)
        decoder.cases[case, : len(edges)] = torch.from_numpy(edges)
        decoder.masks[case, : len(edges)] = True
