"""Embeddings of a picture: from the request's list, and from tags where they stand in its prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jubako.catalog import Model
from jubako.errors import InvalidRequest
from jubako.job import EmbeddingUse, Job
from jubako.request import ADAPTER_NAME

__all__ = ["MAX_EMBEDDINGS", "TAG", "embeddings_of", "says", "tagged"]

MAX_EMBEDDINGS = 8

TAG = re.compile(r"<embedding:([^<>]*)>")
_ANY_TAG = r"<\w+:[^<>]*>"


def embeddings_of(
    prompt: str, negative_prompt: str, listed: tuple[str, ...], model: Model
) -> tuple[EmbeddingUse, ...]:
    """The embeddings of list and tags, each once."""
    names = dict.fromkeys(listed)
    for field, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        for name in TAG.findall(text):
            if not re.fullmatch(ADAPTER_NAME, name):
                raise InvalidRequest(
                    f"{field}: {name!r} in <embedding:…> is no name of an embedding", param=field
                )
            names[name] = None
    if len(names) > MAX_EMBEDDINGS:
        raise InvalidRequest(
            f"embeddings: {len(names)} are past the limit of {MAX_EMBEDDINGS}", param="embeddings"
        )
    if names and not model.takes_embeddings:
        raise InvalidRequest(
            f"embeddings: {model.name} takes none, only models of the families sd and sdxl do",
            param="embeddings",
        )
    return tuple(EmbeddingUse(name=name) for name in names)


def says(text: str, word: str) -> bool:
    """Whether it is a whole word of the text, in upper or lower case; what is in tags is none."""
    return bool(re.search(_whole(word), re.sub(_ANY_TAG, " ", text), re.IGNORECASE))


def tagged(job: Job, words: Mapping[str, str]) -> Job:
    """The job with tags in place of the words of its embeddings, which are given by name.

    One that has a tag somewhere stands there only, several of one word stand side by side; InvalidRequest
    when one stands nowhere.
    """
    prompts = {"prompt": job.prompt, "negative_prompt": job.negative_prompt}
    there = {name for text in prompts.values() for name in TAG.findall(text)}
    tags: dict[str, str] = {}
    for name, word in words.items():
        if name not in there:
            tags[word.lower()] = f"{tags.get(word.lower(), '')}<embedding:{name}>"
    longest = sorted(tags, key=len, reverse=True)
    wanted = re.compile("|".join([_ANY_TAG, *map(_whole, longest)]), re.IGNORECASE)
    prompts = {
        field: wanted.sub(lambda found: tags.get(found[0].lower(), found[0]), text)
        for field, text in prompts.items()
    }
    for name, word in words.items():
        if not any(f"<embedding:{name}>" in text for text in prompts.values()):
            raise InvalidRequest(
                f"embeddings: {word!r}, the word of {name}, is in neither prompt; write it, or "
                f"<embedding:{name}>, where it is to stand",
                param="embeddings",
            )
    return job.model_copy(update=prompts)


def _whole(word: str) -> str:
    return rf"(?<![\w-]){re.escape(word)}(?![\w-])"
