"""Whether there is room for a training: estimates for invented devices, and what is free on this one."""

from __future__ import annotations

import pytest
import torch

from jubako.catalog import load_catalog
from jubako.training.room import free_bytes, lack_of_room

CATALOG = load_catalog()


@pytest.mark.parametrize(
    ("model", "device", "gigabytes", "fits"),
    [
        ("tiny-sd", "cpu", 0.5, True),
        ("tiny-sd", "cpu", 0.3, False),
        ("sd1.5", "cuda", 8, True),
        ("sd1.5", "cuda", 2, False),
        ("sdxl", "cuda", 12, True),
        ("sdxl", "cuda", 6, False),
        ("sd3.5-large", "cuda", 24, False),
    ],
)
def test_a_training_takes_the_weights_and_half_as_much_again(
    model: str, device: str, gigabytes: float, fits: bool
) -> None:
    lack = lack_of_room(CATALOG.model(model), torch.device(device), int(gigabytes * 1e9))
    assert (lack is None) == fits
    if lack is not None:
        assert model in lack
        assert f"{gigabytes:.1f} GB free" in lack


def test_what_is_free_here_is_less_than_there_is() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < 2**50
    assert lack_of_room(CATALOG.model("tiny-sd"), torch.device("cpu")) is None
