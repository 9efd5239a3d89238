"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Modules that are no tests are imported by their names: pipelines, server.
sys.path.insert(0, str(Path(__file__).parent))

from server import Server, serving

# The pipelines here are so small that a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The whole box on the embedded models, as `scripts/serve` starts it."""
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server
