"""Adapters of a picture: from the request's list, and from tags in its prompt as other programs have them."""

from __future__ import annotations

import re

from jubako.catalog import Model
from jubako.errors import InvalidRequest
from jubako.job import LoraUse
from jubako.request import ADAPTER_NAME, Lora

__all__ = ["MAX_LORAS", "loras_of"]

MAX_LORAS = 8
MAX_WEIGHT = 4.0

_TAG = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?>")


def loras_of(prompt: str, listed: tuple[Lora, ...], model: Model) -> tuple[str, tuple[LoraUse, ...]]:
    """The prompt without tags, and the adapters of list and tags; one named twice has both weights."""
    weights = {lora.name: 0.0 for lora in listed}
    for lora in listed:
        weights[lora.name] += lora.weight
    for name, weight in _TAG.findall(prompt):
        weights[_legal_name(name)] = weights.get(name, 0.0) + _legal_weight(weight)
    if len(weights) > MAX_LORAS:
        raise InvalidRequest(f"loras: {len(weights)} are past the limit of {MAX_LORAS}", param="loras")
    if weights and "txt2img" not in model.tasks and "img2img" not in model.tasks:
        raise InvalidRequest(f"loras: {model.name} takes no adapters", param="loras")
    left = re.sub(r"\s{2,}", " ", _TAG.sub("", prompt)).strip() if weights else prompt
    return left, tuple(LoraUse(name=name, weight=weight) for name, weight in weights.items())


def _legal_name(name: str) -> str:
    if not re.fullmatch(ADAPTER_NAME, name):
        raise InvalidRequest(f"prompt: {name!r} in <lora:…> is no name of an adapter", param="prompt")
    return name


def _legal_weight(text: str) -> float:
    try:
        weight = float(text or 1)
    except ValueError:
        weight = float("nan")
    if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
        raise InvalidRequest(
            f"prompt: {text!r} in <lora:…> is no weight from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}",
            param="prompt",
        )
    return weight
