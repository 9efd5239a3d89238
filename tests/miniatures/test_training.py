"""The parts of the training that need no trained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jubako.miniatures.autoencoder import encode_all, new_autoencoder, reconstruct, standardize, widened
from jubako.miniatures.dataset import draw
from jubako.miniatures.text import SlotHeads, new_text_encoder, pretrain, slots, spoken, tokens
from jubako.miniatures.tokenizer import LENGTH, new_tokenizer
from jubako.miniatures.training import (
    Average,
    Budget,
    Group,
    fit,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
)
from jubako.miniatures.world import arrange, parse, random_scene


def test_budget_is_either_steps_or_minutes() -> None:
    assert Budget(steps=10).progress(5) == 0.5
    assert Budget(minutes=1, spent_s=30).progress(0) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="either"):
        Budget()


def test_clock_starts_with_the_stage_and_not_before() -> None:
    assert Budget(minutes=1e-9).elapsed_s() < 0.01


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert learning_rate(1.0, 0, 0.0, warmup_steps=100) == pytest.approx(0.01)
    assert learning_rate(1.0, 100, 0.0, warmup_steps=100) == 1.0
    assert learning_rate(1.0, 1000, 1.0) == 0.0


def test_average_follows_the_weights() -> None:
    module = torch.nn.Linear(2, 2)
    average = Average(module)
    with torch.no_grad():
        module.weight += 1
    before = average.values["weight"].clone()
    average.update(module, step=0)
    assert torch.allclose(average.values["weight"], before + 0.9)


def test_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none.pt") is None
    save_checkpoint(tmp_path / "deep" / "state.pt", {"step": 3, "model": {"weight": torch.ones(2)}})
    state = load_checkpoint(tmp_path / "deep" / "state.pt")
    assert state is not None
    assert state["step"] == 3
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state.pt"]


def line(steps: int, checkpoint: Path) -> torch.nn.Linear:
    """Two numbers in, the second out, learned in so many steps."""
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 1)

    def losses(step: int, _progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        seen = torch.randn(32, 2, generator=torch.Generator().manual_seed(step))
        loss = (module(seen) - seen[:, 1:]).square().mean()
        return loss, {"squares": loss.item()}

    weight, bias = module.parameters()
    groups = [Group([weight], 0.02, orthogonal=True), Group([bias], 0.02)]
    fit(module, groups, losses, title="line", budget=Budget(steps=steps), checkpoint=checkpoint)
    return module


def test_fitting_finds_the_weights_and_leaves_their_average(tmp_path: Path) -> None:
    weight = line(600, tmp_path / "line.pt").weight
    assert weight.flatten().tolist() == pytest.approx([0.0, 1.0], abs=0.1)


def test_finished_training_is_taken_up_and_not_repeated(tmp_path: Path) -> None:
    once = line(20, tmp_path / "line.pt").weight
    again = line(20, tmp_path / "line.pt").weight
    assert torch.equal(once, again)


def test_drawing_depends_on_the_seed_only() -> None:
    one, same, other = draw(8, 1), draw(8, 1), draw(8, 2)
    assert one.scenes == same.scenes
    assert (one.pixels == same.pixels).all()
    assert one.scenes != other.scenes


def test_standardizing_changes_latents_but_not_pictures() -> None:
    torch.manual_seed(0)
    model, data = new_autoencoder().eval(), draw(16, 1)
    before = reconstruct(model, data)
    standardize(model, data)
    assert np.abs(before.astype(int) - reconstruct(model, data)).max() <= 3
    scaled = encode_all(model, data).float() * model.config.scaling_factor
    assert scaled.mean((0, 2, 3)).abs().max() < 0.05
    assert scaled.std((0, 2, 3)).tolist() == pytest.approx([1.0] * 4, abs=0.05)


def test_widened_autoencoder_draws_the_same_with_more_channels() -> None:
    torch.manual_seed(0)
    model, data = new_autoencoder().eval(), draw(16, 1)
    torch.nn.init.zeros_(model.post_quant_conv.bias)  # at the border, zero padding would cut it off
    wide = widened(model, 16).eval()
    assert wide.quant_conv is None
    assert wide.post_quant_conv is None
    assert encode_all(wide, data).shape == (16, 16, 16, 16)
    before, after = reconstruct(model, data), reconstruct(wide, data)
    assert np.abs(before.astype(int) - after).max() <= 1


def test_slots_say_what_stands_where() -> None:
    scene = parse("a small red star left of a large blue ring on a white background")
    found = slots((arrange(scene, np.random.default_rng(0)),))
    assert found.shape.tolist() == [[4, 5, 0, 0, 0]]
    assert found.colour.tolist() == [[1, 3, 0, 0, 0]]
    assert found.size.tolist() == [[1, 2, 0, 0, 0]]
    assert found.background.tolist() == [6]


def test_captions_are_fed_at_full_length_and_mostly_in_the_grammar() -> None:
    rng = np.random.default_rng(0)
    captions = [spoken(random_scene(rng, 1 + i % 2), rng) for i in range(200)]
    assert tokens(new_tokenizer(), captions).shape == (200, LENGTH)
    plain = 0
    for caption in captions:
        try:
            parse(caption)
        except ValueError:
            continue
        plain += 1
    assert plain > 160


def test_text_encoder_learns_from_its_first_steps() -> None:
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    encoder, heads = new_text_encoder(tokenizer), SlotHeads()
    record = pretrain(encoder, heads, tokenizer, Budget(steps=2), seed=0)
    assert record.steps == 2
    # Guessing evenly costs ln 6 + ln 9 + ln 3 + ln 8 = 7.2.
    assert 0 < record.losses["slots"] < 8.5
