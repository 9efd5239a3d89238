"""The family of the embedded model, which says in its log when it has run a durable job to its end."""

from __future__ import annotations

import logging
import os

from jubako.services import family_service

os.environ.setdefault("BENTOML_DISABLE_GPU_ALLOCATION", "1")

runner = logging.getLogger("jubako.runner")
runner.setLevel(logging.INFO)
runner.propagate = False
runner.addHandler(logging.StreamHandler())

SD = family_service("sd")
