"""`jubako compare` against the real server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from lora_files import sent, tiny_sd_lora
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


def test_an_adapter_is_laid_over_every_picture(server: Server, tmp_path: Path) -> None:
    arguments = ["-m", "tiny-sd", "--axis", "steps=1,2", "--seed", "7"]
    plain = compare(tmp_path, *arguments, "-o", "plain.png", url=server.url)
    with sent(server.url, tiny_sd_lora(tmp_path / "zog.safetensors", 1), "zog"):
        styled = compare(tmp_path, *arguments, "--lora", "zog:0.8", "-o", "styled.png", url=server.url)
    assert (plain.returncode, styled.returncode) == (0, 0), styled.stderr
    with Image.open(tmp_path / "plain.png") as one, Image.open(tmp_path / "styled.png") as other:
        assert one.size == other.size
        assert one.tobytes() != other.tobytes()


def test_what_the_server_refuses_is_one_sentence(server: Server, tmp_path: Path) -> None:
    done = compare(tmp_path, "-m", "tiny-sd", "--axis", "steps=1,1000", url=server.url)
    told = "tiny-sd at num_inference_steps 1000: num_inference_steps: tiny-sd takes 1 to 150 steps, not 1000"
    assert (done.returncode, done.stderr) == (1, f"jubako: {told}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--axis", "steps"], "'steps' is not FIELD=VALUE,VALUE"),
        (["--lora", "zog:much"], "Invalid value for --lora: 'much' of 'zog:much' is no weight"),
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
