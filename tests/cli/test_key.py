"""`jubako key`, and the key that the command line sends to a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_keys import KEYS
from program import jubako
from server import Server

from jubako.keys import read_keys, recognised


def test_a_key_and_the_line_that_lets_it_in_belong_together(tmp_path: Path) -> None:
    done = jubako("key", "alice", "--scopes", "generate,train", "--expires", "2999-01-31", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    given, line = done.stdout.splitlines()
    (key,) = read_keys(line)
    assert recognised((key,), given.removeprefix("JUBAKO_API_KEY=").encode()) == key
    assert (key.name, key.scopes) == ("alice", frozenset({"generate", "train"}))
    assert key.expires
    assert key.expires.year == 2999


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("al ice",), "a name has letters"),
        (("alice", "--scopes", "paint"), "scopes, of generate, jobs, adapters, train, admin"),
        (("alice", "--expires", "soon"), "a date"),
    ],
)
def test_what_is_no_key_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = jubako("key", *arguments, tmp_path=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_line_sends_its_key_and_says_which_variable_has_it(
    guarded: Server, tmp_path: Path
) -> None:
    def asked(key: str) -> tuple[int, str]:
        done = jubako("jobs", "list", "--url", guarded.url, tmp_path=tmp_path, JUBAKO_API_KEY=key)
        return done.returncode, done.stderr

    assert asked(f"{KEYS['clerk'].secret}\n") == (0, "")
    code, told = asked("")
    assert code == 1
    assert "asks for an API key" in told
    assert told.endswith("; set JUBAKO_API_KEY\n")
    code, told = asked(KEYS["drawer"].secret)
    assert (code, told) == (1, "jubako: the key drawer may not do this; it takes the scope jobs\n")
