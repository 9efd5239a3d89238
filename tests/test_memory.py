"""How much memory there is for models, and whether freed memory is really gone."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from jubako.memory import cgroup_limit, default_budget, give_back


def test_the_least_limit_of_the_control_groups_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/box/inner\n")
    (tmp_path / "box" / "inner").mkdir(parents=True)
    assert cgroup_limit(tmp_path, own) is None
    (tmp_path / "box" / "inner" / "memory.max").write_text("max\n")
    assert cgroup_limit(tmp_path, own) is None
    (tmp_path / "box" / "memory.max").write_text("1000\n")
    (tmp_path / "memory.max").write_text("3000\n")
    assert cgroup_limit(tmp_path, own) == 1000
    own.write_text("5:memory:/old\n1:cpu:/old\n")
    (tmp_path / "memory" / "old").mkdir(parents=True)
    (tmp_path / "memory" / "old" / "memory.limit_in_bytes").write_text("700\n")
    assert cgroup_limit(tmp_path, own) == 700
    assert cgroup_limit(tmp_path, tmp_path / "nowhere") is None


def test_a_budget_on_a_cpu_is_a_share_of_the_memory() -> None:
    assert 0 < default_budget(torch.device("cpu")) <= 0.6 * psutil.virtual_memory().total


def test_freed_memory_goes_back_to_the_system() -> None:
    own = psutil.Process().memory_info
    # What earlier tests of this process have freed would be taken first.
    give_back()
    before = own().rss
    # Blocks too small for mappings of their own, which glibc would keep.
    kept = [bytes(60_000) + b"x" for _ in range(1000)]
    assert own().rss - before > 40e6
    last = kept[-1]
    del kept
    give_back()
    assert own().rss - before < 20e6
    assert last
