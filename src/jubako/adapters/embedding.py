"""Embeddings of textual inversion (https://arxiv.org/abs/2208.01618): vectors that stand for a new word.

A prompt with some is encoded by a view of the pipeline: its tokenizers are copies that know words for the
vectors, and while it is in use a text encoder's table gives the vectors for them, on one thread.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from jubako.adapters.store import SDXL_KEYS
from jubako.errors import InvalidRequest, UnusableWeights
from jubako.planning.embeddings import TAG
from jubako.weights.checkpoint import tensors

__all__ = ["MAX_VECTORS", "Embedding", "read_embedding", "spoken"]

MAX_VECTORS = 75
"""What a prompt of CLIP has room for."""

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True, eq=False)
class Embedding:
    """One embedding on a device: for each text encoder of a pipeline as many vectors, [n, width]."""

    name: str
    vectors: Mapping[str, torch.Tensor]

    @property
    def count(self) -> int:
        """How many vectors, which are tokens of a prompt."""
        return len(next(iter(self.vectors.values())))

    @property
    def bytes(self) -> int:
        """Memory of its vectors."""
        return sum(vectors.nbytes for vectors in self.vectors.values())


def read_embedding(name: str, file: Path, pipeline: Any, model: str) -> Embedding:
    """An embedding for a pipeline, on its device and in its text encoders' precision.

    InvalidRequest when it was made for another model, is torn, or has numbers that are none.
    """
    tables = {each: encoder.get_input_embeddings().weight for each, encoder in _encoders(pipeline).items()}
    try:
        headers = tensors(file)
        if ("text_encoder_2" in tables) != (len(headers) == len(SDXL_KEYS)):
            raise _refused(name, model, "it was made for another number of text encoders")
        own = zip(_TEXT_ENCODERS, SDXL_KEYS if len(headers) > 1 else headers, strict=False)
        keys = {each: key for each, key in own if each in tables}
        for each, key in keys.items():
            if problem := _misfit(headers[key].shape, tables[each].shape[1]):
                raise _refused(name, model, problem)
        with safe_open(file, framework="pt") as content:
            found = {each: _placed(content.get_tensor(key), tables[each]) for each, key in keys.items()}
    except (UnusableWeights, SafetensorError, OSError) as error:
        raise _refused(name, model, "its file is torn") from error
    if len({len(vectors) for vectors in found.values()}) > 1:
        raise _refused(name, model, "it has more vectors for one text encoder than for the other")
    if not all(vectors.isfinite().all() for vectors in found.values()):
        raise _refused(name, model, "it has numbers that are not finite")
    return Embedding(name, found)


@contextmanager
def spoken(pipeline: Any, text: str, embeddings: Mapping[str, Embedding]) -> Iterator[tuple[Any, str]]:
    """The view of the pipeline, and the text with words for tags, that give the vectors within.

    What others do with the pipeline meanwhile, on other threads, stays as it is.
    """
    # Nobody can have written these in a prompt.
    mark = secrets.token_hex(8)
    words = {
        name: [f"<|{mark}:{place}:{number}|>" for number in range(embedding.count)]
        for place, (name, embedding) in enumerate(embeddings.items())
    }
    every = [word for several in words.values() for word in several]
    view = copy.copy(pipeline)
    with ExitStack() as stack:
        for each, encoder in _encoders(pipeline).items():
            which = each.replace("text_encoder", "tokenizer")
            tokenizer = _extended(pipeline.components[which], every)
            setattr(view, which, tokenizer)
            vectors = torch.cat([embedding.vectors[each] for embedding in embeddings.values()])
            first = tokenizer.convert_tokens_to_ids(every[0])
            stack.enter_context(_given(encoder.get_input_embeddings(), first, vectors))
        yield view, TAG.sub(lambda tag: "".join(words.get(tag[1], tag[0])), text)


def _encoders(pipeline: Any) -> dict[str, Any]:
    found = {each: pipeline.components.get(each) for each in _TEXT_ENCODERS}
    return {each: encoder for each, encoder in found.items() if encoder is not None}


def _misfit(shape: Sequence[int], width: int) -> str | None:
    """What is wrong with a tensor of vectors, [n, width] or [width]."""
    *several, wide = shape
    if wide != width:
        return f"its vectors are {wide} wide, not {width}"
    if several and not 0 < several[0] <= MAX_VECTORS:
        return f"it has {several[0]} vectors, and a prompt has room for 1 to {MAX_VECTORS}"
    return None


def _placed(vectors: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return vectors.reshape(-1, vectors.shape[-1]).to(table.device, table.dtype)


def _refused(name: str, model: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"embeddings: {name} does not fit {model}: {reason}", param="embeddings")


def _extended(tokenizer: Any, words: Sequence[str]) -> Any:
    """A tokenizer that knows more words. The vocabulary is shared: a copy of CLIP's takes a second."""
    old = tokenizer._tokenizer  # noqa: SLF001 # the only way to what it is made of
    new = Tokenizer(old.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(new, part, getattr(old, part))
    for _, token in sorted(old.get_added_tokens_decoder().items()):
        (new.add_special_tokens if token.special else new.add_tokens)([token])
    extended = copy.copy(tokenizer)
    extended._tokenizer = new  # noqa: SLF001 # as above
    extended.add_tokens(list(words))
    return extended


@contextmanager
def _given(table: torch.nn.Embedding, first: int, vectors: torch.Tensor) -> Iterator[None]:
    """Have a text encoder's table give [n, width] vectors for the numbers from ``first`` on."""
    thread = get_ident()
    asked: list[torch.Tensor] = []

    def known(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if get_ident() != thread:
            return None
        asked.append(inputs[0])
        return (inputs[0].clamp(max=first - 1),)

    def put(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        if get_ident() != thread:
            return None
        numbers = asked.pop() - first
        output[numbers >= 0] = vectors[numbers[numbers >= 0]]
        return output

    hooks = [table.register_forward_pre_hook(known), table.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
