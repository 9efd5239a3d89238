"""A loaded model's first forwards, before anybody waits for them: what compiles and tunes does it here."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from time import perf_counter

import torch
from PIL import Image

from jubako.catalog import Catalog, Family, Model
from jubako.engine.samples import Denoiser, Sample
from jubako.families.acceleration import uncompiled
from jubako.families.row_buckets import row_counts
from jubako.job import Job
from jubako.memory import out_of_memory
from jubako.pictures import png
from jubako.planning import REQUESTS, plan

__all__ = ["example_job", "warm_up"]

logger = logging.getLogger(__name__)


def example_job(model: Model, family: Family) -> Job:
    """A job of the model's own size, on a grey picture where it takes one."""
    kind = REQUESTS[model.tasks[0]]
    size = (model.defaults.width, model.defaults.height)
    given = {
        "prompt": "",
        "image": png(Image.new("RGB", size, "grey")),
        "mask": png(Image.new("L", size, "white")),
        "model": model.name,
        "seed": 0,
    }
    fields = {name: value for name, value in given.items() if name in kind.model_fields}
    return plan(kind.model_validate(fields), Catalog({family.name: family}))


@torch.inference_mode()
def warm_up(model: Denoiser, sample: Sample, modules: Iterable[torch.nn.Module] = ()) -> tuple[int, ...]:
    """A forward of each row count and one decoding, in the shapes of a sample of this model.

    ``modules`` are the model's own: where compiling fails, what is compiled of them is taken back and they
    run as they are. Gives the row counts that fit the memory. cuDNN keeps its plans by thread, so that this
    is best called where forwards will run.
    """
    began = perf_counter()
    try:
        done = tuple(_forwards(model, sample))
    except Exception as error:
        if out_of_memory(error) or not sum(uncompiled(module) for module in modules):
            raise
        logger.exception("compiling failed; the model runs without (JUBAKO_ACCELERATIONS=no-compile)")
        done = tuple(_forwards(model, sample))
    logger.info("warmed up with %s rows in %.1f s", ", ".join(map(str, done)), perf_counter() - began)
    return done


def _forwards(model: Denoiser, sample: Sample) -> Iterable[int]:
    inputs, timestep = sample.inputs()[-1:], sample.schedule.timestep
    told = {name: rows[-1:] for name, rows in sample.conditioning.items()}
    for rows in row_counts(model.max_rows):
        try:
            model.predict(
                _repeated(inputs, rows),
                timestep.repeat(rows).to(inputs.device),
                {name: _repeated(tensor, rows) for name, tensor in told.items()},
            )
        except Exception as error:
            if rows == 1 or not out_of_memory(error):
                raise
            logger.warning("a forward of %d rows does not fit the memory; lower max_rows", rows)
            break
        yield rows
    (sample.decode or model.decode)(sample.latents)


def _repeated(row: torch.Tensor, rows: int) -> torch.Tensor:
    return row.expand(rows, *row.shape[1:]).contiguous()
