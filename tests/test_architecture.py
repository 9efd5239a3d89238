"""What keeps the house in order beside the import contracts of scripts/check."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest
from server import ROOT

import jubako

TORCH_FREE = (
    "jubako.catalog",
    "jubako.cli",
    "jubako.media",
    "jubako.planning",
    "jubako.services.gateway",
    "service",
)


def modules() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages(jubako.__path__, "jubako.")]
    return [name for name in found if not name.endswith("__main__")]


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", TORCH_FREE)
def test_importing_it_in_a_fresh_interpreter_brings_no_torch(name: str) -> None:
    code = f"import {name}, sys; print(*sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", modules())
def test_what_is_exported_exists_and_what_is_public_is_exported(name: str) -> None:
    its = module(name)
    exported = set(getattr(its, "__all__", ()))
    assert all(hasattr(its, public) for public in exported)
    defined = {
        public
        for public, value in vars(its).items()
        if not public.startswith("_") and callable(value) and getattr(value, "__module__", "") == name
    }
    if exported:
        assert defined <= exported, f"public but not in __all__: {sorted(defined - exported)}"


def test_no_weights_are_pickles_and_nothing_is_large() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    files = [ROOT / name for name in tracked.stdout.split("\0") if name]
    assert not [file for file in files if file.suffix in {".bin", ".ckpt", ".pt", ".pth", ".pkl"}]
    assert not [file for file in files if file.is_file() and file.stat().st_size > 16 * 2**20]
