"""The program around the commands: version, help, errors, what it imports, and its page in the docs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from program import jubako

from jubako import __version__


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    heavy = ["torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "bentoml", "httpx", "PIL"]
    script = (
        "import sys; sys.argv = ['jubako', 'models']; from jubako.cli import app\n"
        "app(standalone_mode=False)\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "JUBAKO_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "tiny-sd" in done.stdout


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert jubako("--version", tmp_path=tmp_path).stdout == f"jubako {__version__}\n"


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = jubako("--help", tmp_path=tmp_path).stdout
    assert all(command in shown for command in ("models", "pull", "generate"))


def test_a_bad_setting_is_one_line(tmp_path: Path) -> None:
    done = jubako("models", tmp_path=tmp_path, JUBAKO_TIMEOUT="soon")
    assert done.returncode == 1
    assert done.stderr.startswith("jubako: JUBAKO_TIMEOUT: ")
    assert done.stderr.count("\n") == 1


def test_a_bad_catalog_is_one_line_that_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "sd.yaml").write_text("family: sd\nmodels: {sd1.5: {gated: perhaps}}\n")
    done = jubako("models", tmp_path=tmp_path, JUBAKO_CATALOG=str(tmp_path))
    assert done.returncode == 1
    assert "sd.yaml" in done.stderr
    assert "models.sd1.5.gated" in done.stderr
    assert done.stderr.count("\n") == 1
