"""A CLIP tokenizer of its own: every word of the world is one token, any other text falls back to bytes."""

from __future__ import annotations

from transformers import CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jubako.miniatures.world import COLOURS, PLACES, SHAPES, SIZES

LENGTH = 77
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark of a word's start
_GLUE = (
    "a",
    "an",
    "the",
    "of",
    "on",
    "in",
    "and",
    "with",
    "background",
    "above",
    "below",
    "centre",
    "middle",
)
_DECORATION = (
    "photo",
    "picture",
    "image",
    "drawing",
    "painting",
    "simple",
    "flat",
    "clean",
    "shape",
    "object",
)
WORDS = tuple(dict.fromkeys((*COLOURS, *SHAPES, *SIZES, *PLACES, *_GLUE, *_DECORATION)))


def new_tokenizer(length: int = LENGTH) -> CLIPTokenizer:
    """Merges of an early word can cut a later one in two; such words move to the front until none is cut."""
    order = sorted(WORDS, key=len, reverse=True)
    for _ in WORDS:
        tokenizer = _tokenizer(order, length)
        cut = [word for word in order if len(tokenizer.tokenize(word)) != 1]
        if not cut:
            return tokenizer
        order = cut + [word for word in order if word not in cut]
    raise ValueError(f"these words cannot all be single tokens: {cut}")


def new_t5_tokenizer(length: int) -> T5Tokenizer:
    """The same words as whole pieces, single letters for the rest; without sentinels."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (_SPACE, -2.0)]
    words = [(_SPACE + word, -4.0) for word in WORDS]
    letters = [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=length)


def _tokenizer(words: list[str], length: int) -> CLIPTokenizer:
    alphabet = list(bytes_to_unicode().values())
    merges = _merges(words)
    pieces = ["".join(pair) for pair in merges]
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *pieces,
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Each word grows letter by letter from its start."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        grown = letters[0]
        for letter in letters[1:]:
            merges[(grown, letter)] = None
            grown += letter
    return list(merges)
