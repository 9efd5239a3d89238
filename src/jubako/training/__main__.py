"""The trainer as a program: ``python -m jubako.training FOLDER``.

Exit status 0: the adapter is there. 1: it failed, and its last event says why. 3: it was asked to stop
(SIGTERM, SIGINT, or its parent's end) and goes on from its last checkpoint when it is started again. 4: its
device or its disk has no room for it now.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

from jubako.catalog import CatalogError, load_catalog
from jubako.disk import is_full, no_room
from jubako.errors import JubakoError
from jubako.settings import Settings, SettingsError, load_settings
from jubako.training.folder import TrainingFolder
from jubako.training.process import COMPLETED, FAILED, NO_ROOM, STOPPED

logger = logging.getLogger(__name__)

# Pictures are waited for, trainings are not.
NICE = 10


def main() -> int:
    """Train what the folder asks for."""
    parser = argparse.ArgumentParser(prog="python -m jubako.training", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="Holds plan.json and images/.")
    parser.add_argument("--parent", type=int, help="The process with which it ends.")
    options = parser.parse_args()
    folder = TrainingFolder(options.folder)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.parent:
        threading.Thread(target=_watch, args=(options.parent, stop), daemon=True).start()
    os.nice(NICE)
    main_process = os.environ.get("RANK", "0") == "0"
    try:
        # Another one may be at its last step here, whose parent was killed.
        with folder.locked() if main_process else nullcontext():
            return COMPLETED if folder.completed else _train(folder, load_settings(), stop)
    except _stopped():
        return STOPPED
    except (JubakoError, SettingsError, CatalogError) as error:
        return _failed(folder, str(error), tell=main_process)
    except Exception as error:
        if is_full(error):
            print(no_room("JUBAKO_HOME"), file=sys.stderr)
            return NO_ROOM
        logger.exception("training failed")
        return _failed(folder, _sentence(error), tell=main_process)


def _train(folder: TrainingFolder, settings: Settings, stop: threading.Event) -> int:
    if settings.device.startswith("cuda:"):
        # One of several: the others are not for this training.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", settings.device.partition(":")[2])
    import torch
    from accelerate import Accelerator  # type: ignore[import-untyped]

    from jubako.training.room import lack_of_room
    from jubako.training.trainer import Trainer

    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    bf16 = on_gpu and torch.cuda.is_bf16_supported()
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if bf16 else "no")
    catalog = load_catalog(settings.catalog)
    if accelerator.is_main_process:
        folder.sweep()
        plan, _ = folder.read_plan()
        if lack := lack_of_room(catalog.model(plan.model), accelerator.device):
            folder.tell("progress", phase="waiting for room", message=lack)
            return NO_ROOM
    Trainer(folder, settings, catalog, accelerator, stop.is_set).run()
    return COMPLETED


def _watch(parent: int, stop: threading.Event) -> None:
    """Ask for the end when the process that wanted the adapter is gone."""
    while not stop.wait(1.0):
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            stop.set()
        except PermissionError:
            continue


def _stopped() -> type[Exception]:
    """Stopped, which comes with torch: looked up only when something was raised."""
    from jubako.training.trainer import Stopped

    return Stopped


def _failed(folder: TrainingFolder, sentence: str, *, tell: bool) -> int:
    print(sentence, file=sys.stderr)
    if tell and folder.path.is_dir():
        folder.tell("failed", message=sentence)
    return FAILED


def _sentence(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "the device has too little memory; take a smaller batch_size or resolution"
    first = str(error).strip().partition("\n")[0]
    return f"the training failed: {type(error).__name__}: {first}" if first else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
