"""Why a pull failed, in plain words that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from jubako.disk import is_full
from jubako.weights.layout import INDEX, PullFailed

__all__ = ["explained"]

TOKENS = "https://huggingface.co/settings/tokens"


@contextmanager
def explained(repo: str, revision: str = "main", moved_from: tuple[str, ...] = ()) -> Iterator[None]:
    """Turn what the hub, the network or the disk answers inside the block into PullFailed."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise PullFailed(f"the {INDEX} of {repo} is not JSON: {error}") from error
    except (HTTPError, HFValidationError, OSError) as error:
        raise PullFailed(_reason(error, repo, revision, moved_from)) from error


def _reason(error: Exception, repo: str, revision: str, moved_from: tuple[str, ...]) -> str:
    causes = [error, *filter(None, (error.__cause__, error.__context__))]
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is not None:
        return _refusal(answer.response, repo, revision, moved_from)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set, so nothing is fetched; unset it to pull"
    if any(isinstance(cause, HTTPError) for cause in causes):
        return (
            f"no answer from {constants.ENDPOINT}: {causes[-1]}. Is the network there? A proxy is set with "
            "HTTPS_PROXY, a mirror with HF_ENDPOINT"
        )
    if is_full(error):
        return (
            f"the disk of {constants.HF_HUB_CACHE} is full; what has come is kept: make room and run the "
            "same command again, or set HF_HOME to another disk"
        )
    return f"{type(error).__name__}: {error}"


_REFUSALS = {
    "no revision": "{repo} has no revision {revision!r}",
    "bad token": "the hub does not accept your token; make a new one at {tokens} and set HF_TOKEN to it",
    "gated, no token": (
        "{repo} is only for those who accepted its terms. Open {page} and accept them, make a token at "
        "{tokens}, set HF_TOKEN to it, then run the same command again"
    ),
    "gated": (
        "your account has not been let in to {repo}. Open {page} and accept the terms (some wait for "
        "approval). A fine-grained token also needs read access to gated repositories: {tokens}"
    ),
    "no repository": (
        "the hub has no {repo} for you ({status}): it is private, was removed, or has moved{former}. Look "
        "for it at https://huggingface.co/models and set its new name in your own catalog (JUBAKO_CATALOG); "
        "if it is private, make a token at {tokens} and set HF_TOKEN to it"
    ),
    "forbidden": "your token may not read {repo}; see {page} and the token's permissions at {tokens}",
    "too many": "the hub has had too many requests from here; wait some minutes, then run this again",
    "trouble": "the hub has a problem of its own ({status}); run the same command again later",
}


def _refusal(response: Any, repo: str, revision: str, moved_from: tuple[str, ...]) -> str:
    """What an error status of the hub means for the one who pulls, and what to do."""
    moved = ", ".join(moved_from)
    return _REFUSALS[_kind(response)].format(
        repo=repo,
        revision=revision,
        page=f"https://huggingface.co/{repo}",
        tokens=TOKENS,
        status=response.status_code,
        former=f" again; its earlier names: {moved}" if moved else "",
    )


def _kind(response: Any) -> str:
    status, code = response.status_code, response.headers.get("X-Error-Code")
    refused_token = "credentials" in response.headers.get("X-Error-Message", "")
    kinds = {
        "no revision": code == "RevisionNotFound",
        "bad token": refused_token or (code == "GatedRepo" and status == 401 and get_token()),
        "gated, no token": code == "GatedRepo" and status == 401,
        "gated": code == "GatedRepo",
        # To those without a token the hub answers 401 for what does not exist, too.
        "no repository": code == "RepoNotFound" or status in {401, 404},
        "forbidden": status == 403,
        "too many": status == 429,
    }
    return next((kind for kind, holds in kinds.items() if holds), "trouble")
