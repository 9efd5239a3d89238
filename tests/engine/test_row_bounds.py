"""Memory that ends in a forward or a decoding: smaller ones, and only who does not fit alone fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import no_room
from five_families import FAMILIES, catalog_of_five, order

from jubako.catalog import Catalog
from jubako.engine.batcher import StepBatcher
from jubako.engine.row_bounds import RowBounds
from jubako.engine.ticket import Ticket
from jubako.errors import OutOfMemory
from jubako.job import Job
from jubako.loader import FamilyLoader
from jubako.memory import freeze
from jubako.settings import load_settings

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return catalog_of_five(tmp_path_factory.mktemp("catalog"))


@pytest.fixture(scope="module")
def loaded(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    settings = load_settings({"JUBAKO_HOME": str(tmp_path_factory.mktemp("home"))})
    models: dict[str, Any] = {}
    # As the runner does: memory is given back after each failure, which looks through all that is not frozen.
    freeze()

    def load(family: str) -> Any:
        if family not in models:
            loader = FamilyLoader(catalog.families[family], settings, torch.device("cpu"))
            models[family] = loader.load(FAMILIES[family], lambda _: None)
        return models[family]

    return load


@pytest.fixture
def batcher() -> Iterator[StepBatcher]:
    batcher = StepBatcher()
    yield batcher
    batcher.close()


def denoiser(model: Any) -> torch.nn.Module:
    components = model.pipeline.components
    found: torch.nn.Module = next(
        components[name] for name in ("unet", "transformer", "prior") if name in components
    )
    return found


def submitted(batcher: StepBatcher, model: Any, jobs: Sequence[Job]) -> list[Ticket]:
    """All at once, so that they share forwards from the second one on."""
    samples = [model.prepare(job) for job in jobs]
    tickets = [Ticket() for _ in jobs]
    for sample, ticket in zip(samples, tickets, strict=True):
        batcher.submit(sample, ticket)
    return tickets


def decoded(tickets: Sequence[Ticket]) -> list[torch.Tensor]:
    return [ticket.decoded.result(60) for ticket in tickets]


def apart(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest difference in steps of 1/255; of an object's latents, in as many parts of their largest."""
    largest = max(1.0, *(float(each.abs().max()) for each in theirs))
    worst = max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))
    return worst * 255 / largest


@every_family
def test_a_forward_that_does_not_fit_is_run_in_parts_with_the_same_pictures(
    catalog: Catalog, loaded: Callable[[str], Any], batcher: StepBatcher, family: str
) -> None:
    model = loaded(family)
    # Ancestral noise would show whether a generator moved on in vain.
    own = {"scheduler": "Euler a"} if family in {"sd", "sdxl"} else {}
    jobs = [order(catalog, family, seed=seed, steps=2 + seed % 2, **own) for seed in range(3)]
    expected = decoded(submitted(batcher, model, jobs))
    rows = model.prepare(jobs[0]).rows
    with no_room(denoiser(model), lambda given: len(given) > rows) as failed:
        ours = decoded(submitted(batcher, model, jobs))
    assert failed, "no forward had more than one sample"
    # The bound is remembered for as long as these jobs run.
    assert len(failed) <= 2, failed
    assert apart(ours, expected) <= 2


def test_only_who_does_not_fit_alone_fails_and_says_what_would(
    catalog: Catalog, loaded: Callable[[str], Any], batcher: StepBatcher
) -> None:
    model = loaded("sd")
    jobs = [order(catalog, "sd", seed=seed, steps=6, guidance_scale=1) for seed in range(3)]
    guided = order(catalog, "sd", seed=3, steps=6, guidance_scale=3)
    expected = decoded(submitted(batcher, model, jobs))
    with no_room(denoiser(model), lambda given: len(given) > 1):
        *mates, failing = submitted(batcher, model, [*jobs, guided])
        with pytest.raises(OutOfMemory, match="ask for a smaller width and height") as caught:
            failing.decoded.result(60)
        assert apart(decoded(mates), expected) <= 2
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert len(decoded(submitted(batcher, model, [guided]))) == 1


def test_fewer_rows_are_tried_for_a_while() -> None:
    now = 0.0
    bounds = RowBounds(60, clock=lambda: now)
    bounds.lower("small", 2)
    assert (bounds.rows("small", 8), bounds.rows("small", 1), bounds.rows("large", 8)) == (2, 1, 8)
    now = 59
    assert bounds.rows("small", 8) == 2
    now = 61
    assert bounds.rows("small", 8) == 8


@every_family
def test_what_does_not_fit_in_one_decoding_is_decoded_in_several(
    catalog: Catalog, loaded: Callable[[str], Any], batcher: StepBatcher, family: str
) -> None:
    if family == "mesh":
        pytest.skip("nothing of an object is decoded on the denoiser's thread")
    model = loaded(family)
    # With as many steps they end together, but for the first.
    jobs = [order(catalog, family, seed=seed, steps=2) for seed in range(3)]
    expected = decoded(submitted(batcher, model, jobs))
    with no_room(model.pipeline.vae.decoder, lambda given: len(given) > 1) as failed:
        ours = decoded(submitted(batcher, model, jobs))
    assert failed
    if family == "video":
        # A temporal decoder that sees one frame at a time has less to go by.
        assert apart(ours, expected) <= 60
        assert all(one.shape == other.shape for one, other in zip(ours, expected, strict=True))
    else:
        assert apart(ours, expected) <= 2


def test_a_picture_that_can_not_be_decoded_whole_is_decoded_in_tiles(
    catalog: Catalog, loaded: Callable[[str], Any], batcher: StepBatcher
) -> None:
    model, job = loaded("sd"), order(catalog, "sd", width=128, height=128)
    (expected,) = decoded(submitted(batcher, model, [job]))
    vae = model.pipeline.vae
    before = dict(vars(vae))
    with no_room(vae.decoder, lambda given: given.shape[-1] > 16) as failed:
        (ours,) = decoded(submitted(batcher, model, [job]))
    assert failed == [1]
    assert ours.shape == expected.shape
    # Seams are blended, and an autoencoder's middle looks at the whole: close, not the same.
    assert float((ours - expected).abs().mean()) < 0.08
    assert vars(vae).keys() == before.keys()
    assert vae.tile_latent_min_size == before["tile_latent_min_size"]


def test_what_can_not_be_decoded_at_all_fails_alone(
    catalog: Catalog, loaded: Callable[[str], Any], batcher: StepBatcher
) -> None:
    model, job = loaded("sd"), order(catalog, "sd")
    with ExitStack() as stack:
        stack.enter_context(no_room(model.pipeline.vae.decoder))
        (ticket,) = submitted(batcher, model, [job])
        with pytest.raises(OutOfMemory):
            ticket.decoded.result(60)
    assert len(decoded(submitted(batcher, model, [job]))) == 1


def test_the_room_is_that_of_each_bucket(
    catalog: Catalog, loaded: Callable[[str], Any], batcher: StepBatcher, tmp_path: Path
) -> None:
    model = loaded("sd")
    large = [order(catalog, "sd", seed=seed, width=128, height=128) for seed in range(2)]
    small = [order(catalog, "sd", seed=seed) for seed in range(2)]
    with no_room(denoiser(model), lambda given: given.shape[-1] > 16 and len(given) > 2):
        decoded(submitted(batcher, model, large))
    before = batcher.forwards
    decoded(submitted(batcher, model, small))
    assert batcher.forwards - before < sum(job.num_inference_steps for job in small)
