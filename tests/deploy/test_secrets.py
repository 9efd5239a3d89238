"""docs/deploy.md: its commands make the secrets that manifests and servers ask for; its paths are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from manifests import DEPLOY, load, settings_of
from server import ROOT

from jubako.keys import read_keys_file, recognised

PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def test_the_page_s_commands_make_every_secret(tmp_path: Path) -> None:
    (script,) = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    folder = tmp_path / "deploy" / "secrets"
    folder.mkdir(parents=True)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=True, timeout=60)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    generated = load("secrets/kustomization.yaml")["secretGenerator"]
    wanted = {name for entry in generated for name in entry["files"]} | load("compose.yaml")["secrets"].keys()
    assert made.keys() == wanted | {"me"}
    # A line's end would be part of the variable that it becomes, and of the header.
    for name in wanted - {"api-keys"}:
        assert len(made[name]) >= 16
        assert not made[name].endswith(b"\n")
    keys = read_keys_file(str(folder / "api-keys"))
    holder = recognised(keys, made["prometheus-key"])
    assert holder is not None
    assert holder.name == "prometheus"
    assert holder.scopes == frozenset({"admin"})
    assert [key.name for key in keys] == ["prometheus", "me"]
    settings_of({"JUBAKO_DATABASE_URL": made["database-url"].decode()}, tmp_path)
    assert made["database-password"] in made["database-url"]


def test_git_sees_none_of_them() -> None:
    lines = (DEPLOY / "secrets" / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert lines == ["*", "!.gitignore", "!kustomization.yaml"]


def test_what_the_page_names_is_there() -> None:
    named = re.findall(r"(?<![\w/])deploy/[\w/.-]*\w", PAGE)
    assert len(set(named)) > 5
    for name in named:
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(components/\w+|overlays/\w+|base/[\w.]+)`", PAGE):
        assert (DEPLOY / "kubernetes" / name).exists(), name
