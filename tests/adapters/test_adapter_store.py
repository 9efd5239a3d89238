"""What is taken in as an adapter and what is not, and that names are no paths."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from program import jubako
from safetensors.torch import save_file

from jubako.adapters.store import AdapterStore
from jubako.errors import InvalidRequest, UnknownAdapter
from jubako.weights import checkpoint

LORA = {
    "unet.mid_block.to_q.lora_A.weight": torch.ones(2, 4),
    "unet.mid_block.to_q.lora_B.weight": torch.ones(4, 2),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(LORA, tmp_path / "zog.safetensors")
    return tmp_path / "zog.safetensors"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def written(home: Path) -> list[str]:
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())


def test_a_file_is_copied_and_found_by_name(file: Path, home: Path) -> None:
    store = AdapterStore(home)
    added = store.add("zog", file, {"base": "tiny-sd"})
    assert store.find("zog") == added
    assert [(each.name, each.card, each.sha256) for each in store] == [
        ("zog", {"base": "tiny-sd"}, added.sha256)
    ]
    assert written(home) == ["adapters/zog/adapter.safetensors", "adapters/zog/card.json"]
    store.remove("zog")
    assert list(store) == []


def test_one_that_was_put_there_is_found(file: Path, home: Path) -> None:
    (home / "adapters").mkdir(parents=True)
    file.rename(home / "adapters" / "put.safetensors")
    assert [each.name for each in AdapterStore(home)] == ["put"]
    AdapterStore(home).remove("put")
    assert written(home) == []


@pytest.mark.parametrize("name", ["../zog", "/etc/passwd", "a/b", ".hidden", "", "x" * 65, "zog\n", "zög"])
def test_names_are_no_paths(file: Path, home: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is no name; take letters"):
        AdapterStore(home).add(name, file)
    with pytest.raises(UnknownAdapter, match="there is no adapter"):
        AdapterStore(home).find(name)
    assert not home.exists()


def test_what_is_no_lora_is_refused_and_nothing_is_written(tmp_path: Path, home: Path) -> None:
    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    claims = tmp_path / "claims.safetensors"
    claims.write_bytes((2 * 2**30).to_bytes(8, "little") + b"{}")
    other = tmp_path / "other.safetensors"
    save_file({"model.layer.weight": torch.ones(2)}, other)
    torn = tmp_path / "torn.safetensors"
    save_file(LORA, torn)
    torn.write_bytes(torn.read_bytes()[:20])
    for file in (pickled, claims, torn):
        with pytest.raises(InvalidRequest, match="no safetensors file, or a torn one"):
            AdapterStore(home).add("zog", file)
    with pytest.raises(InvalidRequest, match="missing can't be read: No such file"):
        AdapterStore(home).add("zog", tmp_path / "missing")
    with pytest.raises(InvalidRequest, match="holds no tensors of a LoRA"):
        AdapterStore(home).add("zog", other)
    assert not home.exists()


def test_a_name_is_given_once(file: Path, home: Path) -> None:
    AdapterStore(home).add("zog", file)
    with pytest.raises(InvalidRequest, match="there is an adapter 'zog' already"):
        AdapterStore(home).add("zog", file)


def test_a_name_may_look_like_a_file_s(file: Path, home: Path) -> None:
    store = AdapterStore(home)
    store.add("zog.safetensors", file)
    assert [each.name for each in store] == ["zog.safetensors"]
    store.remove("zog.safetensors")
    assert list(store) == []


def test_one_that_is_removed_by_two_is_unknown_to_the_second(file: Path, home: Path) -> None:
    AdapterStore(home).add("zog", file)

    def removed(_: int) -> bool:
        try:
            AdapterStore(home).remove("zog")
        except UnknownAdapter:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(removed, range(8))) == [False] * 7 + [True]
    assert written(home) == []


def test_a_file_is_read_once_however_many_ask_for_its_digest(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * 50_000_000)
    before = checkpoint._digest.cache_info().misses
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(checkpoint.digest, [big] * 8))) == 1
    assert checkpoint._digest.cache_info().misses == before + 1
    big.write_bytes(b"y" * 50_000_000)
    checkpoint.digest(big)
    assert checkpoint._digest.cache_info().misses == before + 2


@pytest.mark.parametrize(
    ("card", "base"),
    [({"base": "sd1.5"}, "sd1.5"), ({"base": {"model": "tiny-sd", "commit": "a"}}, "tiny-sd"), ({}, None)],
)
def test_a_card_says_the_base_by_its_name_or_with_more_about_it(
    file: Path, home: Path, card: dict[str, object], base: str | None
) -> None:
    assert AdapterStore(home).add("zog", file, card).base == base


def test_the_command_line_adds_lists_shows_and_removes(file: Path, tmp_path: Path) -> None:
    added = jubako("adapters", "add", str(file), "--base", "tiny-sd", "--trigger", "zog", tmp_path=tmp_path)
    assert added.stdout == 'zog is ready: "<lora:zog:1>" in a prompt, or loras=[{name, weight}]\n'
    found = json.loads(jubako("adapters", "list", "--json", tmp_path=tmp_path).stdout)
    listed = [each for each in found if each["here"]]
    assert [(each["name"], each["base"], each["trigger"]) for each in listed] == [("zog", "tiny-sd", "zog")]
    shown = jubako("adapters", "show", "zog", tmp_path=tmp_path)
    assert json.loads(shown.stdout) == listed[0]
    assert "zog" in jubako("adapters", "list", tmp_path=tmp_path).stdout
    assert jubako("adapters", "remove", "zog", tmp_path=tmp_path).stdout == "zog is removed\n"
    assert "zog" not in jubako("adapters", "list", tmp_path=tmp_path).stdout
    gone = jubako("adapters", "show", "zog", tmp_path=tmp_path)
    assert (gone.returncode, gone.stderr) == (1, "jubako: there is no adapter 'zog'. Known: none\n")
