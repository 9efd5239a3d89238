"""A deployment of the real gateway and the real family service over a model that only sleeps.

``SLOW_LOAD_SECONDS`` makes loading take its time. Served as ``slow:Gateway`` and, alone, as ``slow:Slow``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jubako.services import family_service, gateway_service

if TYPE_CHECKING:
    import torch

    from jubako.engine.samples import Sample
    from jubako.families.loaded import Finished
    from jubako.job import Job

FORWARD_SECONDS = 0.1


class Sleeper:
    """Five forwards of a tenth of a second each make a grey picture."""

    max_rows = 64

    def prepare(self, job: Job) -> Sample:
        import torch

        from jubako.engine.samples import Sample
        from jubako.engine.schedule import Schedule, make_scheduler

        scheduler = make_scheduler({"num_train_timesteps": 1000}, job.scheduler, flow=False)
        schedule = Schedule(scheduler, job.num_inference_steps, torch.Generator())
        return Sample(self, schedule, torch.zeros(1, 3, 8, 8), {}, job.guidance_scale)

    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        time.sleep(FORWARD_SECONDS)
        return inputs * 0

    def decode(self, latents: torch.Tensor, *, sparing: bool = False, upcast: bool = False) -> torch.Tensor:
        return latents * 0 + 0.5

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        return latents[0] * 0 + 0.5

    def finish(self, decoded: torch.Tensor, job: Job, facts: Mapping[str, object]) -> Finished:
        import io

        from PIL import Image

        from jubako.families.loaded import Finished
        from jubako.result import File

        file = io.BytesIO()
        Image.new("RGB", (8, 8), (128, 128, 128)).save(file, "PNG")
        return Finished(File(content_type="image/png", content=file.getvalue()))


def wrap(*_: Any) -> Sleeper:
    """What the loader calls to make a model of this family around its pipeline."""
    time.sleep(float(os.environ.get("SLOW_LOAD_SECONDS", "0")))
    return Sleeper()


# The loader finds a family's module by name; this one joins the shipped ones.
family = ModuleType("jubako.families.slow")
family.wrap = wrap  # type: ignore[attr-defined] # that is how a module made by hand gets its functions
sys.modules[family.__name__] = family

os.environ["JUBAKO_CATALOG"] = str(Path(__file__).parent / "slow_catalog")
os.environ.setdefault("JUBAKO_DEFAULT_MODEL", "sleeper")

Slow = family_service("slow")

Gateway = gateway_service(slow=Slow)
