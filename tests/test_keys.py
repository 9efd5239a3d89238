"""API keys as they are written down, and who has which."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jubako.keys import key_line, new_key, read_keys, recognised
from jubako.settings import SettingsError, load_settings

SECRET = "-".join(["a", "secret", "of", "enough", "characters"])
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def test_an_entry_is_a_name_a_key_its_scopes_and_perhaps_a_date() -> None:
    lines = (
        f"# who may what\nalice {SECRET} generate,jobs  # draws\n\n  ops  sha256:{'ab' * 32} admin 2027-01-31"
    )
    alice, ops = read_keys(lines)
    assert (alice.name, alice.scopes, alice.expires) == ("alice", frozenset({"generate", "jobs"}), None)
    assert (ops.scopes, ops.expires) == (frozenset({"admin"}), datetime(2027, 1, 31, tzinfo=UTC))
    assert read_keys(f"alice {SECRET} generate,jobs; ops sha256:{'AB' * 32} admin 2027-01-31") == (alice, ops)


def test_a_key_is_the_same_given_itself_or_its_digest() -> None:
    assert read_keys(f"a {SECRET} jobs") == read_keys(f"a sha256:{DIGEST} jobs")


def test_a_key_is_recognised_among_others_and_only_whole() -> None:
    keys = read_keys(f"first {'x' * 20} jobs; second {SECRET} jobs; third {'y' * 20} jobs")
    known = recognised(keys, SECRET.encode())
    assert known
    assert known.name == "second"
    for other in (SECRET[:-1], f"{SECRET} ", SECRET.upper(), "", f"sha256:{DIGEST}", DIGEST):
        assert recognised(keys, other.encode()) is None, other


def test_a_key_expires_at_its_moment() -> None:
    past, future, none = read_keys(
        f"a {SECRET}1 jobs 2020-01-01; b {SECRET}2 jobs 2999-12-31T23:59+02:00; c {SECRET}3 jobs"
    )
    assert (past.expired, future.expired, none.expired) == (True, False, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{SECRET}", "entry 1: write a name, the key"),
        (f"alice {SECRET} jobs 2027-01-31 more", "entry 1: write a name, the key"),
        (f"ok {SECRET} jobs; al/ce {SECRET}2 jobs", "entry 2: a name has letters"),
        (f"alice {SECRET} paint", "of generate, jobs, adapters, train, admin"),
        (f"alice jobs {SECRET}", "third word lists scopes"),
        ("alice short-secret jobs", "at least 16 characters"),
        (f"alice sha256:{SECRET} jobs", "64 hexadecimal digits"),
        (f"alice {SECRET} jobs soon", "the fourth word is a date"),
        (f"alice {SECRET} jobs; alice {SECRET}2 jobs", "two keys have the same name"),
        (f"alice {SECRET} jobs; bob sha256:{DIGEST} jobs", "two names have the same key"),
        (" ; ", "there are no keys in it"),
    ],
)
def test_a_wrong_entry_is_told_by_its_number_and_never_by_what_stands_there(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings({"JUBAKO_API_KEYS": text})
    told = f"{raised.value} {raised.value.__cause__}"
    assert words in told
    assert "secret" not in told


def test_keys_of_a_file_stand_beside_those_of_the_variable(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice {SECRET} jobs\n", encoding="utf-8")
    given = {"JUBAKO_API_KEYS_FILE": str(file), "JUBAKO_API_KEYS": f"bob {SECRET}2 jobs"}
    assert {key.name for key in load_settings(given).keys} == {"alice", "bob"}
    with pytest.raises(SettingsError, match="two names have the same key"):
        load_settings(given | {"JUBAKO_API_KEYS": f"bob sha256:{DIGEST} jobs"})


@pytest.mark.parametrize("content", [None, b"", b"# none yet\n", b"\xff\xfe\x00"])
def test_a_file_that_has_no_keys_is_no_way_to_serve_without(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"^JUBAKO_API_KEYS_FILE: "):
        load_settings({"JUBAKO_API_KEYS_FILE": str(file)})


def test_a_new_key_comes_with_a_line_that_has_only_its_digest() -> None:
    key = new_key()
    line = key_line("alice", key, ("generate", "jobs"), "2999-01-31")
    assert key not in line
    (read,) = read_keys(line)
    assert recognised((read,), key.encode()) == read
    assert len({new_key() for _ in range(100)}) == 100


def test_settings_that_are_printed_show_no_secret() -> None:
    given = {"JUBAKO_API_KEYS": f"alice {SECRET} jobs", "JUBAKO_FAMILY_KEY": f"{SECRET}-of-families"}
    printed = repr(load_settings(given))
    assert "alice" in printed
    assert SECRET not in printed
    assert str(bytes.fromhex(DIGEST)) not in printed
