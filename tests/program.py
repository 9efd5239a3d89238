"""The command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["COMMAND", "jubako"]

# The installed script does the same; this one needs no folder of scripts.
COMMAND = (sys.executable, "-c", "from jubako.cli import main; main()")


def jubako(
    *arguments: str, tmp_path: Path, columns: int = 100, timeout: int = 60, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``tmp_path`` takes its records."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JUBAKO_")}
    environment = {**kept, "JUBAKO_HOME": str(tmp_path), "COLUMNS": str(columns), **environ}
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )
