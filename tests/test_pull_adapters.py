"""`jubako pull` of the catalog's adapters, and `jubako adapters` before and after."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, Repository, hub, sha256
from lora_files import tiny_sd_lora
from program import COMMAND
from safetensors.torch import save

from jubako.adapters.store import AdapterStore
from jubako.catalog import load_catalog

REPO, FILE = "somebody/zog", "styles/zog.safetensors"
CATALOG = f"""
family: sd
adapters:
  zog:
    title: The zog
    base: [tiny-sd, sd1.5]
    repo: {REPO}
    file: {FILE}
    trigger: zog
    size_mb: 0.1
    licence: {{id: mine, url: "https://example.com/licence", commercial: "no", note: Ask me}}
"""


@dataclass(frozen=True)
class Machine:
    """A catalog, a cache and a home of its own, and the hub that it asks."""

    folder: Path
    hub: Hub

    @property
    def store(self) -> AdapterStore:
        return AdapterStore(self.folder / "home")

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit status and everything that was printed."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "JUBAKO_"))}
        environ = {
            **kept,
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "JUBAKO_HOME": str(self.folder / "home"),
            "JUBAKO_CATALOG": str(self.folder / "catalog"),
        }
        done = subprocess.run(
            [*COMMAND, *arguments], env=environ, capture_output=True, text=True, check=False, timeout=120
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    def listed(self) -> dict[str, Any]:
        status, printed = self.run("adapters", "list", "--json")
        assert status == 0, printed
        return {entry["name"]: entry for entry in json.loads(printed)}

    def written(self) -> list[str]:
        return [path.name for path in (self.folder / "home").rglob("*")]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_sd_lora(tmp_path_factory.mktemp("lora") / "zog.safetensors", 1).read_bytes()


@pytest.fixture
def machine(tmp_path: Path, lora: bytes) -> Iterator[Machine]:
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / "sd.yaml").write_text(CATALOG, encoding="utf-8")
    files = {FILE: lora, "README.md": b"read me", "other.safetensors": b"", "zog.bin": b"pickled"}
    with hub() as server:
        server.repositories[REPO] = Repository(files)
        yield Machine(tmp_path, server)


def test_an_adapter_comes_with_a_card_of_where_it_is_from(machine: Machine, lora: bytes) -> None:
    status, printed = machine.run("pull", "zog")
    assert status == 0, printed
    assert "The zog  somebody/zog\nLicence: mine, no commercial use  https://example.com/licence" in printed
    assert "zog is ready for tiny-sd, sd1.5\n" in printed
    assert machine.hub.fetched() == [FILE]
    adapter = machine.store.find("zog")
    assert adapter.sha256 == sha256(lora)
    assert adapter.card == {
        "base": "tiny-sd",
        "bases": ["tiny-sd", "sd1.5"],
        "title": "The zog",
        "trigger": "zog",
        "repo": REPO,
        "revision": "main",
        "file": FILE,
        "commit": machine.hub.repositories[REPO].commit,
        "licence": {
            "id": "mine",
            "url": "https://example.com/licence",
            "commercial": "no",
            "note": "Ask me",
            "acceptance": False,
        },
    }
    assert adapter.base == "tiny-sd"


def test_a_connection_that_breaks_off_is_taken_up_and_damage_is_thrown_away(
    machine: Machine, lora: bytes
) -> None:
    machine.hub.faults += ["damage"]
    status, printed = machine.run("pull", "zog")
    assert status == 1
    assert f"{FILE} arrived damaged and was thrown away" in printed
    assert machine.written() == []
    machine.hub.faults += ["break off"]
    assert machine.run("pull", "zog")[0] == 0
    assert machine.store.find("zog").sha256 == sha256(lora)


def test_one_that_is_here_is_not_fetched_again(machine: Machine) -> None:
    assert machine.run("pull", "zog")[0] == 0
    machine.hub.asked.clear()
    status, printed = machine.run("pull", "zog")
    assert status == 0
    assert f"here already, of commit {machine.hub.repositories[REPO].commit}" in printed
    assert machine.hub.asked == []
    assert machine.run("adapters", "remove", "zog")[0] == 0
    assert machine.run("pull", "zog")[0] == 0
    assert machine.hub.fetched() == [], "it was in the cache"


def test_one_of_the_user_s_own_is_not_replaced(machine: Machine, tmp_path: Path) -> None:
    machine.store.add("zog", tiny_sd_lora(tmp_path / "own.safetensors", 2))
    own = machine.store.find("zog").sha256
    status, printed = machine.run("pull", "zog")
    assert (status, machine.hub.asked) == (1, [])
    assert "there is an adapter 'zog' already; remove it first" in printed
    assert machine.store.find("zog").sha256 == own


def test_what_the_repository_has_not_or_is_no_lora_is_refused_and_nothing_is_taken_in(
    machine: Machine,
) -> None:
    import torch

    repository = machine.hub.repositories[REPO]
    repository.files[FILE] = save({"model.weight": torch.ones(2)})
    status, printed = machine.run("pull", "zog")
    assert status == 1
    assert "file: it holds neither tensors of a LoRA nor an embedding alone" in printed
    del repository.files[FILE]
    status, printed = machine.run("pull", "zog")
    assert status == 1
    assert f"{REPO} holds no {FILE}; its safetensors are: other.safetensors" in printed
    assert machine.written() == []


def test_one_that_does_not_fit_the_disk_is_not_begun(machine: Machine) -> None:
    machine.hub.repositories[REPO].claimed[FILE] = 10**17
    status, printed = machine.run("pull", "zog")
    assert status == 1
    assert "zog needs 100000000.0 GB more" in printed
    assert machine.hub.fetched() == []


def test_an_adapter_has_no_vendor_s_weights_and_a_near_name_is_told(machine: Machine) -> None:
    status, printed = machine.run("pull", "zog", "--weights", "nvidia")
    assert status == 1
    assert "weights: zog is an adapter, of which there is one file" in printed
    status, printed = machine.run("pull", "lcm-sd15")
    assert status == 1
    assert "there is no 'lcm-sd15' to pull. Did you mean 'lcm-sd1.5'? Models: tiny-sd" in printed


def test_those_that_are_not_here_are_listed_as_such(machine: Machine) -> None:
    before = machine.listed()
    assert before.keys() == load_catalog(machine.folder / "catalog").adapters.keys()
    assert not any(entry["here"] for entry in before.values())
    assert (before["zog"]["base"], before["zog"]["trigger"]) == ("tiny-sd", "zog")
    assert json.loads(machine.run("adapters", "show", "zog")[1]) == before["zog"]
    table = machine.run("adapters", "list")[1]
    assert "not here" in table
    assert "Fetch one that is not here with: jubako pull NAME" in table

    assert machine.run("pull", "zog")[0] == 0
    after = machine.listed()
    assert after.keys() == before.keys()
    assert [name for name, entry in after.items() if entry["here"]] == ["zog"]
    assert json.loads(machine.run("adapters", "show", "zog")[1]) == after["zog"]
