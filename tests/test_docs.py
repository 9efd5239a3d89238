"""The docs can't lie: their tables are compared with the code, their commands and examples are run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image
from pydantic import AliasChoices
from server import ROOT, Server, free_port

from jubako import errors
from jubako.catalog import (
    Batching,
    Defaults,
    Family,
    Licence,
    Limits,
    Model,
    Resources,
    WeightSource,
    load_catalog,
)
from jubako.compare import Comparison
from jubako.errors import JubakoError
from jubako.images import ImagesEdit, ImagesGenerate, ImagesVariation
from jubako.request import Inpaint
from jubako.settings import Settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def doc(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", BLOCK.sub("", text)))


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(README) if kind == language]


def test_every_setting_is_in_its_table_with_its_default() -> None:
    table = {row[0].strip("`"): row[2] for row in rows(doc("docs/settings.md"))[1:]}
    expected = {f"JUBAKO_{name.upper()}": field.description for name, field in Settings.model_fields.items()}
    assert table == expected


def test_every_field_of_a_request_is_documented_with_its_other_names() -> None:
    table = {row[0].strip("`"): row for row in rows(doc("docs/api.md"))}
    for name, field in Inpaint.model_fields.items():
        assert table[name][2] == field.description
        if isinstance(field.validation_alias, AliasChoices):
            assert named(table[name][1]) == {str(alias) for alias in field.validation_alias.choices} - {name}


def test_every_field_of_openai_s_routes_and_of_comparisons_is_documented() -> None:
    fields = {*ImagesGenerate.model_fields, *ImagesEdit.model_fields, *ImagesVariation.model_fields}
    assert fields | set(Comparison.model_fields) <= named(doc("docs/api.md"))


def test_every_error_is_documented_with_its_status() -> None:
    table = {row[1].strip("`"): int(row[0]) for row in rows(doc("docs/api.md")) if row[0].isdigit()}
    known = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, JubakoError)
    }
    assert table == {error.code: error.status for error in known}


def test_every_key_of_the_catalog_is_described() -> None:
    text = named(doc("models/README.md"))
    for value in (Family, Model, Resources, Batching, Defaults, Limits, Licence, WeightSource):
        assert set(value.model_fields) - {"name", "family"} <= text, value.__name__


def test_the_catalog_s_example_is_a_catalog(tmp_path: Path) -> None:
    (example,) = [body for kind, body in BLOCK.findall(doc("models/README.md")) if kind == "yaml"]
    assert yaml.safe_load(example)["models"]
    (tmp_path / "mine.yaml").write_text(example, encoding="utf-8")
    catalog = load_catalog(tmp_path)
    assert catalog.model("dreamy").weights.folder == tmp_path / "dreamy"


def test_the_readme_s_table_of_models_is_the_catalog() -> None:
    table = [row[:4] for row in rows(README)[1:]]
    expected = [
        [model.name, model.family, model.licence.id, model.licence.commercial] for model in load_catalog()
    ]
    assert table == expected


def test_the_readme_s_tree_is_there() -> None:
    tree = README.split("## The tree")[1].split("```")[1].strip().splitlines()
    for line in tree:
        folder = ROOT / "src" / "jubako" if line.startswith("  ") else ROOT
        paths = line.strip() if "   " not in line.strip() else line.strip().split("   ")[0]
        for name in paths.split():
            assert (folder / name).exists(), f"the README names {name}"
    scripts = next(line for line in tree if line.startswith("scripts/")).split()[1:]
    assert sorted(scripts) == sorted(path.name for path in (ROOT / "scripts").iterdir() if path.is_file())


def test_links_between_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "models" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``scripts/serve`` as the README has it, on a port of its own; gives the URL that it announces."""
    home = tmp_path_factory.mktemp("readme")
    port = free_port()
    environment = {
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
    }
    with (home / "log").open("w+b") as log:
        process = subprocess.Popen(
            [ROOT / "scripts" / "serve", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        server = Server(f"http://127.0.0.1:{port}", process, home / "log")
        try:
            server.wait_until_ready(60)
            assert f"Jubako is ready at {server.url} after " in waited_for(server, "Jubako is ready")
            yield server.url
        finally:
            process.terminate()
            process.wait(30)


def waited_for(server: Server, text: str) -> str:
    for _ in range(50):
        if text in (log := server.log.read_text(encoding="utf-8")):
            return log
        httpx.get(f"{server.url}/readyz", timeout=5)
    raise AssertionError(server.tail())


def test_the_readme_s_shell_commands_do_what_it_says(served: str, tmp_path: Path) -> None:
    commands = [
        command
        for block in blocks("sh")
        for command in block.replace("\\\n", " ").strip().splitlines()
        if not command.startswith(("git clone", "scripts/serve", ".venv/bin/bentoml build"))
    ]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.replace("http://127.0.0.1:3000", served))
        if words[:2] in ([".venv/bin/jubako", "generate"], [".venv/bin/jubako", "compare"]):
            words += ["--url", served]
        words[0] = str(ROOT / words[0]) if words[0].startswith(".venv") else words[0]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["circle.png", "sheet.png", "star.png"]
    for name in ("circle.png", "star.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)


def test_the_readme_s_python_examples_run(served: str, tmp_path: Path) -> None:
    examples = blocks("python")
    assert len(examples) == 2
    for example in examples:
        code = example.replace("http://127.0.0.1:3000", served)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["moved.png", "ring-7.png", "ring-8.png"]
    assert "Seed: 7" in done.stdout
