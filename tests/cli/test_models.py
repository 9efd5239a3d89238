"""`jubako models`: the table and the JSON of a catalog and a disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from program import jubako
from server import Server

from jubako.catalog import load_catalog
from jubako.settings import load_settings
from jubako.weights.store import WeightRecord, write_record


def test_the_table_shows_every_model_with_its_licence(tmp_path: Path) -> None:
    done = jubako("models", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for model in load_catalog():
        row = next(row for row in rows if row and row[0] == model.name)
        assert model.licence.id in row
        assert model.licence.commercial in row
    assert "fetch the weights with: jubako pull MODEL" in done.stdout


def test_a_pulled_model_counts_with_its_real_bytes(tmp_path: Path) -> None:
    sd = load_catalog().model("sd1.5")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model_index.json").write_bytes(b"12345")
    files = {"model_index.json": 5}
    record = WeightRecord(model=sd.name, repo=str(sd.weights.repo), commit="c", folder=folder, files=files)
    write_record(tmp_path, record)
    listed = entry("sd1.5", tmp_path)
    assert (listed["on_disk"], listed["size_bytes"]) == (True, 5)
    (folder / "model_index.json").write_bytes(b"123")
    listed = entry("sd1.5", tmp_path)
    assert (listed["on_disk"], listed["size_bytes"]) == (False, None)


def test_json_tells_what_the_embedded_model_is(tmp_path: Path) -> None:
    tiny = entry("tiny-sd", tmp_path)
    assert tiny["family"] == "sd"
    assert tiny["default"] is True
    assert tiny["on_disk"] is True
    assert tiny["licence"] == load_catalog().model("tiny-sd").licence.model_dump() | {"accepted": True}


def test_licences_that_nobody_has_accepted_are_marked_with_their_links(tmp_path: Path) -> None:
    for accepted in ("", "sai-nc-community"):
        done = jubako("models", tmp_path=tmp_path, JUBAKO_ACCEPTED_LICENCES=accepted)
        rows = {row[0]: row for line in done.stdout.splitlines() if (row := line.split())}
        assert ("!" in rows["sd-turbo"]) == (not accepted)
        assert "!" in rows["sd3.5-large"]
        assert "!" not in rows["sdxl"]
        large = load_catalog().model("sd3.5-large").licence
        assert rows[large.id][1].startswith("https://huggingface.co/stabilityai/")


def test_a_server_tells_what_it_has_in_memory(tmp_path: Path, server: Server) -> None:
    server.generate("a red circle", num_inference_steps=1)
    done = jubako("models", "--url", server.url, tmp_path=tmp_path)
    row = next(line for line in done.stdout.splitlines() if line.startswith("tiny-sd "))
    assert row.rstrip().endswith("0.03 GB in memory")
    listed = json.loads(jubako("models", "--json", "--url", server.url, tmp_path=tmp_path).stdout)
    assert {entry["name"]: entry["state"] for entry in listed}["sd1.5"] == "-"


@pytest.mark.parametrize(("columns", "has_family"), [(80, False), (120, True)])
def test_the_table_of_a_terminal_fits_it(tmp_path: Path, columns: int, *, has_family: bool) -> None:
    done = jubako("models", tmp_path=tmp_path, columns=columns, TTY_COMPATIBLE="1", TERM="xterm")
    plain = re.sub(r"\x1b\]8;[^\x1b]*\x1b\\|\x1b\[[0-9;]*m", "", done.stdout)
    lines = [line.rstrip() for line in plain.splitlines()]
    # An address is not broken, so that it can be clicked on and copied.
    assert max(len(line) for line in lines if "https://" not in line) <= columns
    assert "…" not in plain
    assert lines[0].split()[0] == "Model"
    assert ("Family" in lines[0]) == has_family


def entry(name: str, home: Path) -> dict[str, object]:
    done = jubako("models", "--json", tmp_path=home)
    entries: list[dict[str, object]] = json.loads(done.stdout)
    assert [listed["name"] for listed in entries] == list(load_catalog(load_settings({}).catalog).names)
    return next(listed for listed in entries if listed["name"] == name)
