"""The safety check: what is done about flagged pictures and clips, and that none is silently let through."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from checkers import EVERYTHING, one_of_two, write_checker
from PIL import Image, ImageFilter, ImageStat

from jubako.catalog import load_catalog
from jubako.clip import ImageToVideo
from jubako.errors import ContentRefused, FamilyUnavailable
from jubako.pictures import png
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.result import Progress, Result
from jubako.runner import Runner
from jubako.safety import Screen, screen_for
from jubako.services.ignition import Ignition
from jubako.settings import SettingsError, load_settings

CATALOG = load_catalog()
CPU = torch.device("cpu")
FLAGGED, CLEAN = 7, 8  # seeds


class Reddish:
    """Flags what is mostly red; remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def flags(self, pictures: Sequence[Image.Image]) -> Sequence[bool]:
        self.seen += (colours := [tuple(map(int, ImageStat.Stat(picture).mean)) for picture in pictures])
        return [red > 200 for red, _, _ in colours]


class Silent:
    """Says nothing of what it is shown."""

    def flags(self, pictures: Sequence[Image.Image]) -> Sequence[bool]:
        del pictures
        return []


def frames(*reds: float, side: int = 32) -> torch.Tensor:
    """A clip [frames, 3, side, side] of red squares on black, each so bright."""
    clip = torch.zeros(len(reds), 3, side, side)
    for number, red in enumerate(reds):
        clip[number, 0] = red
        clip[number, :, 0, 0] = 1.0
    return clip


@pytest.mark.parametrize("mode", ["flag", "blur", "refuse"])
def test_what_is_not_flagged_passes_as_it_is(mode: Literal["flag", "blur", "refuse"]) -> None:
    screen = Screen(Reddish(), mode, 5)
    for decoded in (frames(0.5)[0], frames(0.5, 0.1)):
        shown, flagged = screen.screened(decoded)
        assert flagged is False
        assert shown is decoded
    latents = torch.ones(8, 16)
    assert screen.screened(latents) == (latents, None)


def test_what_is_flagged_is_flagged_blurred_or_refused() -> None:
    picture = frames(1.0, side=64)[0]
    picture[1, ::2] = 1
    shown, flagged = Screen(Reddish(), "flag", 5).screened(picture)
    assert flagged is True
    assert shown is picture
    shown, flagged = Screen(Reddish(), "blur", 5).screened(picture.half())
    assert flagged is True
    assert (shown.shape, shown.dtype) == (picture.shape, torch.float16)
    rows = shown.float()[1].diff(dim=0).abs().max()
    assert picture[1].diff(dim=0).abs().max() == 1
    assert rows < 0.05, "the stripes can still be made out"
    with pytest.raises(ContentRefused):
        Screen(Reddish(), "refuse", 5).screened(picture)


def test_of_a_clip_some_frames_and_the_last_are_looked_at_and_one_is_enough() -> None:
    checker = Reddish()
    shades = [number / 16 for number in range(9)]
    assert Screen(checker, "blur", 3).screened(frames(*shades))[1] is False
    assert [red for red, _, _ in checker.seen] == pytest.approx(
        [255 * shades[i] for i in (0, 3, 6, 8)], abs=1
    )
    clip = frames(*shades[:8], 1.0)
    shown, flagged = Screen(checker, "blur", 3).screened(clip)
    assert flagged is True
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(shown, clip, strict=True))


def test_a_checker_that_says_nothing_lets_nothing_through() -> None:
    with pytest.raises(ValueError, match="0 things of 1"):
        Screen(Silent(), "flag", 5).screened(frames(0.1)[0])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("safety-checker", "JUBAKO_SAFETY=refuse: safety-checker is not on disk; fetch it with: jubako pull"),
        ("safety-cheker", "no checker 'safety-cheker'. Did you mean 'safety-checker'"),
        ("test_safety:Nothing", "JUBAKO_SAFETY_CHECKER=test_safety:Nothing: AttributeError"),
        ("no_such_module:make", "ModuleNotFoundError"),
    ],
)
def test_a_checker_that_can_t_be_had_keeps_the_family_from_starting(
    tmp_path: Path, name: str, told: str
) -> None:
    environ = {"JUBAKO_HOME": str(tmp_path), "JUBAKO_SAFETY": "refuse", "JUBAKO_SAFETY_CHECKER": name}
    with pytest.raises(SettingsError) as failure:
        screen_for(CATALOG.families["sd"], load_settings(environ), CPU)
    assert told in str(failure.value)


def test_a_family_without_its_checker_answers_with_the_reason(tmp_path: Path) -> None:
    settings = load_settings({"JUBAKO_HOME": str(tmp_path), "JUBAKO_SAFETY": "flag"})
    ignition = Ignition(CATALOG.families["sd"], settings)
    with pytest.raises(FamilyUnavailable, match="jubako pull safety-checker"):
        asyncio.run(ignition.runner())
    assert not ignition.ready


def test_it_is_off_by_default_and_for_objects(tmp_path: Path) -> None:
    environ = {"JUBAKO_HOME": str(tmp_path)}
    assert screen_for(CATALOG.families["sd"], load_settings(environ), CPU) is None
    on = load_settings(environ | {"JUBAKO_SAFETY": "refuse"})
    assert screen_for(CATALOG.families["mesh"], on, CPU) is None


@contextmanager
def running(family: str, home: Path, **environ: str) -> Iterator[Runner]:
    settings = load_settings({"JUBAKO_HOME": str(home), "JUBAKO_DEVICE": "cpu", **environ})
    runner = Runner(load_catalog(settings.catalog).families[family], settings)
    try:
        yield runner
    finally:
        runner.close()


def drawn(runner: Runner, seed: int, **fields: Any) -> Result:
    request = TextToImage.model_validate({"prompt": "a red circle", "steps": 4, "seed": seed, **fields})
    return asyncio.run(runner.generate(plan(request, CATALOG)))


def opened(result: Result) -> Image.Image:
    assert result.error is None, result.error
    return Image.open(io.BytesIO(result.content)).convert("RGB")


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Image.Image]:
    """What the miniature draws where nobody looks."""
    with running("sd", tmp_path_factory.mktemp("home")) as runner:
        results = {seed: drawn(runner, seed) for seed in (FLAGGED, CLEAN)}
    assert {result.flagged for result in results.values()} == {None}
    return {seed: opened(result) for seed, result in results.items()}


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory: pytest.TempPathFactory, without: Mapping[int, Image.Image]) -> Path:
    """A checker that flags one of the two pictures, as the only one of a catalog; one that flags all."""
    folder = tmp_path_factory.mktemp("checkers")
    one_of_two(folder / "one", without[FLAGGED], without[CLEAN])
    write_checker(folder / "all", EVERYTHING)
    licence = {"id": "mine", "url": "https://example.com/licence", "commercial": "yes"}
    entries = {name: {"title": name, "folder": name, "licence": licence} for name in ("one", "all")}
    (folder / "sd.yaml").write_text(yaml.safe_dump({"family": "sd", "checkers": entries}), encoding="utf-8")
    return folder


def checked(mode: str, catalogs: Path, checker: str = "one") -> dict[str, str]:
    return {
        "JUBAKO_SAFETY": mode,
        "JUBAKO_SAFETY_CHECKER": checker,
        "JUBAKO_CATALOG": str(catalogs),
    }


@pytest.mark.parametrize("mode", ["flag", "blur", "refuse"])
def test_a_real_checker_stands_between_the_decoder_and_the_file(
    mode: str, tmp_path: Path, catalogs: Path, without: Mapping[int, Image.Image]
) -> None:
    with running("sd", tmp_path, **checked(mode, catalogs)) as runner:
        flagged, clean = drawn(runner, FLAGGED), drawn(runner, CLEAN)
    assert clean.flagged is False
    assert opened(clean).tobytes() == without[CLEAN].tobytes()
    if mode == "refuse":
        assert flagged.error is not None
        assert flagged.error["error"]["code"] == "content_refused"
        assert flagged.content == b""
        return
    assert flagged.flagged is True
    same = opened(flagged).tobytes() == without[FLAGGED].tobytes()
    assert same == (mode == "flag")
    if mode == "blur":
        edges = [
            max(ImageStat.Stat(image.filter(ImageFilter.FIND_EDGES).crop((2, 2, 62, 62))).stddev)
            for image in (opened(flagged), without[FLAGGED])
        ]
        assert edges[0] < edges[1] / 3


def test_what_is_hidden_has_no_previews(tmp_path: Path, catalogs: Path) -> None:
    job = plan(TextToImage(prompt="a red circle", num_inference_steps=10, seed=FLAGGED), CATALOG)
    for mode, shown in (("flag", True), ("blur", False)):
        told: list[Progress] = []
        with running("sd", tmp_path, **checked(mode, catalogs), JUBAKO_PREVIEW_STEPS="2") as runner:
            asyncio.run(runner.generate(job, told.append, durable=True))
        assert any(progress.preview for progress in told) == shown
        assert told[-1].step == 10


def test_clips_are_looked_at_as_well(tmp_path: Path, catalogs: Path) -> None:
    image = png(Image.new("RGB", (64, 64), "red"))
    job = plan(ImageToVideo(image=image, model="tiny-svd", num_inference_steps=2, seed=1), CATALOG)
    with running("video", tmp_path, **checked("refuse", catalogs, "all")) as runner:
        result = asyncio.run(runner.generate(job))
    assert result.error is not None
    assert result.error["error"]["code"] == "content_refused"


def test_a_checker_of_one_s_own_is_a_function_that_makes_it(tmp_path: Path) -> None:
    environ = {"JUBAKO_SAFETY": "flag", "JUBAKO_SAFETY_CHECKER": "test_safety:Reddish"}
    settings = load_settings({"JUBAKO_HOME": str(tmp_path), **environ})
    screen = screen_for(CATALOG.families["sdxl"], settings, CPU)
    assert screen is not None
    assert screen.screened(frames(1.0)[0])[1] is True
