"""The files of deploy/ as values, and what Jubako's settings make of a container's environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from server import ROOT

from jubako.metrics import MEASURES
from jubako.settings import PREFIX, Settings, load_settings

__all__ = ["DEPLOY", "NOT_OURS", "SAMPLES", "load", "series", "settings_of"]

DEPLOY = ROOT / "deploy"

# What containers of ours are given for others: BentoML, the hub's client, OpenMP.
NOT_OURS = {
    *("BENTOML_DO_NOT_TRACK", "BENTOML_HOME", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "HOME"),
    *("MODELS", "OMP_NUM_THREADS"),
}
# In place of what comes from secrets.
SAMPLES = {
    "JUBAKO_FAMILY_KEY": "0123456789abcdef",
    "JUBAKO_DATABASE_URL": "postgresql://jubako:secret@jubako-postgresql/jubako",
    "JUBAKO_API_KEYS": "ops 0123456789abcdef admin",
}


def load(path: str) -> Any:
    """A YAML file of deploy/."""
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def settings_of(environ: Mapping[str, str], folder: Path) -> Settings:
    """The settings of a process with these variables, all known ones; ``folder`` takes a file of keys."""
    unknown = {name for name in environ if name.removeprefix(PREFIX).lower() not in Settings.model_fields}
    assert unknown <= NOT_OURS
    keys = folder / "api-keys"
    keys.write_text("ops 0123456789abcdef admin\n", encoding="utf-8")
    own = {"JUBAKO_API_KEYS_FILE": str(keys)} if "JUBAKO_API_KEYS_FILE" in environ else {}
    return load_settings({**environ, **own})


def series() -> set[str]:
    """Every name that Prometheus has of our measures."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_sum", "_count", "_bucket")}
    return {f"jubako_{measure.name}{suffix}" for measure in MEASURES for suffix in suffixes[measure.kind]}
