"""Vendors' weights through everything: export, gateway, family, batcher, and the pixel checker at the end."""

from __future__ import annotations

import io
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from program import COMMAND
from server import Server, serving

from jubako.miniatures.reader import shows

CAPTIONS = [
    f"a large {colour} {shape} on the {place} of a white background"
    for colour in ("red", "green", "blue")
    for shape in ("circle", "triangle")
    for place in ("left", "right")
]
EXPORTS = [
    ("tiny-sd", "nvidia", "float32"),
    ("tiny-sdxl", "amd", "mixed"),
    ("tiny-sd3", "nvidia", "bfloat16"),
]


def pictures(server: Server, model: str) -> list[np.ndarray[Any, Any]]:
    """The pictures of all captions, six requests at a time, each with steps of its own."""

    def ask(number: int) -> np.ndarray[Any, Any]:
        fields = {"prompt": CAPTIONS[number], "model": model, "seed": number, "steps": 16 + number % 5}
        reply = server.post("/txt2img", fields)
        assert reply.status_code == 200, reply.text
        return np.asarray(Image.open(io.BytesIO(reply.content)).convert("RGB")).astype(int)

    with ThreadPoolExecutor(6) as callers:
        return list(callers.map(ask, range(len(CAPTIONS))))


def right(found: list[np.ndarray[Any, Any]]) -> int:
    images = [Image.fromarray(picture.astype("uint8")) for picture in found]
    return sum(shows(image, caption).ok for image, caption in zip(images, CAPTIONS, strict=True))


@pytest.mark.timeout(900)
def test_exported_miniatures_are_served_from_graphs_as_from_standard_weights(tmp_path: Path) -> None:
    folder = tmp_path / "catalog"
    folder.mkdir()
    environ = {**os.environ, "JUBAKO_HOME": str(tmp_path / "home")}
    for name, layout, precision in EXPORTS:
        out = folder / name
        command = [*COMMAND, "export", name, "--layout", layout, "--precision", precision, "--out", str(out)]
        subprocess.run(command, check=True, env=environ, capture_output=True, timeout=300)
        # One folder of catalogs serves them all.
        text = (out / "catalog.yaml").read_text(encoding="utf-8").replace("folder: .", f"folder: {name}")
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    families = "sd,sdxl,sd3"
    with serving(tmp_path / "standard", JUBAKO_FAMILIES=families) as server:
        standard = {name: pictures(server, name) for name, _, _ in EXPORTS}
    with serving(
        tmp_path / "graphs",
        JUBAKO_FAMILIES=families,
        JUBAKO_CATALOG=str(folder),
        JUBAKO_EXECUTION_PROVIDER="cpu",
        JUBAKO_WEIGHTS=",".join(f"{name}={layout}" for name, layout, _ in EXPORTS),
    ) as server:
        for name, layout, precision in EXPORTS:
            found = pictures(server, name)
            entry = httpx.get(f"{server.url}/v1/models/{name}", timeout=30).json()
            assert (entry["weights"], entry["precision"]) == (layout, precision)
            worst = max(int(abs(one - other).max()) for one, other in zip(found, standard[name], strict=True))
            print(f"{name}, {layout} {precision}: {worst} of 255, {right(found)} of {len(CAPTIONS)} right")
            if precision == "float32":
                assert worst <= 2
            assert right(found) >= right(standard[name]) - (0 if precision == "float32" else 1)
            assert right(found) >= 0.8 * len(CAPTIONS)
        log = server.log.read_text(encoding="utf-8")
    assert "tiny-sd: served from nvidia weights in float32 on CPUExecutionProvider" in log
