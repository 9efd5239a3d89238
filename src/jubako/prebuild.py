"""Loads a model once, so that all engines of its graphs are built: ``python -m jubako.prebuild MODEL``."""

from __future__ import annotations

import argparse
import logging
import sys

import torch

from jubako.catalog import load_catalog
from jubako.errors import JubakoError
from jubako.hardware import machine, require_device
from jubako.loader import FamilyLoader
from jubako.probe import own_signals
from jubako.settings import SettingsError, load_settings

__all__ = ["main"]


def main() -> int:
    """Load the model that the arguments name, from the weights that a server would; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jubako.prebuild", description=__doc__)
    parser.add_argument("model")
    name = parser.parse_args().model
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = load_settings()
    catalog = load_catalog(settings.catalog)
    model = catalog.model(name)
    try:
        here = machine(own_signals())
        device = torch.device(require_device(here, settings.device))
        loader = FamilyLoader(catalog.families[model.family], settings, device, here)
        loader.load(name, lambda _: None)
    except (JubakoError, SettingsError) as error:
        print(f"jubako: {error}", file=sys.stderr)
        return 1
    choice = loader.choices[name]
    if not {"TensorrtExecutionProvider", "MIGraphXExecutionProvider"} & set(choice.providers):
        print(f"{name} is served from {choice.vendor} weights here, which need no engines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
