"""The cache of engines, with processes that race for it, are killed in it and find damage in it.

The builder writes files as a provider does, in place and in several writes; nothing here compiles anything.
Run as a program, this file is one process that wants an engine.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from jubako.weights.engines import EngineKey, EngineStore, ShapeRange, UnknownEngine

QUOTA = 10**9
SIZE = 3000
SHAPES = {"sample": ShapeRange((1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 32, 32))}


def key(**changed: object) -> EngineKey:
    facts: dict[str, object] = {
        "graph": "a" * 64,
        "data": ("b" * 64,),
        "onnxruntime": "1.31.1",
        "provider": "tensorrt",
        "provider_version": "10.13.3",
        "gpu": "NVIDIA L4",
        "architecture": "sm_89",
        "driver": "580.65.06",
        "toolkit": "13",
        "shapes": SHAPES,
        "options": {"trt_fp16_enable": "True"},
        "system": "Linux x86_64",
    }
    return EngineKey.model_validate(facts | changed)


class Torn(Exception):
    """What a provider says about a file that it can't use."""


class Session:
    """Reads the engine when it is made; a session that finds none builds one, in place."""

    def __init__(self, directory: Path, log: Path | None = None, seconds: float = 0.2) -> None:
        self.closed = False
        engine = directory / "graph_0_sm89.engine"
        if not engine.exists():
            _note(log, "build")
            with engine.open("wb") as file:
                for chunk in range(10):
                    file.write(bytes([chunk]) * (SIZE // 10))
                    file.flush()
                    time.sleep(seconds / 10)
            (directory / "graph.timing").write_bytes(b"timing")
        self.content = engine.read_bytes()
        if len(self.content) != SIZE:
            raise Torn(f"{engine} has {len(self.content)} bytes")
        _note(log, "read")

    def close(self) -> None:
        self.closed = True


def _note(log: Path | None, word: str) -> None:
    if log is not None:
        with log.open("a") as file:
            file.write(f"{word}\n")


def notes(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@contextmanager
def wanting(root: Path, log: Path, seconds: float = 0.2) -> Iterator[subprocess.Popen[str]]:
    """A process that wants the engine from when it is told to go until its input ends."""
    command = [sys.executable, __file__, str(root), str(log), str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(*processes: subprocess.Popen[str]) -> None:
    """Let them begin at once, when all have started."""
    assert [answer(process) for process in processes] == ["ready"] * len(processes)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=30)
    return process.returncode


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it has not come to that within a minute"
        time.sleep(0.01)


def build(store: EngineStore, name: str, model: str = "sdxl") -> str:
    """Build an engine and close it; its digest."""
    wanted = key(graph=name)
    store.session(wanted, lambda at: Session(at, seconds=0), model=model, slot="unet").close()
    time.sleep(0.02)  # so that times of use differ by more than a clock's tick
    return wanted.digest


def digests(store: EngineStore) -> set[str]:
    return {entry.digest for entry in store.entries()}


def directories(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name not in {"locks", "users"})


def test_an_engine_is_built_once_and_then_read(tmp_path: Path) -> None:
    store, log = EngineStore(tmp_path, QUOTA), tmp_path.with_suffix(".log")
    first = store.session(key(), lambda at: Session(at, log), model="sdxl", slot="unet")
    second = EngineStore(tmp_path, QUOTA).session(
        key(), lambda at: Session(at, log), model="sdxl", slot="unet"
    )
    assert (first.built, second.built) == (True, False)
    assert first.directory == second.directory == tmp_path / key().digest
    assert first.session.content == second.session.content
    assert notes(log) == ["build", "read", "read", "read"]  # the builder's own, and one for each of the two
    assert directories(tmp_path) == [key().digest]


def test_the_session_that_built_is_closed_before_the_one_that_reads_is_made(tmp_path: Path) -> None:
    made: list[Session] = []

    def make(directory: Path) -> Session:
        assert all(session.closed for session in made)
        made.append(Session(directory, seconds=0))
        return made[-1]

    engine = EngineStore(tmp_path, QUOTA).session(key(), make, model="sdxl", slot="unet")
    assert [session.closed for session in made] == [True, False]
    engine.close()
    assert made[-1].closed


def test_the_record_tells_what_was_built(tmp_path: Path) -> None:
    store, before = EngineStore(tmp_path, QUOTA), time.time()
    digest = build(store, "a", model="sd3.5-large")
    record = json.loads((tmp_path / digest / "engine.json").read_text())
    assert record["key"] == key(graph="a").model_dump(mode="json")
    assert (record["model"], record["slot"], record["bytes"]) == ("sd3.5-large", "unet", SIZE + 6)
    assert before <= record["created"] <= time.time()
    assert 0 < record["seconds"] < 60
    assert {name: file["bytes"] for name, file in record["files"].items()} == {
        "graph_0_sm89.engine": SIZE,
        "graph.timing": 6,
    }


def test_of_processes_that_race_for_a_key_exactly_one_builds(tmp_path: Path) -> None:
    root, log = tmp_path / "engines", tmp_path / "log"
    with wanting(root, log) as one, wanting(root, log) as two, wanting(root, log) as three:
        go(one, two, three)
        said = sorted(answer(process) for process in (one, two, three))
        assert [finish(process) for process in (one, two, three)] == [0, 0, 0]
    assert said == ["built", "read", "read"]
    assert notes(log).count("build") == 1
    assert directories(root) == [key().digest]


def test_of_threads_that_race_for_a_key_exactly_one_builds(tmp_path: Path) -> None:
    log = tmp_path.with_suffix(".log")

    def want(_: int) -> bool:
        store = EngineStore(tmp_path, QUOTA)
        return store.session(key(), lambda at: Session(at, log), model="sdxl", slot="unet").built

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(want, range(4))) == [False, False, False, True]
    assert notes(log).count("build") == 1


def test_after_a_builder_was_killed_the_next_one_builds(tmp_path: Path) -> None:
    root, log = tmp_path / "engines", tmp_path / "log"
    with wanting(root, log, seconds=60) as killed:
        go(killed)
        until(lambda: any(path.stat().st_size for path in root.glob(".*/*.engine")))
    assert killed.returncode == -signal.SIGKILL
    (torn,) = directories(root)
    assert torn.startswith(f".{key().digest}.")
    store = EngineStore(root, QUOTA)
    assert store.entries() == ()
    engine = store.session(key(), lambda at: Session(at, log), model="sdxl", slot="unet")
    assert engine.built
    assert len(engine.session.content) == SIZE
    assert notes(log).count("build") == 2
    assert directories(root) == [key().digest]


def test_who_waits_for_a_builder_that_is_killed_builds(tmp_path: Path) -> None:
    root, log = tmp_path / "engines", tmp_path / "log"
    with wanting(root, log, seconds=60) as killed, wanting(root, log) as waiting:
        go(killed)
        until(lambda: any(path.stat().st_size for path in root.glob(".*/*.engine")))
        go(waiting)
        until(lambda: "wait" in notes(log))
        killed.send_signal(signal.SIGKILL)
        assert answer(waiting) == "built"
        assert finish(waiting) == 0
    assert notes(log).count("build") == 2
    assert directories(root) == [key().digest]


def test_what_a_killed_builder_left_goes_with_the_next_build_of_any_key(tmp_path: Path) -> None:
    root, log = tmp_path / "engines", tmp_path / "log"
    with wanting(root, log, seconds=60) as killed:
        go(killed)
        until(lambda: any(root.glob(".*/*.engine")))
        alive = directories(root)
        other = build(EngineStore(root, QUOTA), "b")
        assert directories(root) == sorted([*alive, other])  # nothing of a live builder is swept
    build(EngineStore(root, QUOTA), "c")
    assert killed.returncode == -signal.SIGKILL
    assert directories(root) == sorted([other, key(graph="c").digest])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[1234] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one bit": lambda at: _flip(at / "graph_0_sm89.engine"),
    "cut off": lambda at: os.truncate(at / "graph_0_sm89.engine", SIZE - 1),
    "missing": lambda at: (at / "graph_0_sm89.engine").unlink(),
    "another file": lambda at: (at / "graph.timing").write_bytes(b"timinG"),
    "no record": lambda at: (at / "engine.json").unlink(),
    "torn record": lambda at: os.truncate(at / "engine.json", 100),
    "another's record": lambda at: (at / "engine.json").write_text(
        (at / "engine.json").read_text().replace("sm_89", "sm_90")
    ),
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_engine_is_built_anew_once(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    store, log = EngineStore(tmp_path, QUOTA), tmp_path.with_suffix(".log")
    good = store.session(key(), lambda at: Session(at, log), model="sdxl", slot="unet")
    good.close()
    harm(good.directory)
    engine = store.session(key(), lambda at: Session(at, log), model="sdxl", slot="unet")
    assert engine.built
    assert engine.session.content == good.session.content
    engine.close()
    assert not store.session(key(), lambda at: Session(at, log), model="sdxl", slot="unet").built
    assert notes(log).count("build") == 2
    assert directories(tmp_path) == [key().digest]


def test_an_engine_that_does_not_load_is_built_anew_once(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, QUOTA)
    build(store, "a")
    called: list[Path] = []

    def make(directory: Path) -> Session:
        called.append(directory)
        if len(called) == 1:
            raise Torn("deserialization failed")
        return Session(directory, seconds=0)

    engine = store.session(key(graph="a"), make, model="sdxl", slot="unet")
    assert engine.built
    assert [path.name == key(graph="a").digest for path in called] == [True, False, True]
    assert directories(tmp_path) == [key(graph="a").digest]


def test_a_build_that_fails_raises_its_own_error_and_leaves_nothing(tmp_path: Path) -> None:
    def make(directory: Path) -> Session:
        (directory / "graph_0_sm89.engine").write_bytes(b"half")
        raise Torn("out of memory")

    with pytest.raises(Torn, match="out of memory"):
        EngineStore(tmp_path, QUOTA).session(key(), make, model="sdxl", slot="unet")
    assert directories(tmp_path) == []


def test_an_engine_that_can_not_be_read_after_it_was_built_leaves_nothing(tmp_path: Path) -> None:
    calls: list[Path] = []

    def make(directory: Path) -> Session:
        calls.append(directory)
        if directory.name == key().digest:
            raise Torn("deserialization failed")
        return Session(directory, seconds=0)

    with pytest.raises(Torn, match="deserialization failed"):
        EngineStore(tmp_path, QUOTA).session(key(), make, model="sdxl", slot="unet")
    assert len(calls) == 2
    assert directories(tmp_path) == []


def test_an_engine_is_kept_when_building_it_anew_fails_as_well(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, QUOTA)
    digest = build(store, "a")

    def make(directory: Path) -> Session:
        raise Torn("out of memory")

    with pytest.raises(Torn, match="out of memory"):
        store.session(key(graph="a"), make, model="sdxl", slot="unet")
    assert directories(tmp_path) == [digest]
    assert not store.session(key(graph="a"), Session, model="sdxl", slot="unet").built


def test_a_provider_that_writes_no_engine_is_served_and_nothing_is_kept(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, QUOTA)
    made: list[Path] = []

    def make(directory: Path) -> int:
        made.append(directory)
        return len(made)

    engine = store.session(key(), make, model="sdxl", slot="unet")
    assert engine.session == 1  # called once: to compile twice would take twice as long
    build(store, "b")
    second = store.session(key(), make, model="sdxl", slot="unet")
    assert engine.directory.is_dir()
    assert second.session == 2
    second.close()
    engine.close()
    build(store, "c")
    assert not engine.directory.exists()
    assert store.entries()[-1].digest != key().digest


def test_a_file_that_was_added_after_the_build_is_not_read(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, QUOTA)
    digest = build(store, "a")
    (tmp_path / digest / "graph_1_sm89.engine").write_bytes(b"half of what was to be wri")
    engine = store.session(
        key(graph="a"), lambda at: sorted(path.name for path in at.iterdir()), model="sdxl", slot="unet"
    )
    assert not engine.built
    assert engine.session == ["engine.json", "graph.timing", "graph_0_sm89.engine"]


def test_the_least_recently_used_engines_make_room(tmp_path: Path) -> None:
    size = SIZE + 6
    store = EngineStore(tmp_path, 3 * size)
    a, b, c = (build(store, name) for name in "abc")
    assert build(store, "a") == a  # used once more, not built
    d = build(store, "d")
    assert digests(store) == {c, a, d}
    assert [entry.digest for entry in store.entries()] == [d, a, c]
    smaller = EngineStore(tmp_path, 2 * size)
    e = build(smaller, "e")
    assert digests(store) == {d, e}
    assert b not in directories(tmp_path)


def test_opening_an_engine_and_closing_it_are_uses(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, QUOTA)
    a, b = build(store, "a"), build(store, "b")
    engine = store.session(key(graph="a"), Session, model="sdxl", slot="unet")
    assert [entry.digest for entry in store.entries()] == [a, b]
    build(store, "b")
    assert [entry.digest for entry in store.entries()] == [b, a]
    engine.close()
    assert [entry.digest for entry in store.entries()] == [a, b]


def test_an_engine_in_use_by_a_live_process_makes_no_room(tmp_path: Path) -> None:
    root, log = tmp_path / "engines", tmp_path / "log"
    store = EngineStore(root, 2 * (SIZE + 6))
    with wanting(root, log) as user:
        go(user)
        assert answer(user) == "built"
        b = build(store, "b")
        c = build(store, "c")
        assert digests(store) == {key().digest, c}
        assert {entry.digest for entry in store.entries() if entry.in_use} == {key().digest}
        assert b not in directories(root)
    assert user.returncode == -signal.SIGKILL
    assert not any(entry.in_use for entry in store.entries())
    d = build(store, "d")
    assert digests(store) == {c, d}


def test_an_engine_in_use_by_this_process_makes_no_room_until_it_is_closed(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, SIZE)
    engine = store.session(key(), lambda at: Session(at, seconds=0), model="sdxl", slot="unet")
    b = build(store, "b")
    assert digests(store) == {key().digest, b}
    engine.close()
    engine.close()  # a second time does nothing
    c = build(store, "c")
    assert digests(store) == {c}  # larger than all room there is, and just built: it stays


def test_engines_are_cleared_by_key_by_model_or_all(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, QUOTA)
    a, b, c, d = (build(store, *names) for names in (("a",), ("b", "sd3"), ("c", "sd3"), ("d",)))
    assert [entry.digest for entry in store.clear([a[:8]]).removed] == [a]
    assert {entry.digest for entry in store.clear(["sd3"]).removed} == {b, c}
    with pytest.raises(UnknownEngine, match=r"no engine has a key .* 'sd3'.*`jubako engines list`"):
        store.clear([d, "sd3"])
    assert digests(store) == {d}
    (tmp_path / f".{a}.left-by-a-killed-builder").mkdir()
    (tmp_path / b).mkdir()
    assert [entry.digest for entry in store.clear().removed] == [d]
    assert directories(tmp_path) == []


def test_a_beginning_that_several_keys_have_clears_none(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, QUOTA)
    for name in "abc":
        build(store, name)
    with pytest.raises(UnknownEngine, match="several engines have"):
        store.clear([""])
    assert len(store.entries()) == 3


def test_what_is_in_use_is_not_cleared(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, QUOTA)
    engine = store.session(key(), lambda at: Session(at, seconds=0), model="sdxl", slot="unet")
    b = build(store, "b")
    cleared = store.clear()
    assert [entry.digest for entry in cleared.removed] == [b]
    assert [entry.digest for entry in cleared.in_use] == [key().digest]
    assert engine.directory.is_dir()


OTHER_FACTS: dict[str, object] = {
    "graph": "c" * 64,
    "data": ("b" * 64, "c" * 64),
    "onnxruntime": "1.32.0",
    "provider": "migraphx",
    "provider_version": "10.14.0",
    "gpu": "NVIDIA L40S",
    "architecture": "sm_90",
    "driver": "580.82.07",
    "toolkit": "12",
    "shapes": {"sample": ShapeRange((1, 4, 8, 8), (2, 4, 16, 16), (8, 4, 32, 32))},
    "options": {"trt_bf16_enable": "True"},
    "system": "Linux aarch64",
}


@pytest.mark.parametrize("fact", EngineKey.model_fields)
def test_keys_differ_by_any_single_fact(fact: str) -> None:
    assert key(**{fact: OTHER_FACTS[fact]}).digest != key().digest


def test_equal_facts_are_one_key_in_every_process_and_order() -> None:
    one = key(options={"a": "1", "b": "2"}, shapes={"x": SHAPES["sample"], "y": SHAPES["sample"]})
    two = key(options={"b": "2", "a": "1"}, shapes={"y": SHAPES["sample"], "x": SHAPES["sample"]})
    assert one.digest == two.digest
    assert EngineKey.model_validate_json(one.model_dump_json()).digest == one.digest
    assert key().digest == "8a1ae058fe56cabc003344dbf918a73558ddb60c80608fa700c379b8c88b9918"


class _Noting(logging.Handler):
    """Notes that this process says that it waits."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        _note(self._log, "wait")


def main(root: str, log: str, seconds: str) -> None:
    """Want the engine, say whether it took a build, and hold it until the input ends."""
    locks = logging.getLogger("jubako.weights.engines.locks")
    locks.setLevel(logging.INFO)
    locks.addHandler(_Noting(Path(log)))
    store = EngineStore(Path(root), QUOTA)
    print("ready", flush=True)
    sys.stdin.readline()
    engine = store.session(
        key(), lambda at: Session(at, Path(log), float(seconds)), model="sdxl", slot="unet"
    )
    print("built" if engine.built else "read", flush=True)
    sys.stdin.read()
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
