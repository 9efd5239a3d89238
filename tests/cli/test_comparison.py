"""`jubako compare` against the real server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from program import COMMAND
from server import Server


def compare(cwd: Path, *arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "compare", "a red circle", "--url", url, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def test_a_sheet_is_written_and_its_pictures_are_listed(server: Server, tmp_path: Path) -> None:
    arguments = ["--models", "tiny-sd", "--axis", "steps=1,3", "--seed", "7"]
    done = compare(tmp_path, *arguments, url=server.url)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert first == f"sheet.png  {sheet.width}x{sheet.height}, seed 7"
    assert [line.split()[:4] for line in lines] == [
        ["model", "value", "size", "steps"],
        ["tiny-sd", "1", "64x64", "1"],
        ["tiny-sd", "3", "64x64", "3"],
    ]


def test_a_picture_to_start_from_is_sent_along(server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    arguments = ["-m", "tiny-sd", "--image", "blue.png", "--axis", "strength=0.3,0.9", "--steps", "4"]
    done = compare(tmp_path, *arguments, "-o", "out.png", url=server.url)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tiny-sd +0\.9 +64x64 +4", done.stdout)


def test_what_the_server_refuses_is_one_sentence(server: Server, tmp_path: Path) -> None:
    done = compare(tmp_path, "-m", "tiny-sd", "--axis", "steps=1,1000", url=server.url)
    told = "tiny-sd at num_inference_steps 1000: num_inference_steps: tiny-sd takes 1 to 150 steps, not 1000"
    assert (done.returncode, done.stderr) == (1, f"jubako: {told}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--axis", "steps"], "'steps' is not FIELD=VALUE,VALUE"),
        (["-o", "sheet.jpg"], "sheet.jpg does not end in .png"),
        (["-o", "nowhere/sheet.png"], "there is no folder nowhere"),
    ],
)
def test_what_can_not_be_is_refused_before_the_server_is_asked(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    done = compare(tmp_path, "-m", "tiny-sd", *arguments, url="http://127.0.0.1:1")
    assert done.returncode == 2
    assert told in " ".join(done.stderr.replace("│", " ").split())
