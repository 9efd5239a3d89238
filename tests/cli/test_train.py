"""`jubako train` against a real server: pictures with captions in, an adapter out, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from plus import FIVE, draw
from program import jubako
from server import Server

from jubako.pictures import png


def folder(path: Path, captions: Sequence[str] = ()) -> Path:
    path.mkdir()
    for number, drawn in enumerate(FIVE):
        (path / f"{number}.png").write_bytes(png(draw(drawn)))
        if number < len(captions):
            (path / f"{number}.txt").write_text(captions[number], encoding="utf-8")
    return path


@pytest.mark.timeout(300)
def test_it_waits_for_the_adapter_and_shows_a_progress_bar(server: Server, tmp_path: Path) -> None:
    images = folder(tmp_path / "pictures", [f"a {drawn.colour} cliplus" for drawn in FIVE])
    options = ("--base", "tiny-sd", "--images", str(images), "--trigger", "cliplus", "--class-noun", "shape")
    more = ("--steps", "3", "--no-prior-preservation", "--seed", "1", "--name", "cli-plus")
    environ: dict[str, Any] = {"TTY_COMPATIBLE": "1", "TERM": "xterm", "FORCE_COLOR": "1", "timeout": 250}
    output = tmp_path / "plus.safetensors"
    done = jubako(
        "train", *options, *more, "-o", str(output), "--url", server.url, tmp_path=tmp_path, **environ
    )
    assert done.returncode == 0, done.stderr
    assert "cli-plus" in done.stdout
    assert "of 3, loss" in done.stderr
    assert output.stat().st_size > 100_000
    reply = server.generate("a red cliplus", num_inference_steps=2).raise_for_status()
    assert "cli-plus" in reply.json()["warnings"][0]


@pytest.mark.parametrize(
    ("captions", "options", "says"),
    [
        (["a cliplus"], (), "there is no 1.txt"),
        ((), ("--rank", "1000"), "rank"),
        (["a plus"] * 5, (), "captions"),
        ((), ("--method", "magic"), "dreambooth-lora"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    captions: Sequence[str], options: tuple[str, ...], says: str, server: Server, tmp_path: Path
) -> None:
    images = folder(tmp_path / "pictures", captions)
    given = ("--base", "tiny-sd", "--images", str(images), "--trigger", "cliplus", "--class-noun", "shape")
    done = jubako("train", *given, *options, "--url", server.url, tmp_path=tmp_path)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
