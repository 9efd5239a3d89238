"""What is taken in as an adapter and what is not, and that names are no paths."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from embedding_files import embedding_file
from program import jubako
from safetensors.torch import save_file

from jubako.adapters.store import KINDS, AdapterStore
from jubako.catalog import load_catalog
from jubako.errors import InvalidRequest, UnknownAdapter
from jubako.job import Job, LoraUse
from jubako.planning import plan
from jubako.request import TextToImage
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


def test_what_is_no_adapter_is_refused_and_nothing_is_written(tmp_path: Path, home: Path) -> None:
    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    claims = tmp_path / "claims.safetensors"
    claims.write_bytes((2 * 2**30).to_bytes(8, "little") + b"{}")
    other = tmp_path / "other.safetensors"
    save_file({"model.layer.weight": torch.ones(2)}, other)
    layers = embedding_file(tmp_path / "layers.safetensors", a=(2, 32), b=(2, 32))
    volume = embedding_file(tmp_path / "volume.safetensors", emb_params=(2, 2, 32))
    whole = tmp_path / "whole.safetensors"
    save_file({"emb_params": torch.ones(2, 32, dtype=torch.int64)}, whole)
    odd = tmp_path / "odd.safetensors"
    header = b'{"zog": {"dtype": 1, "shape": ["x"], "data_offsets": [0, 4]}}'
    odd.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    torn = tmp_path / "torn.safetensors"
    save_file(LORA, torn)
    torn.write_bytes(torn.read_bytes()[:20])
    for file in (pickled, claims, odd, torn):
        with pytest.raises(InvalidRequest, match="no safetensors file, or a torn one"):
            AdapterStore(home).add("zog", file)
    with pytest.raises(InvalidRequest, match="missing can't be read: No such file"):
        AdapterStore(home).add("zog", tmp_path / "missing")
    for file in (other, layers, volume, whole):
        with pytest.raises(InvalidRequest, match="holds neither tensors of a LoRA nor an embedding alone"):
            AdapterStore(home).add("zog", file)
    assert not home.exists()


@pytest.mark.parametrize(
    "shapes",
    [
        {"<zog>": (4, 32)},
        {"zog": (32,)},
        {"emb_params": (2, 32)},
        {"clip_l": (2, 32), "clip_g": (2, 48)},
        {"clip_l": (2, 32)},
    ],
    ids=["diffusers", "one vector", "AUTOMATIC1111", "SDXL", "one encoder"],
)
def test_embeddings_are_told_from_loras_by_their_header(
    file: Path, home: Path, tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    store = AdapterStore(home)
    assert store.add("lora", file).kind == "lora"
    assert store.add("words", embedding_file(tmp_path / "x.safetensors", **shapes)).kind == "embedding"
    with pytest.raises(InvalidRequest, match=r"^loras: 'words' is of the kind embedding. Known: lora$"):
        store.wanted("words", "lora")
    with pytest.raises(InvalidRequest, match=r"^embeddings: 'lora' is of the kind lora. Known: words$"):
        store.wanted("lora", "embedding")
    with pytest.raises(InvalidRequest, match=r"^embeddings: there is no adapter 'word'.* Known: words$"):
        store.wanted("word", "embedding")


@pytest.fixture
def words(file: Path, home: Path, tmp_path: Path) -> AdapterStore:
    """A LoRA, and embeddings whose words are zog, <plim> and plim-xl."""
    store, vectors = AdapterStore(home), embedding_file(tmp_path / "x.safetensors", x=(2, 32))
    store.add("lora", file)
    store.add("zog", vectors)
    store.add("plim", vectors, {"trigger": "<plim>"})
    store.add("plim-xl", vectors)
    return store


def planned(prompt: str, **fields: object) -> Job:
    return plan(TextToImage.model_validate({"prompt": prompt, **fields}), load_catalog())


@pytest.mark.parametrize(
    ("prompt", "listed", "tagged"),
    [
        ("A Zog, not zogs or zog-like, by a zog.", ["zog"], "A {zog}, not zogs or zog-like, by a {zog}."),
        ("<plim> plim zog", ["plim"], "{plim} plim zog"),
        ("a plim-xl and a <PLIM>", ["plim", "plim-xl"], "a {plim-xl} and a {plim}"),
        ("zog {zog}", [], "zog {zog}"),
        ("zog {zog}", ["zog"], "zog {zog}"),
        ("zog{plim-xl}zog", ["zog"], "{zog}{plim-xl}{zog}"),
    ],
)
def test_a_listed_embedding_stands_where_its_word_is_and_a_tagged_one_where_its_tags_are(
    words: AdapterStore, prompt: str, listed: list[str], tagged: str
) -> None:
    def with_tags(text: str) -> str:
        return text.replace("{", "<embedding:").replace("}", ">")

    job = planned(with_tags(prompt), embeddings=listed, negative_prompt="zog")
    found = words.resolved(job)
    assert found.prompt == with_tags(tagged)
    assert found.negative_prompt == (
        "<embedding:zog>" if "zog" in listed and "{zog}" not in prompt else "zog"
    )
    assert all(use.sha256 == words.find(use.name).sha256 for use in found.embeddings)
    assert words.resolved(found) == found


def test_what_was_trained_here_goes_by_its_trigger_whatever_its_kind(words: AdapterStore, file: Path) -> None:
    card = {"base": "tiny-sd", "trigger": "zig", "automatic": True}
    words.add("layers", file, card)
    words.add("vectors", words.find("zog").file, card)
    job = planned("a zig, not a <embedding:zig.zag>", negative_prompt="zig")
    both = words.with_triggered(job, KINDS)
    assert [use.name for use in both.loras] == ["layers"]
    assert [use.name for use in both.embeddings] == ["zig.zag", "vectors"]
    assert "vectors is used, since its trigger is in the prompt; `embeddings: []`" in both.warnings[1]
    one = words.resolved(words.with_triggered(planned("a ZIG"), ["embedding"]))
    assert (one.prompt, one.loras) == ("a <embedding:vectors>", ())
    words.add("again", words.find("zog").file, card)
    twice = words.resolved(words.with_triggered(planned("a zig"), ["embedding"]))
    assert twice.prompt == "a <embedding:again><embedding:vectors>"
    words.remove("again")
    for text in ("a star", "a <embedding:zig.zag>", "a <embedding:vectors> and a <embedding:layers>"):
        job = planned(text)
        assert words.with_triggered(job, KINDS) == job


def test_embeddings_that_stand_nowhere_or_are_none_are_refused(words: AdapterStore) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^embeddings: '<plim>', the word of plim, is in neither prompt"
    ):
        words.resolved(planned("a plim", embeddings=["plim"]))
    with pytest.raises(
        InvalidRequest, match=r"^embeddings: there is no adapter 'zig'.* Known: plim, plim-xl"
    ):
        words.resolved(planned("a <embedding:zig>"))
    with pytest.raises(InvalidRequest, match=r"^embeddings: 'lora' is of the kind lora"):
        words.resolved(planned("a <embedding:lora>"))
    job = planned("a star").model_copy(update={"loras": (LoraUse(name="zog", weight=1),)})
    with pytest.raises(InvalidRequest, match=r"^loras: 'zog' is of the kind embedding. Known: lora"):
        words.resolved(job)


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


def test_the_command_line_says_how_an_embedding_is_used(tmp_path: Path) -> None:
    file = embedding_file(tmp_path / "zig.safetensors", zig=(2, 32))
    added = jubako("adapters", "add", str(file), "--trigger", "<zig>", tmp_path=tmp_path)
    assert added.stdout == 'zig is ready: "<embedding:zig>" in a prompt, or "<zig>" and embeddings=[name]\n'
    assert json.loads(jubako("adapters", "show", "zig", tmp_path=tmp_path).stdout)["kind"] == "embedding"
    assert "embedding" in jubako("adapters", "list", tmp_path=tmp_path).stdout


def test_the_command_line_adds_lists_shows_and_removes(file: Path, tmp_path: Path) -> None:
    added = jubako("adapters", "add", str(file), "--base", "tiny-sd", "--trigger", "zog", tmp_path=tmp_path)
    assert added.stdout == 'zog is ready: "<lora:zog:1>" in a prompt, or loras=[{name, weight}]\n'
    found = json.loads(jubako("adapters", "list", "--json", tmp_path=tmp_path).stdout)
    listed = [each for each in found if each["here"]]
    facts = [(each["name"], each["kind"], each["base"], each["trigger"]) for each in listed]
    assert facts == [("zog", "lora", "tiny-sd", "zog")]
    shown = jubako("adapters", "show", "zog", tmp_path=tmp_path)
    assert json.loads(shown.stdout) == listed[0]
    assert "zog" in jubako("adapters", "list", tmp_path=tmp_path).stdout
    assert jubako("adapters", "remove", "zog", tmp_path=tmp_path).stdout == "zog is removed\n"
    assert "zog" not in jubako("adapters", "list", tmp_path=tmp_path).stdout
    gone = jubako("adapters", "show", "zog", tmp_path=tmp_path)
    assert (gone.returncode, gone.stderr) == (1, "jubako: there is no adapter 'zog'. Known: none\n")
