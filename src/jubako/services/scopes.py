"""Which scope a request takes, by its method and path. What stands in no row here is the admin's alone."""

from __future__ import annotations

import re

from jubako.keys import SCOPES, Scope

__all__ = ["is_probe", "needed"]

_ANY: frozenset[Scope] = frozenset(SCOPES)
_GENERATE: frozenset[Scope] = frozenset({"generate"})
_JOBS: frozenset[Scope] = frozenset({"jobs"})
_TRAIN: frozenset[Scope] = frozenset({"train"})
_ADAPTERS: frozenset[Scope] = frozenset({"adapters"})

# The first row that fits counts. A path that ends in /* stands for itself and all below.
_ROWS: tuple[tuple[frozenset[str], str, frozenset[Scope]], ...] = (
    *(
        (frozenset({"POST"}), f"/{task}", _GENERATE)
        for task in ("txt2img", "img2img", "inpaint", "img2vid", "txt2vid", "img2mesh", "txt2mesh")
    ),
    (frozenset({"POST"}), "/v1/images/*", _GENERATE),
    (frozenset({"POST"}), "/v1/videos/sync", _GENERATE),
    (frozenset({"GET", "POST", "DELETE"}), "/v1/videos/*", _JOBS),
    (frozenset({"GET", "POST", "DELETE"}), "/v1/jobs/*", _JOBS),
    (frozenset({"GET", "POST"}), "/v1/fine_tuning/jobs/*", _TRAIN),
    (frozenset({"GET"}), "/v1/adapters/*", _GENERATE | _JOBS | _ADAPTERS),
    (frozenset({"POST", "PUT", "PATCH", "DELETE"}), "/v1/adapters/*", _ADAPTERS),
    (frozenset({"GET"}), "/v1/models/*", _ANY),
    (frozenset({"POST"}), "/models", _ANY),
    # BentoML's client reads it before its first call.
    (frozenset({"GET"}), "/schema.json", _ANY),
    (frozenset({"GET"}), "/openapi.json", _ANY),
)

_PROBES = {"/livez", "/readyz", "/healthz"}
# What routers and file servers may take for another path (//, /../, ;x, a slash at the end) has no row.
_PLAIN = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")


def is_probe(method: str, path: str) -> bool:
    """Whether it only asks if the server lives or is ready, as orchestrators do without a key."""
    return method in {"GET", "HEAD"} and path in _PROBES


def needed(method: str, path: str) -> frozenset[Scope]:
    """The scopes of which one is enough; none for what takes ``admin``, which is always enough."""
    if _PLAIN.fullmatch(path):
        asked = "GET" if method == "HEAD" else method
        for methods, pattern, scopes in _ROWS:
            if asked in methods and _covers(pattern, path):
                return scopes
    return frozenset()


def _covers(pattern: str, path: str) -> bool:
    below = pattern.removesuffix("/*")
    return path == below or (below != pattern and path.startswith(f"{below}/"))
