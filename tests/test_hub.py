"""`jubako pull` against a real HTTP server that speaks the hub's API."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import ADMITTED, STRANGER, Hub, Repository, hub, sha256
from pipelines import sd_pipeline
from program import COMMAND
from server import free_port

from jubako.catalog import Model, load_catalog
from jubako.weights.standard import load_pipeline
from jubako.weights.store import find_weights, read_record

REPO = "somebody/tiny"
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"


@dataclass(frozen=True)
class Machine:
    """Where a pull runs: a catalog, a cache and a record folder of its own, and the hub that it asks."""

    folder: Path
    endpoint: str
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return load_catalog(self.folder / "catalog").model("sd1.5")

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "JUBAKO_"))}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(self.folder / "hf"),
            "JUBAKO_HOME": str(self.home),
            "JUBAKO_CATALOG": str(self.folder / "catalog"),
            **self.environ,
        }

    def start(self, name: str = "sd1.5") -> subprocess.Popen[str]:
        command = [*COMMAND, "pull", name]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def pull(self, name: str = "sd1.5") -> tuple[int, str]:
        """Exit status and everything that was printed, in one line."""
        process = self.start(name)
        printed = "".join(process.communicate(timeout=120))
        assert "Traceback" not in printed, printed
        return process.returncode, " ".join(printed.split())

    def partials(self) -> list[Path]:
        return list((self.folder / "hf").rglob("*.incomplete"))


@pytest.fixture
def the_hub() -> Iterator[Hub]:
    with hub() as server:
        yield server


@pytest.fixture
def machine(the_hub: Hub, tmp_path: Path) -> Machine:
    return machine_for(tmp_path, the_hub.url)


def machine_for(folder: Path, endpoint: str, **environ: str) -> Machine:
    catalog = folder / "catalog"
    catalog.mkdir(exist_ok=True)
    document = {"family": "sd", "models": {"sd1.5": {"weights": {"repo": REPO}}}}
    (catalog / "sd.yaml").write_text(json.dumps(document))
    return Machine(folder, endpoint, environ)


@pytest.fixture(scope="module")
def pipeline_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A random pipeline in two variants with the clutter of real repositories. The variants differ."""
    folder = tmp_path_factory.mktemp("repository")
    sd_pipeline(seed=1).save_pretrained(folder)
    sd_pipeline(seed=2).save_pretrained(folder, variant="fp16")
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    index = json.loads(files["model_index.json"])
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    pickles = ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "vae/model.onnx"]
    others = [
        "v1-5-pruned.safetensors",
        "v1-5.ckpt",
        "README.md",
        "unet/evil.py",
        "safety_checker/config.json",
    ]
    others += ["safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"]
    clutter = {name: f"not {name}".encode() for name in pickles + others}
    return {**files, **clutter, "model_index.json": json.dumps(index).encode()}


@pytest.fixture(scope="module")
def random_files() -> dict[str, bytes]:
    """A repository that nothing can load, with one file big enough to be broken off."""
    index = {"unet": ["diffusers", "UNet2DConditionModel"]}
    return {
        "model_index.json": json.dumps(index).encode(),
        "unet/config.json": b"{}",
        UNET: random.Random(0).randbytes(4_000_000),
    }


def test_a_pull_brings_a_pipeline_that_loads_and_nothing_else(
    the_hub: Hub, machine: Machine, pipeline_files: dict[str, bytes]
) -> None:
    the_hub.repositories[REPO] = repository = Repository(pipeline_files)
    status, printed = machine.pull()
    assert status == 0, printed
    assert "creativeml-openrail-m, commercial use is allowed under conditions" in printed
    assert "the use restrictions of the licence's attachment A" in printed

    plain_twins = {name.replace(".fp16", "") for name in pipeline_files if ".fp16." in name}
    wanted = {
        name
        for name in pipeline_files
        if pipeline_files[name] != f"not {name}".encode() and name not in plain_twins
    }
    assert set(the_hub.fetched()) == wanted
    assert len(the_hub.fetched()) == len(wanted), "a file was fetched twice"

    record = read_record(machine.home, machine.model)
    assert record is not None
    assert record.commit == repository.commit
    assert record.files == {name: len(pipeline_files[name]) for name in wanted}
    asked = [request.path for request in the_hub.asked if "/resolve/" in request.path]
    assert all(f"/resolve/{repository.commit}/" in path for path in asked), "another revision was asked for"

    folder = find_weights(machine.home, machine.model)
    assert folder is not None
    pipeline = load_pipeline(folder, machine.model, torch.device("cpu"), torch.float32)
    expected = sd_pipeline(seed=2).unet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.unet.state_dict().items())


def test_a_second_pull_fetches_nothing(
    the_hub: Hub, machine: Machine, random_files: dict[str, bytes]
) -> None:
    the_hub.repositories[REPO] = Repository(random_files)
    assert machine.pull()[0] == 0
    the_hub.asked.clear()
    status, printed = machine.pull()
    assert status == 0
    assert "nothing of it to fetch" in printed
    assert the_hub.fetched() == []


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(
    the_hub: Hub, machine: Machine, random_files: dict[str, bytes]
) -> None:
    the_hub.repositories[REPO] = Repository(random_files)
    the_hub.faults.append("break off")
    status, printed = machine.pull()
    assert status == 0, printed
    assert the_hub.fetched().count(UNET) == 2
    half = len(random_files[UNET]) // 2
    assert ranges(the_hub) == [None, half]
    assert weights_on_disk(machine) == sha256(random_files[UNET])


def test_a_pull_that_was_killed_goes_on_where_it_was(
    the_hub: Hub, machine: Machine, random_files: dict[str, bytes]
) -> None:
    the_hub.repositories[REPO] = Repository(random_files)
    the_hub.faults.append("stall")
    half = len(random_files[UNET]) // 2
    process = machine.start()
    assert the_hub.stalled.wait(60)
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size for path in machine.partials()) < half and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert find_weights(machine.home, machine.model) is None
    assert [path.stat().st_size for path in machine.partials()] == [half]

    the_hub.asked.clear()
    status, printed = machine.pull()
    assert status == 0, printed
    assert "4.0 MB, 2.0 MB of it to fetch" in printed
    assert the_hub.fetched() == [UNET]
    assert ranges(the_hub) == [half]
    assert weights_on_disk(machine) == sha256(random_files[UNET])
    assert machine.partials() == []


def test_a_file_that_arrives_damaged_is_not_kept(
    the_hub: Hub, machine: Machine, random_files: dict[str, bytes]
) -> None:
    the_hub.repositories[REPO] = Repository(random_files)
    the_hub.faults.append("damage")
    status, printed = machine.pull()
    assert status == 1
    assert f"{UNET} arrived damaged" in printed
    assert find_weights(machine.home, machine.model) is None
    assert machine.pull()[0] == 0
    assert weights_on_disk(machine) == sha256(random_files[UNET])


def test_a_torn_file_is_not_on_disk_and_the_next_pull_mends_it(
    the_hub: Hub, machine: Machine, random_files: dict[str, bytes]
) -> None:
    the_hub.repositories[REPO] = Repository(random_files)
    assert machine.pull()[0] == 0
    folder = find_weights(machine.home, machine.model)
    assert folder is not None
    for name in (UNET, "unet/config.json", "model_index.json"):
        os.truncate(folder / name, 1)
    assert find_weights(machine.home, machine.model) is None
    the_hub.asked.clear()
    assert machine.pull()[0] == 0
    assert sorted(the_hub.fetched()) == ["model_index.json", "unet/config.json", UNET]
    assert find_weights(machine.home, machine.model) == folder
    assert weights_on_disk(machine) == sha256(random_files[UNET])


def test_the_token_reaches_the_hub_and_not_the_host_of_the_big_files(
    the_hub: Hub, tmp_path: Path, random_files: dict[str, bytes]
) -> None:
    the_hub.repositories[REPO] = Repository(random_files, "gated")
    status, printed = machine_for(tmp_path, the_hub.url, HF_TOKEN=ADMITTED).pull()
    assert status == 0, printed
    sent = {(asked.host, asked.headers.get("authorization")) for asked in the_hub.asked}
    assert sent == {("127.0.0.1", f"Bearer {ADMITTED}"), ("localhost", None)}


@pytest.mark.parametrize(
    ("access", "token", "told"),
    [
        ("gated", "", r"Open https://huggingface.co/somebody/tiny and accept .* set HF_TOKEN"),
        ("gated", STRANGER, r"your account has not been let in .* https://huggingface.co/somebody/tiny"),
        ("open", "hf_wrong", r"does not accept your token; .* https://huggingface.co/settings/tokens"),
        ("private", "", r"no somebody/tiny for you \(401\).* earlier names: runwayml/stable-diffusion-v1-5"),
        ("private", STRANGER, r"no somebody/tiny for you \(404\).* was removed, or has moved again"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    *, the_hub: Hub, tmp_path: Path, random_files: dict[str, bytes], access: Any, token: str, told: str
) -> None:
    the_hub.repositories[REPO] = Repository(random_files, access)
    status, printed = machine_for(tmp_path, the_hub.url, HF_TOKEN=token).pull()
    assert status == 1
    assert re.search(told, printed), printed
    assert UNET not in the_hub.fetched()


def test_a_component_with_pickles_only_is_refused_before_anything_big_comes(
    the_hub: Hub, machine: Machine, pipeline_files: dict[str, bytes]
) -> None:
    files = {name: c for name, c in pipeline_files.items() if not re.fullmatch(r"unet/.*safetensors", name)}
    the_hub.repositories[REPO] = Repository(files)
    status, printed = machine.pull()
    assert status == 1
    assert "the component unet has no safetensors to take, only diffusion_pytorch_model.bin" in printed
    assert the_hub.fetched() == ["model_index.json"]


def test_a_model_that_does_not_fit_the_disk_is_not_begun(
    the_hub: Hub, machine: Machine, random_files: dict[str, bytes]
) -> None:
    the_hub.repositories[REPO] = Repository(random_files, claimed={UNET: 10**17})
    status, printed = machine.pull()
    assert status == 1
    assert re.search(r"sd1.5 needs 100000000.0 GB more, but the disk of \S+ has [\d.]+ GB free", printed)
    assert the_hub.fetched() == ["model_index.json"]


def test_without_a_network_that_is_what_is_said(tmp_path: Path) -> None:
    status, printed = machine_for(tmp_path, f"http://127.0.0.1:{free_port()}").pull()
    assert status == 1
    assert "no answer from http://127.0.0.1" in printed
    assert "HTTPS_PROXY" in printed


def test_an_offline_setting_is_named(tmp_path: Path) -> None:
    status, printed = machine_for(tmp_path, "http://127.0.0.1:1", HF_HUB_OFFLINE="1").pull()
    assert status == 1
    assert "HF_HUB_OFFLINE is set" in printed


def test_an_embedded_model_ships_with_jubako(machine: Machine) -> None:
    assert machine.pull("tiny-sd") == (0, "tiny-sd ships with Jubako: there is nothing to fetch")


def test_an_unknown_model_lists_the_known_ones(machine: Machine) -> None:
    status, printed = machine.pull("sd15")
    assert status == 1
    assert "Did you mean 'sd1.5'?" in printed


def ranges(the_hub: Hub) -> list[int | None]:
    """From which byte each request for a big file asked, None for all of it."""
    asked = [request.headers.get("range") for request in the_hub.asked if request.host == "localhost"]
    return [int(value.removeprefix("bytes=").removesuffix("-")) if value else None for value in asked]


def weights_on_disk(machine: Machine) -> str:
    """The SHA-256 of the big file: pytest would compare the bytes themselves for minutes."""
    folder = find_weights(machine.home, machine.model)
    assert folder is not None
    return sha256((folder / UNET).read_bytes())
