"""The docs can't lie: their tables are compared with the code, their commands and examples are run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import typer.main
import yaml
from fastapi.routing import APIRoute
from PIL import Image
from plus import FIVE, draw
from pydantic import AliasChoices
from server import ROOT, Server, free_port

from jubako import errors
from jubako.catalog import (
    AdapterEntry,
    Batching,
    CheckerEntry,
    Defaults,
    Family,
    Licence,
    Limits,
    Model,
    Overlay,
    Resources,
    WeightSource,
    Worker,
    load_catalog,
)
from jubako.cli import app as program
from jubako.clip import ImageToVideo, TextToVideo
from jubako.compare import Comparison
from jubako.errors import JubakoError
from jubako.images import ImagesEdit, ImagesGenerate, ImagesVariation
from jubako.job import Clip, Solid
from jubako.mesh import ImageToMesh, TextToMesh
from jubako.pictures import png
from jubako.request import Inpaint, Request
from jubako.services.adapters import AdapterUpload, add_adapters
from jubako.services.comparing import add_comparison
from jubako.services.fine_tuning import add_fine_tuning
from jubako.services.jobs import add_jobs
from jubako.services.openai import openai_app
from jubako.services.videos import VideoCreate, add_videos
from jubako.settings import Settings, load_settings
from jubako.training.request import FineTuning
from jubako.weight_sets import Absence, GraphSet, Profile, Requirement

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def doc(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", BLOCK.sub("", text)))


def blocks(language: str, text: str = README) -> list[str]:
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def section(text: str, *headings: str) -> str:
    """What stands below these headings."""
    parts = dict(part.partition("\n")[::2] for part in re.split(r"^#{2,3} ", text, flags=re.MULTILINE)[1:])
    return "\n".join(parts[heading] for heading in headings)


def test_every_setting_is_in_its_table_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    table = {row[0].strip("`"): row for row in rows(doc("docs/settings.md"))[1:]}
    expected = {f"JUBAKO_{name.upper()}": field.description for name, field in Settings.model_fields.items()}
    assert {name: row[2] for name, row in table.items()} == expected
    given = {name: row[1].strip("`").replace("~", "/home/me") for name, row in table.items()}
    assert load_settings(given) == load_settings({})


@pytest.mark.parametrize(
    ("headings", "kinds"),
    [
        (("Pictures", "Pictures to start from"), (Inpaint,)),
        (("Clips",), (ImageToVideo, TextToVideo)),
        (("Objects",), (ImageToMesh, TextToMesh)),
        (("Clips", "`POST /v1/videos`"), (VideoCreate,)),
        (("`POST /v1/fine_tuning/jobs`",), (FineTuning,)),
        (("`POST /v1/adapters`",), (AdapterUpload,)),
    ],
    ids=["pictures", "clips", "objects", "videos", "fine-tuning", "adapters"],
)
def test_every_field_of_a_request_is_documented_with_its_other_names(
    headings: tuple[str, ...], kinds: tuple[type[Request], ...]
) -> None:
    found = rows(section(doc("docs/api.md"), *headings))
    table = {row[0].strip("`"): (named(row[1]), row[2]) for row in found if row[0] != "field"}
    fields = {name: field for kind in kinds for name, field in kind.model_fields.items()}
    if VideoCreate not in kinds:
        assert table.keys() == fields.keys()
    for name, field in fields.items():
        alias = field.validation_alias
        others = set(map(str, alias.choices)) - {name} if isinstance(alias, AliasChoices) else set()
        assert table[name] == (others, field.description)


def test_every_route_is_documented() -> None:
    app = openai_app()
    for add in (add_comparison, add_jobs, add_videos, add_fine_tuning, add_adapters):
        add(app)
    text = named(doc("docs/api.md"))
    for route in app.routes:
        if isinstance(route, APIRoute):
            path = route.path.replace("{job_id}", "{id}")
            assert {f"{method} {path}" for method in route.methods or ()} <= text


def commands(group: Any, name: str = "jubako") -> Iterator[tuple[str, Any]]:
    """The commands of the command line with their whole names."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def test_every_command_and_every_option_is_documented() -> None:
    headed = re.findall(
        r"^##+ `(jubako [a-z ]+?)(?: [A-Z]+)?`\n(.*?)(?=^##|\Z)", doc("docs/cli.md"), re.DOTALL | re.MULTILINE
    )
    sections = dict(headed)
    known = dict(commands(typer.main.get_command(program)))
    assert sections.keys() - {"jubako jobs", "jubako engines", "jubako adapters"} == known.keys()
    for name, command in known.items():
        tables = "".join(line for line in sections[name].splitlines() if line.startswith("| `-"))
        options = {option for parameter in command.params for option in parameter.opts if option[0] == "-"}
        assert set(re.findall(r"`(--?[a-z-]+)`", tables)) == options, name


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
    own = (
        Family,
        Model,
        AdapterEntry,
        CheckerEntry,
        Resources,
        Batching,
        Defaults,
        Limits,
        Licence,
        WeightSource,
        Overlay,
        Worker,
    )
    for value in (*own, Clip, Solid, GraphSet, Requirement, Profile, Absence):
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


def test_the_table_of_adapters_is_the_catalog() -> None:
    table = {name: row[1:] for row in rows(doc("docs/adapters.md")) for name in named(row[0])}
    expected = {
        adapter.name: [", ".join(f"`{base}`" for base in adapter.base), f"`{adapter.repo}`"]
        for adapter in load_catalog().adapters.values()
    }
    assert table == expected


def test_the_readme_s_tree_is_there() -> None:
    tree = README.split("## The tree")[1].split("```")[1].strip().splitlines()
    for line in tree:
        folder = ROOT / "src" / "jubako" if line.startswith("  ") else ROOT
        paths = line.strip() if "   " not in line.strip() else line.strip().split("   ")[0]
        for name in (*paths.split(), *re.findall(r"\w+\.py", line)):
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
    assert len(commands) == 8
    (tmp_path / "pictures").mkdir()
    for number, drawn in enumerate(FIVE):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(draw(drawn)))
    job = ""
    for command in commands:
        words = [word.replace("http://127.0.0.1:3000", served) for word in shlex.split(command)]
        words = [job if word == "JOB" else word for word in words]
        if words[0] == ".venv/bin/jubako" and words[1] != "models":
            words += ["--url", served]
        if words[1] == "train":
            words += ["--steps", "5"]  # whether it learns is another test's business
        words[0] = str(ROOT / words[0]) if words[0].startswith(".venv") else words[0]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if "/v1/jobs" in command:
            job = json.loads(done.stdout)["id"]
    names = ["circle.png", "clip.mp4", "job.mp4", "pictures", "sheet.png", "star.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    for name in ("circle.png", "star.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)
    for name in ("clip.mp4", "job.mp4"):
        with av.open(str(tmp_path / name)) as clip:
            assert [frame.width for frame in clip.decode(video=0)] == [64] * 8


def test_the_python_examples_run(served: str, tmp_path: Path) -> None:
    examples = [*blocks("python"), *blocks("python", doc("docs/jobs.md"))]
    assert len(examples) == 3
    told = [ran(example.replace("http://127.0.0.1:3000", served), tmp_path) for example in examples]
    names = ["moved.png", "ring-7.png", "ring-8.png", "triangle.mp4", "triangle.webp"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert "Seed: 7" in told[1]
    with av.open(str(tmp_path / "triangle.mp4")) as clip:
        assert float((clip.duration or 0) / av.time_base) == pytest.approx(2, abs=0.3)


def ran(code: str, folder: Path) -> str:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_job_and_the_event_of_the_api_s_page_look_like_real_ones(served: str) -> None:
    page = doc("docs/api.md")
    (shown,) = (json.loads(block) for block in blocks("json", section(page, "`GET /v1/jobs/{id}`")))
    with httpx.Client(base_url=served, timeout=60) as client:
        job = client.post("/v1/jobs", json={"task": "txt2img", "prompt": "a red circle", "steps": 20}).json()
        told = client.get(job["links"]["events"]).text
        done = client.get(job["links"]["self"]).json()
    assert done["state"] == "succeeded"
    assert shown.keys() == done.keys()
    assert shown["stage"].keys() == done["stage"].keys()
    described = named(section(page, "`GET /v1/jobs/{id}`"))
    assert {key for output in done["outputs"] for key in output} <= described
    (block,) = blocks("text", section(page, "`GET /v1/jobs/{id}/events`"))
    example = json.loads(block.partition("data: ")[2])
    events = [json.loads(line.removeprefix("data: ")) for line in told.splitlines() if "data: " in line]
    assert example.keys() in [event.keys() for event in events]
    assert {event["type"] for event in events} <= named(section(page, "`GET /v1/jobs/{id}/events`"))
