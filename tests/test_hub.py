"""`jubako pull` against a real HTTP server that speaks the hub's API."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from checkers import EVERYTHING, write_checker
from checkpoints import original
from entries import CPU, load, same
from hub import ADMITTED, STRANGER, Hub, Repository, hub, sha256
from PIL import Image
from pipelines import sd_pipeline
from program import COMMAND
from safetensors.torch import save_file
from server import free_port

from jubako.catalog import Model, load_catalog
from jubako.weights.components import ComponentStore
from jubako.weights.manifest import damaged
from jubako.weights.safety_checker import load_safety_checker
from jubako.weights.store import find_overlay, find_weights, read_record, size_on_disk

REPO = "somebody/tiny"
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
VAE = "vae/diffusion_pytorch_model.fp16.safetensors"
BASE, LIGHTNING = "somebody/base", "somebody/lightning"
UNET_FILE, LORA_FILE = "four_step_unet.safetensors", "four_step_lora.safetensors"


@dataclass(frozen=True)
class Machine:
    """Where a pull runs: a catalog, a cache and a record folder of its own, and the hub that it asks."""

    folder: Path
    endpoint: str
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return self.entry("sd1.5")

    def entry(self, name: str) -> Model:
        return load_catalog(self.folder / "catalog").model(name)

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

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [*COMMAND, "pull", *(arguments or ("sd1.5",))]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def pull(self, *arguments: str) -> tuple[int, str]:
        """Exit status and everything that was printed, in one line."""
        process = self.start(*arguments)
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

    pipeline = load(ComponentStore(), machine.model, machine.home).pipeline
    assert same(pipeline.unet, sd_pipeline(seed=2).unet)


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


@pytest.mark.parametrize("name", [UNET, "unet/config.json"])
def test_a_file_that_is_damaged_later_is_found_and_the_next_pull_mends_it(
    the_hub: Hub, machine: Machine, pipeline_files: dict[str, bytes], name: str
) -> None:
    the_hub.repositories[REPO] = Repository(pipeline_files)
    assert machine.pull()[0] == 0
    record = read_record(machine.home, machine.model)
    assert record is not None
    assert record.digests == {file: sha256(pipeline_files[file]) for file in record.files}
    path = record.folder / name
    spoiled = bytearray(path.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    path.resolve().write_bytes(spoiled)
    assert damaged(record.manifests, machine.home) == [path]
    the_hub.asked.clear()
    status, printed = machine.pull()
    assert status == 0, printed
    assert f"{path} is damaged and will be fetched again" in printed
    assert the_hub.fetched() == [name]
    assert path.read_bytes() == pipeline_files[name]
    assert damaged(record.manifests, machine.home) == []


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


@pytest.fixture
def lightning(the_hub: Hub, machine: Machine) -> Machine:
    """A machine whose catalog has a base, a denoiser to lay over it and a LoRA, in two repositories."""
    models = {
        "sdxl": {"weights": {"repo": BASE}},
        "sdxl-lightning-4step": {
            "weights": {"repo": BASE, "overlay": {"repo": LIGHTNING, "file": UNET_FILE}}
        },
        "sdxl-lightning-4step-lora": {
            "weights": {"repo": BASE, "overlay": {"repo": LIGHTNING, "file": LORA_FILE}}
        },
    }
    document = {"family": "sdxl", "models": models}
    (machine.folder / "catalog" / "sdxl.yaml").write_text(json.dumps(document))
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    base = {
        "model_index.json": json.dumps(index).encode(),
        "unet/config.json": b"{}",
        UNET: random.Random(1).randbytes(300_000),
        "vae/config.json": b"{ }",
        VAE: random.Random(2).randbytes(100_000),
    }
    the_hub.repositories[BASE] = Repository(base)
    others = {UNET_FILE: random.Random(3).randbytes(200_000), LORA_FILE: random.Random(4).randbytes(50_000)}
    the_hub.repositories[LIGHTNING] = Repository({**others, "README.md": b"light"})
    return machine


def test_an_overlay_comes_without_the_denoiser_that_it_replaces(the_hub: Hub, lightning: Machine) -> None:
    name = "sdxl-lightning-4step"
    status, printed = lightning.pull(name)
    assert status == 0, printed
    wanted = {"model_index.json", UNET_FILE, "unet/config.json", "vae/config.json", VAE}
    assert set(the_hub.fetched()) == wanted
    model = lightning.entry(name)
    record = read_record(lightning.home, model)
    assert record is not None
    assert record.overlay is not None
    assert (record.repo, record.commit) == (BASE, the_hub.repositories[BASE].commit)
    assert (record.overlay.repo, record.overlay.commit) == (LIGHTNING, the_hub.repositories[LIGHTNING].commit)
    assert find_weights(lightning.home, model) == record.folder
    overlay = find_overlay(lightning.home, model)
    assert overlay is not None
    assert sha256(overlay.read_bytes()) == sha256(the_hub.repositories[LIGHTNING].files[UNET_FILE])
    assert size_on_disk(lightning.home, model) == 300_000 + sum(
        len(the_hub.repositories[BASE].files[file]) for file in record.files if file.endswith(".json")
    )
    assert find_weights(lightning.home, lightning.entry("sdxl")) is None


def test_after_the_base_only_the_overlay_is_fetched(the_hub: Hub, lightning: Machine) -> None:
    assert lightning.pull("sdxl")[0] == 0
    the_hub.asked.clear()
    status, printed = lightning.pull("sdxl-lightning-4step-lora")
    assert status == 0, printed
    assert the_hub.fetched() == [LORA_FILE]
    assert "somebody/base" in printed
    assert "nothing of it to fetch" in printed
    for name in ("sdxl", "sdxl-lightning-4step-lora"):
        assert find_weights(lightning.home, lightning.entry(name)) is not None


def test_a_model_is_not_on_disk_without_its_whole_overlay(the_hub: Hub, lightning: Machine) -> None:
    name = "sdxl-lightning-4step"
    assert lightning.pull(name)[0] == 0
    overlay = find_overlay(lightning.home, lightning.entry(name))
    assert overlay is not None
    os.truncate(overlay, 1)
    assert find_overlay(lightning.home, lightning.entry(name)) is None
    assert find_weights(lightning.home, lightning.entry(name)) is None
    the_hub.asked.clear()
    assert lightning.pull(name)[0] == 0
    assert the_hub.fetched() == [UNET_FILE]
    assert find_weights(lightning.home, lightning.entry(name)) is not None


def test_motion_modules_come_with_the_config_beside_them(the_hub: Hub, lightning: Machine) -> None:
    overlay = {"repo": LIGHTNING, "file": "motion/modules.safetensors", "kind": "motion"}
    document = {"family": "video", "models": {"animatediff": {"weights": {"repo": BASE, "overlay": overlay}}}}
    (lightning.folder / "catalog" / "video.yaml").write_text(json.dumps(document))
    files = {"motion/modules.safetensors": b"modules", "motion/config.json": b"{}", "config.json": b"[]"}
    the_hub.repositories[LIGHTNING] = Repository(files)
    status, printed = lightning.pull("animatediff")
    assert status == 0, printed
    assert set(the_hub.fetched()) >= {UNET, VAE, "motion/modules.safetensors", "motion/config.json"}
    found = find_overlay(lightning.home, lightning.entry("animatediff"))
    assert found is not None
    assert found.with_name("config.json").read_bytes() == b"{}"


def test_an_original_file_brings_the_autoencoder_too(the_hub: Hub, lightning: Machine) -> None:
    overlay = {"repo": LIGHTNING, "file": UNET_FILE, "kind": "original"}
    document = {"family": "video", "models": {"sv3d-u": {"weights": {"repo": BASE, "overlay": overlay}}}}
    (lightning.folder / "catalog" / "video.yaml").write_text(json.dumps(document))
    status, printed = lightning.pull("sv3d-u", "--accept-licence")
    assert status == 0, printed
    assert set(the_hub.fetched()) == {"model_index.json", UNET_FILE, "unet/config.json", "vae/config.json"}


def test_an_overlay_that_the_hub_does_not_have_is_named(the_hub: Hub, lightning: Machine) -> None:
    del the_hub.repositories[LIGHTNING].files[UNET_FILE]
    status, printed = lightning.pull("sdxl-lightning-4step")
    assert status == 1
    assert f"{LIGHTNING} holds no {UNET_FILE}; its safetensors are: {LORA_FILE}" in printed
    the_hub.repositories[LIGHTNING].access = "gated"
    status, printed = lightning.pull("sdxl-lightning-4step-lora")
    assert status == 1
    assert f"{LIGHTNING} is only for those who accepted its terms" in printed
    assert find_weights(lightning.home, lightning.entry("sdxl-lightning-4step-lora")) is None


def test_a_gated_sd3_says_where_to_accept(
    the_hub: Hub, machine: Machine, random_files: dict[str, bytes]
) -> None:
    the_hub.repositories["stabilityai/stable-diffusion-3.5-medium"] = Repository(random_files, "gated")
    status, printed = machine.pull("sd3.5-medium", "--accept-licence")
    assert status == 1
    assert "Open https://huggingface.co/stabilityai/stable-diffusion-3.5-medium and accept them" in printed
    assert "HF_TOKEN" in printed


def test_a_licence_that_is_to_be_accepted_is_before_the_hub_is_asked(
    the_hub: Hub, machine: Machine, random_files: dict[str, bytes]
) -> None:
    the_hub.repositories["stabilityai/sd-turbo"] = Repository(random_files)
    licence = machine.entry("sd-turbo").licence
    status, printed = machine.pull("sd-turbo")
    assert status == 1
    assert f"jubako: model: sd-turbo is under the licence {licence.id}" in printed
    assert licence.url in printed
    assert "adds sai-nc-community to JUBAKO_ACCEPTED_LICENCES, or pulls it with --accept-licence" in printed
    assert not the_hub.asked
    status, printed = machine.pull("sd-turbo", "--accept-licence")
    assert status == 0, printed
    assert "To serve it, add sai-nc-community to JUBAKO_ACCEPTED_LICENCES" in printed
    settled = replace(machine, environ={**machine.environ, "JUBAKO_ACCEPTED_LICENCES": "sai-nc-community"})
    status, printed = settled.pull("sd-turbo")
    assert status == 0, printed
    assert "To serve it" not in printed
    misspelt = replace(machine, environ={**machine.environ, "JUBAKO_ACCEPTED_LICENCES": "sai-nc-comunity"})
    status, printed = misspelt.pull("sd1.5")
    assert status == 1
    assert "nothing in the catalog is under 'sai-nc-comunity'. Did you mean 'sai-nc-community'?" in printed


def test_a_safety_checker_comes_as_safetensors_and_loads(
    the_hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    entry = load_catalog().checkers["safety-checker"]
    files = {path.name: path.read_bytes() for path in write_checker(tmp_path / "made", EVERYTHING).iterdir()}
    the_hub.repositories[str(entry.repo)] = Repository(files | {"pytorch_model.bin": b"pickled"})
    status, printed = machine.pull("safety-checker")
    assert status == 0, printed
    assert "creativeml-openrail-m" in printed
    assert sorted(the_hub.fetched()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert load_safety_checker(entry, machine.home, CPU).flags([Image.new("RGB", (64, 64))]) == [True]
    del files["model.safetensors"]
    the_hub.repositories[str(entry.repo)] = Repository(files | {"pytorch_model.bin": b"pickled"})
    status, printed = machine.pull("safety-checker")
    assert status == 1
    assert "holds no model.safetensors" in printed


def test_a_file_of_the_users_gets_configs_and_no_weights(
    the_hub: Hub, machine: Machine, pipeline_files: dict[str, bytes]
) -> None:
    """The file is one checkpoint; what is fetched for it is what the model of its size has beside weights."""
    base = machine.entry("sd1.5")
    checkpoint = original(sd_pipeline(seed=3))
    size = sum(tensor.numel() for name, tensor in checkpoint.items() if name.startswith("model."))
    save_file(checkpoint, machine.folder / "dreamy.safetensors")
    mine = base.model_dump(mode="json", exclude={"name", "family", "weights", "moved_from"})
    mine["weights"] = {
        "file": "../dreamy.safetensors",
        "components_left_out": base.weights.components_left_out,
    }
    models = {
        "sd1.5": {"parameters": size, "weights": {"repo": REPO}},
        "dreamy": {**mine, "parameters": size},
    }
    (machine.folder / "catalog" / "sd.yaml").write_text(json.dumps({"family": "sd", "models": models}))
    the_hub.repositories[REPO] = Repository(pipeline_files)
    assert find_weights(machine.home, machine.entry("dreamy")) is None

    status, printed = machine.pull("dreamy")
    assert status == 0, printed
    assert "Configs and tokenizers: those of sd1.5" in printed
    assert not [name for name in the_hub.fetched() if name.endswith((".safetensors", ".bin"))]
    assert "tokenizer/tokenizer.json" in the_hub.fetched()
    assert find_weights(machine.home, machine.entry("dreamy")) == machine.folder / "dreamy.safetensors"
    assert find_weights(machine.home, machine.entry("sd1.5")) is None
    pipeline = load(ComponentStore(), machine.entry("dreamy"), machine.home).pipeline
    assert same(pipeline.unet, sd_pipeline(seed=3).unet)
    assert same(pipeline.text_encoder, sd_pipeline(seed=3).text_encoder)


def test_a_file_that_is_not_there_is_named(machine: Machine) -> None:
    models = {"sdxl": {"weights": {"overlay": {"file": "none.safetensors"}}}}
    (machine.folder / "catalog" / "sdxl.yaml").write_text(json.dumps({"family": "sdxl", "models": models}))
    status, printed = machine.pull("sdxl")
    assert status == 1
    assert f"sdxl needs {machine.folder / 'catalog' / 'none.safetensors'}, which is not there" in printed


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
