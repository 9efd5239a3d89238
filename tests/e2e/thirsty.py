"""A process that serves three models through the runner and tells how much memory it took.

``python thirsty.py CATALOG HOME BUDGET ROUNDS``: a picture of each model in turn, ROUNDS times, under a
budget of so many bytes (0: without one). Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path

import torch

from jubako.catalog import load_catalog
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.runner import Runner
from jubako.settings import load_settings

WARM_UP, MODELS = "tiny-sd", ("sd1.4", "sd1.5", "sd2-base")
SAMPLING_SECONDS = 0.002


class Thermometer(threading.Thread):
    """Reads this process's resident memory all the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    @staticmethod
    def now() -> int:
        """Resident bytes."""
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * 4096

    def run(self) -> None:
        """Keep the highest value."""
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(SAMPLING_SECONDS)


def main(catalog_folder: str, home: str, budget: str, rounds: str) -> None:
    """Serve, measure, print."""
    torch.set_num_threads(1)
    settings = load_settings(
        {"JUBAKO_HOME": home, "JUBAKO_DEVICE": "cpu", "JUBAKO_MEMORY_BUDGET": "" if budget == "0" else budget}
    )
    catalog = load_catalog(Path(catalog_folder))
    runner = Runner(catalog.families["sd"], settings)

    async def picture(model: str) -> None:
        request = TextToImage(prompt="a red circle", model=model, num_inference_steps=1, width=64, height=64)
        (await runner.generate(plan(request, catalog))).checked()

    async def work() -> None:
        for _ in range(int(rounds)):
            for model in MODELS:
                await picture(model)

    asyncio.run(picture(WARM_UP))
    baseline = Thermometer.now()
    thermometer = Thermometer()
    began = time.monotonic()
    asyncio.run(work())
    seconds = time.monotonic() - began
    after = Thermometer.now()
    states = {name: state.bytes for name, state in runner.states().items() if state.state == "resident"}
    runner.close()
    figures = {"peak": thermometer.peak - baseline, "after": after - baseline, "seconds": seconds}
    print(json.dumps({**figures, "resident": states}))


if __name__ == "__main__":
    main(*sys.argv[1:])
