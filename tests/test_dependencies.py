"""What is installed is new enough, and free of what is known to be wrong with it."""

from __future__ import annotations

import subprocess
from importlib.metadata import version

import pytest
from packaging.version import Version
from server import ROOT

# The first version without a hole that would be one here.
FLOORS = {
    "bentoml": "1.4.39",  # pickles on the wire, addresses fetched for uploads, commands from a bento's build
    "torch": "2.10",  # code run from weights that were read as weights only
    "diffusers": "0.42.1",  # code of a repository run without being asked
    "transformers": "5.5",  # a model's configuration that switches remote code on
    "starlette": "1.0.1",  # a Host header that changes the path that is checked
    "python-multipart": "0.0.27",  # a file's name that leaves its folder
    "aiohttp": "3.14",
    "pillow": "12.2",  # animations of more frames than memory
    "onnx": "1.21",  # external data outside of the graph's folder
}


@pytest.mark.parametrize("package", FLOORS)
def test_what_is_installed_is_not_older_than_its_floor(package: str) -> None:
    assert Version(version(package)) >= Version(FLOORS[package])


def test_what_is_pinned_is_not_older_than_its_floor() -> None:
    lines = [
        line.partition(" ;")[0].partition("==")
        for name in ("requirements.txt", "constraints.txt")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    ]
    pinned = {name: pin for name, _, pin in lines if pin}
    for package, floor in FLOORS.items():
        assert Version(pinned[package]) >= Version(floor)


def test_no_vulnerability_of_what_serves_is_known() -> None:
    done = subprocess.run(
        ["scripts/audit"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
