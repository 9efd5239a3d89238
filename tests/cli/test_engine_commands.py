"""`jubako engines` on engines that a builder wrote which only writes files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from program import COMMAND
from typer.testing import CliRunner

from jubako.cli.engines import engines
from jubako.weights.engines import EngineKey, EngineStore, ShapeRange

QUOTA = 10**9


def program(*arguments: str, home: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`jubako engines` in a process of its own."""
    script = (
        "from jubako import cli; from jubako.cli.engines import engines\n"
        "cli.app.add_typer(engines, name='engines'); cli.main()"
    )
    environment = {**os.environ, "JUBAKO_HOME": str(home), **environ}
    command = [*COMMAND[:2], script, "engines", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def write(directory: Path) -> Path:
    """What a provider writes, of 2 MB."""
    (directory / "graph.engine").write_bytes(bytes(2_000_000))
    return directory


def build(home: Path, graph: str, model: str) -> str:
    key = EngineKey(
        graph=graph,
        data=(),
        onnxruntime="1.31.1",
        provider="tensorrt",
        provider_version="10.13.3",
        gpu="NVIDIA L4",
        architecture="sm_89",
        driver="580.65.06",
        toolkit="13",
        shapes={"sample": ShapeRange((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8))},
        options={"trt_fp16_enable": "True"},
        system="Linux x86_64",
    )
    EngineStore(home / "engines", QUOTA).session(key, write, model=model, slot="unet").close()
    return key.digest


def test_the_list_shows_what_each_engine_is_for(tmp_path: Path) -> None:
    digests = [build(tmp_path, "a", "sdxl"), build(tmp_path, "b", "sd3.5-large")]
    shown = program("list", home=tmp_path, JUBAKO_ENGINE_BYTES="1GB").stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    for digest, model in zip(digests, ("sdxl", "sd3.5-large"), strict=True):
        row = lines[digest[:12]]
        assert all(word in row for word in (model, "unet", "tensorrt 10.13.3", "NVIDIA L4", "2.0 MB"))
    assert "4.0 MB of 1.00 GB" in shown


def test_the_list_as_json_has_all_facts_of_the_key(tmp_path: Path) -> None:
    digest = build(tmp_path, "a", "sdxl")
    (entry,) = json.loads(program("list", "--json", home=tmp_path).stdout)
    assert (entry["key"], entry["model"], entry["slot"]) == (digest, "sdxl", "unet")
    assert (entry["bytes"], entry["in_use"]) == (2_000_000, False)
    assert EngineKey.model_validate(entry["facts"]).digest == digest


def test_an_empty_home_is_listed_and_cleared(tmp_path: Path) -> None:
    assert program("list", home=tmp_path).stdout == "There are no engines.\n"
    assert json.loads(program("list", "--json", home=tmp_path).stdout) == []
    assert program("clear", "--all", home=tmp_path).stdout == "0 engines removed, 0.0 MB\n"


def test_engines_are_cleared_by_the_beginning_of_a_key_or_by_model(tmp_path: Path) -> None:
    first = build(tmp_path, "a", "sdxl")
    for graph in "bcd":
        build(tmp_path, graph, "sd3.5-large")
    assert program("clear", first[:8], home=tmp_path).stdout == "1 engine removed, 2.0 MB\n"
    assert program("clear", "sd3.5-large", home=tmp_path).stdout == "3 engines removed, 6.0 MB\n"
    assert program("list", home=tmp_path).stdout == "There are no engines.\n"


def test_a_name_that_no_engine_has_is_one_line(tmp_path: Path) -> None:
    build(tmp_path, "a", "sdxl")
    done = program("clear", "sdxl-turbo", home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("jubako: no engine has a key that begins with 'sdxl-turbo'")
    assert done.stderr.count("\n") == 1


def test_clearing_wants_names_or_all(tmp_path: Path) -> None:
    build(tmp_path, "a", "sdxl")
    for arguments in (["clear"], ["clear", "--all", "sdxl"]):
        assert program(*arguments, home=tmp_path).returncode == 2
    assert len(EngineStore(tmp_path / "engines", QUOTA).entries()) == 1


def test_an_engine_in_use_is_kept_and_named(tmp_path: Path) -> None:
    digest = build(tmp_path, "a", "sdxl")
    (entry,) = EngineStore(tmp_path / "engines", QUOTA).entries()
    engine = EngineStore(tmp_path / "engines", QUOTA).session(
        entry.record.key, lambda at: at, model="sdxl", slot="unet"
    )
    assert "in use" in program("list", home=tmp_path).stdout
    done = program("clear", "--all", home=tmp_path)
    assert done.returncode == 1
    assert f"1 engine kept, in use by a process: {digest[:12]}" in done.stdout
    engine.close()
    assert program("clear", "--all", home=tmp_path).returncode == 0


def test_building_for_an_unknown_model_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    done = program("build", "sdxl-trubo", home=tmp_path)
    assert done.returncode == 1
    assert "sdxl-turbo" in done.stderr


def test_building_runs_the_builder_and_ends_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit 3\n')
    python.chmod(0o755)
    monkeypatch.setenv("JUBAKO_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(python))
    assert CliRunner().invoke(engines, ["build", "sdxl"]).exit_code == 3
    assert (tmp_path / "arguments").read_text() == "-m jubako.prebuild sdxl\n"
