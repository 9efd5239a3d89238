"""From a checkout to a bento, and from the bento alone to a picture."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from server import ROOT, serving

CAPTION = "a large red circle on the left of a blue background"


def built(home: Path) -> Path:
    """The folder of the bento that the README's command builds."""
    environment = {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--output", "tag"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tag = done.stdout.strip().removeprefix("__tag__:").splitlines()[-1]
    assert tag.startswith("jubako:")
    return home / "bentos" / tag.replace(":", "/")


@pytest.mark.timeout(600)
def test_a_bento_serves_in_an_environment_with_only_its_own_requirements(tmp_path: Path) -> None:
    bento = built(tmp_path / "bentoml")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=120)
    python = environment / "bin" / "python"
    requirements = bento / "env" / "python" / "requirements.txt"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements],
        check=True,
        timeout=500,
    )
    with serving(tmp_path / "served", target=str(bento), cwd=tmp_path, python=python) as server:
        reply = server.generate(CAPTION, seed=7)
        assert reply.status_code == 200, reply.text
        image = Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"])))
        assert image.size == (64, 64)
        assert reply.json()["data"][0]["seed"] == 7


def test_a_bento_holds_what_is_served_and_nothing_else(tmp_path: Path) -> None:
    source = built(tmp_path / "bentoml") / "src"
    names = {path.name for path in source.iterdir()}
    assert names >= {"service.py", "jubako", "models"}
    assert not names & {"tests", "scripts", "benchmarks", "docs", ".git", ".venv"}
    assert (source / "models" / "embedded" / "tiny-sd" / "model_index.json").is_file()
    megabytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file()) / 2**20
    assert megabytes < 70  # four embedded models of at most 16 MB
