"""The scripts' own arguments; what they do is tested where it belongs."""

from __future__ import annotations

import subprocess

from server import ROOT


def test_hardware_that_nobody_knows_is_refused_before_anything_is_installed() -> None:
    done = subprocess.run(
        ["scripts/serve", "--hardware", "quantum"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "--hardware quantum: choose from auto, cpu, nvidia, amd\n"
