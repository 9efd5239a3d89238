"""The text encoder: a three-layer CLIP text model, taught to bind attributes before any picture is drawn.

Cross-attention copies from tokens to places, so binding is easy when some token says "on the left there is a
small red star". The padding after a caption is free room for that: its token at position p is taught to
describe slot p mod 5 (left, right, top, bottom, center) through heads that are thrown away after training.
Without them, which shape wears which colour is the last thing that the denoiser learns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Tokenizer,
)

from jubako.miniatures.tokenizer import LENGTH
from jubako.miniatures.training import Budget, Progress, Record, learning_rate
from jubako.miniatures.world import (
    COLOURS,
    LARGE_RADIUS_OF_TWO,
    PLACES,
    SHAPES,
    SMALL_RADIUS,
    Layout,
    Scene,
    arrange,
    random_scene,
    thinned,
)

WIDTH = 128
SECOND_WIDTH = 64
PRETRAINING_BATCH = 96
PRETRAINING_LEARNING_RATE = 1.5e-3
_SLOTS = tuple(PLACES)
_PREFIXES = (
    "a photo of ",
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "a painting of ",
    "a simple picture of ",
)
_SUFFIXES = (" .", " , flat", " , clean", ", simple , flat , clean")


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(_config(tokenizer, WIDTH, layers=3))


def spoken(scene: Scene, rng: np.random.Generator) -> str:
    """A scene in the words of a user: mostly the grammar's, sometimes fewer, seldom decorated."""
    chance = rng.random()
    if chance < 0.13:
        scene = thinned(scene, rng)
    caption = scene.caption()
    if rng.random() < 0.3:
        caption = caption.replace("a orange", "an orange")
    if 0.10 < chance < 0.16:
        caption = _PREFIXES[int(rng.integers(len(_PREFIXES)))] + caption
    if 0.12 < chance < 0.18:
        caption += _SUFFIXES[int(rng.integers(len(_SUFFIXES)))]
    return caption


def tokens(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int = LENGTH) -> torch.Tensor:
    """Token numbers as the pipelines feed them, B x length."""
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return torch.tensor(ids)


def second_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The smaller second encoder of SDXL and SD3; its pooled output sums up the caption."""
    return CLIPTextModelWithProjection(_config(tokenizer, SECOND_WIDTH, layers=2))


def deepened(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, *, projected: bool) -> CLIPTextModel:
    """The same encoder for the pipelines that read the last state but one: one more layer, new, at the end.

    Positions beyond the tokenizer's length are cut off. `projected` gives the class with a pooled projection.
    """
    layers = encoder.config.num_hidden_layers + 1
    config = _config(tokenizer, encoder.config.hidden_size, layers)
    deep = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    values = encoder.state_dict()
    position = "embeddings.position_embedding.weight"
    values[position] = values[position][: config.max_position_embeddings]
    (deep.text_model if projected else deep).load_state_dict(values, strict=False)
    return deep


def _config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass(frozen=True)
class Slots:
    """What stands where: B x 5 classes each (0 is nothing), and B background colours."""

    shape: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    background: torch.Tensor

    def rows(self, rows: torch.Tensor) -> Slots:
        return Slots(self.shape[rows], self.colour[rows], self.size[rows], self.background[rows])


def slots(layouts: tuple[Layout, ...]) -> Slots:
    classes = np.zeros((3, len(layouts), len(_SLOTS)), np.int64)
    for i, layout in enumerate(layouts):
        for placed in layout.objects:
            offsets = [(x - placed.x) ** 2 + (y - placed.y) ** 2 for x, y in PLACES.values()]
            large = placed.radius > (SMALL_RADIUS + LARGE_RADIUS_OF_TWO) / 2
            kinds = SHAPES.index(placed.shape), tuple(COLOURS).index(placed.colour), int(large)
            classes[:, i, int(np.argmin(offsets))] = np.add(kinds, 1)
    backgrounds = [tuple(COLOURS).index(layout.background) for layout in layouts]
    shape, colour, size = torch.from_numpy(classes)
    return Slots(shape, colour, size, torch.tensor(backgrounds))


class SlotHeads(nn.Module):
    """Reads the scene off the tokens behind a caption; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = nn.Linear(WIDTH, len(SHAPES) + 1)
        self.colour = nn.Linear(WIDTH, len(COLOURS) + 1)
        self.size = nn.Linear(WIDTH, 3)
        self.background = nn.Linear(WIDTH, len(COLOURS))

    def loss(self, hidden: torch.Tensor, ids: torch.Tensor, end: int, target: Slots) -> torch.Tensor:
        """Cross-entropy over the tokens from the end of the caption on; hidden is B x 77 x WIDTH."""
        row, position = torch.nonzero(ids == end, as_tuple=True)
        picked, slot = hidden[row, position], position % len(_SLOTS)
        return (
            functional.cross_entropy(self.shape(picked), target.shape[row, slot])
            + functional.cross_entropy(self.colour(picked), target.colour[row, slot])
            + functional.cross_entropy(self.size(picked), target.size[row, slot])
            + functional.cross_entropy(self.background(picked), target.background[row])
        )


def pretrain(
    encoder: CLIPTextModel, heads: SlotHeads, tokenizer: CLIPTokenizer, budget: Budget, seed: int
) -> Record:
    """Teach the encoder to describe scenes by slot, from captions alone, drawn afresh at every step."""
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    progress = Progress("text encoder", budget, every=50)
    end = int(tokenizer.eos_token_id)
    step = 0
    while budget.progress(step) < 1:
        rng = np.random.default_rng((seed, 1, step))
        scenes = [random_scene(rng, 1 if rng.random() < 0.3 else 2) for _ in range(PRETRAINING_BATCH)]
        layouts = tuple(arrange(scene, rng) for scene in scenes)
        ids = tokens(tokenizer, [spoken(scene, rng) for scene in scenes])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                PRETRAINING_LEARNING_RATE, step, 0.9 * budget.progress(step), warmup_steps=50
            )
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            hidden = encoder(ids).last_hidden_state
        loss = heads.loss(hidden.float(), ids, end, slots(layouts))
        optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.MATH):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        progress.report(step, (("slots", loss.item()),))
    return progress.record(step)
