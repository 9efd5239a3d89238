"""The training loop: from a plan and pictures in a folder to an adapter with its card and sheet.

It may be interrupted anywhere and goes on from its last checkpoint. Under ``accelerate launch`` every process
trains on its own share of the chance; the main one alone writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from jubako.catalog import Catalog
from jubako.errors import JubakoError
from jubako.families.latent import LatentModel
from jubako.settings import Settings
from jubako.training.card import base_of, card, sheet
from jubako.training.checkpoint import Progress, restore, save
from jubako.training.encodings import Encodings, encoded
from jubako.training.folder import TrainingFolder, replaced, write_whole
from jubako.training.learner import learner
from jubako.training.objective import Noised, objective, squared_errors
from jubako.training.plan import is_miniature, trainable
from jubako.training.studio import Studio
from jubako.weights.components import ComponentStore
from jubako.weights.placement import resolve_dtype

__all__ = ["Stopped", "Trainer"]

WARM_UP_STEPS = 20
MAX_NORM = 1.0
WEIGHT_DECAY = 1e-4
# A denoiser of this size does not leave room for its activations on most devices.
CHECKPOINTED_PARAMETERS = 500_000_000
_TELL_EVERY_S = 1.0
MOST_HELD_SECONDS = 2.0
_LOOK_SECONDS = 0.02
_VALIDATION_SEED = 7


class Stopped(Exception):
    """The training was asked to end before its end; what was done is kept where it can be."""


class Trainer:
    """One training in one process; ``stopping`` says whether it is to end at the next opportunity."""

    def __init__(
        self,
        folder: TrainingFolder,
        settings: Settings,
        catalog: Catalog,
        accelerator: Accelerator,
        stopping: Callable[[], bool],
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._accelerator = accelerator
        self._main = bool(accelerator.is_main_process)
        self._stopping = stopping
        self.plan, self._sha256 = folder.read_plan()
        self._entry = trainable(catalog, self.plan.model)
        if is_miniature(self._entry):
            # It gains nothing from a second one, and on busy cores waits for it.
            torch.set_num_threads(1)
        self._model = _loaded(self._entry.name, catalog, settings, accelerator.device)
        self._studio = Studio(self._model, catalog, self.plan.resolution)
        self._told_at = 0.0

    def run(self) -> None:
        """Train to the end; Stopped when asked to stop, JubakoError when it can't be done."""
        encodings = self._encodings().to(self._accelerator.device)
        plan, model = self.plan, self._model
        self._learner = learner(model, plan)
        self._objective = objective(self._entry, model.pipeline.scheduler.config, plan.min_snr_gamma)
        if sum(each.numel() for each in model.denoiser.parameters()) > CHECKPOINTED_PARAMETERS:
            model.denoiser.enable_gradient_checkpointing()
        parameters = self._learner.parameters
        optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=WEIGHT_DECAY)
        progress = Progress(0, [], 0.0)
        if (place := self._folder.latest_checkpoint()) is not None:
            progress = restore(place, self._learner, optimizer)
        own = model.denoiser
        model.denoiser, optimizer = self._accelerator.prepare(own, optimizer)
        self._tell_started(progress, parameters)
        self._steps(encodings, parameters, optimizer, progress)
        model.denoiser = own
        if self._main:
            self._finish(progress)

    def _steps(
        self,
        encodings: Encodings,
        parameters: list[torch.nn.Parameter],
        optimizer: Any,
        progress: Progress,
    ) -> None:
        plan, began, before = self.plan, time.monotonic(), progress.seconds
        first = progress.step
        for step in range(first, plan.steps):
            self._wait_while_held()
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS)
            loss = self._step(step, encodings, parameters, optimizer)
            progress.step = step + 1
            progress.losses.append(round(loss, 6))
            progress.seconds = before + time.monotonic() - began
            left = (time.monotonic() - began) / (step + 1 - first) * (plan.steps - step - 1)
            self._tell_progress(progress, left)
            stop = self._agreed_to_stop()
            due = progress.step % plan.checkpoint_every == 0 or progress.step == plan.steps or stop
            if due and self._main:
                save(self._folder, self._learner, optimizer, progress)
                self._folder.tell(
                    "checkpoint", step=progress.step, steps=plan.steps, loss=progress.recent_loss
                )
            if stop and progress.step < plan.steps:
                raise Stopped
            if self._main and self._validates(progress.step):
                self._validate(progress.step)

    def _wait_while_held(self) -> None:
        """Leave the device to others, but not for ever."""
        if self._main:
            until = time.monotonic() + MOST_HELD_SECONDS
            while self._folder.held and time.monotonic() < until and not self._stopping():
                time.sleep(_LOOK_SECONDS)

    def _step(
        self, step: int, encodings: Encodings, parameters: list[torch.nn.Parameter], optimizer: Any
    ) -> float:
        """One step of the optimizer; the loss before it."""
        plan, accelerator = self.plan, self._accelerator
        key = (plan.seed, step, accelerator.process_index)
        rng = np.random.default_rng(key)
        subject = _drawn(rng, plan.batch_size, len(encodings.subject))
        latents, rows = encodings.subject[subject], encodings.subject_rows[subject]
        if plan.prior_preservation:
            of_class = _drawn(rng, plan.batch_size, len(encodings.of_class))
            latents = torch.cat([latents, encodings.of_class[of_class]])
            rows = torch.cat([rows, encodings.class_rows[of_class]])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noised = self._objective.noised(latents, generator)
        with accelerator.autocast():
            told = self._learner.told(encodings, rows)
            inputs = noised.inputs.to(told["encoder_hidden_states"].dtype)
            if plan.prior_preservation:
                noised = self._as_the_base(noised, inputs, told, len(subject))
            prediction = self._model.predict(inputs, noised.timesteps, told)
        errors = squared_errors(prediction, noised)
        loss = errors[: len(subject)].mean()
        if plan.prior_preservation:
            loss = loss + plan.prior_weight * errors[len(subject) :].mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(accelerator.reduce(loss.detach(), reduction="mean"))
        if not np.isfinite(value):
            raise JubakoError(
                f"the loss is not a number at step {step + 1}; take a lower learning_rate than "
                f"{plan.learning_rate:g}"
            )
        return value

    def _as_the_base(
        self, noised: Noised, inputs: torch.Tensor, told: Mapping[str, torch.Tensor], first: int
    ) -> Noised:
        """With the base's own prediction as the target of the class's rows, which come last.

        Its pictures alone would be learned by heart: few as they are, the model would come to differ from the
        base on every other prompt.
        """
        own = {name: values[first:] for name, values in told.items()}
        wrapped = self._model.denoiser
        self._model.denoiser = self._accelerator.unwrap_model(wrapped)
        with self._learner.resting():
            target = self._model.predict(inputs[first:], noised.timesteps[first:], own)
        self._model.denoiser = wrapped
        return replace(noised, target=torch.cat([noised.target[:first], target.to(noised.target)]))

    def _encodings(self) -> Encodings:
        """What was encoded before, or is now, by the main process for all."""
        file = self._folder.cache
        if self._main and not file.exists():
            found = encoded(self.plan, self._folder.images, self._model, self._studio, self._prepared)
            found.write(file)
        self._accelerator.wait_for_everyone()
        return Encodings.read(file)

    def _prepared(self, phase: str, done: int, of: int) -> None:
        """Hear of the work before the first step."""
        self._wait_while_held()
        if self._stopping():
            raise Stopped
        self._folder.tell("progress", phase=phase, done=done, of=of)

    def _agreed_to_stop(self) -> bool:
        """Whether any of the processes was asked to stop."""
        if self._accelerator.num_processes == 1:
            return self._stopping()
        mine = torch.tensor(float(self._stopping()), device=self._accelerator.device)
        return bool(self._accelerator.reduce(mine, reduction="sum") > 0)

    def _tell_started(self, progress: Progress, parameters: list[torch.nn.Parameter]) -> None:
        if self._main:
            self._folder.tell(
                "started",
                step=progress.step,
                steps=self.plan.steps,
                device=str(self._accelerator.device),
                processes=self._accelerator.num_processes,
                parameters=sum(each.numel() for each in parameters),
            )

    def _tell_progress(self, progress: Progress, seconds_left: float) -> None:
        now, done = time.monotonic(), progress.step == self.plan.steps
        if not self._main or (now - self._told_at < _TELL_EVERY_S and not done):
            return
        self._told_at = now
        self._folder.tell(
            "progress",
            phase="training",
            step=progress.step,
            steps=self.plan.steps,
            loss=progress.recent_loss,
            seconds=round(progress.seconds, 1),
            seconds_left=round(seconds_left, 1),
        )

    def _validates(self, step: int) -> bool:
        return self.plan.validation_every > 0 and (
            step % self.plan.validation_every == 0 or step == self.plan.steps
        )

    def _validate(self, step: int) -> None:
        """One picture of the validation prompt, always from the same noise."""
        plan = self.plan
        (picture,) = self._studio.draw([plan.validation_prompt], [_VALIDATION_SEED], plan.sample_steps)
        self._folder.validation.mkdir(exist_ok=True)
        name = f"{step:08}.png"
        with replaced(self._folder.validation / name) as partial:
            picture.save(partial, "PNG")
        self._folder.tell("validation", step=step, steps=self.plan.steps, file=f"validation/{name}")

    def _finish(self, progress: Progress) -> None:
        """The adapter, its sheet, and last its card, which makes it complete."""
        folder = self._folder
        self._learner.write(folder.adapter)
        with replaced(folder.sheet) as partial:
            sheet(self.plan, self._entry, self._studio).save(partial, "PNG")
        facts = {"adapter_bytes": folder.adapter.stat().st_size, "device": str(self._accelerator.device)}
        document = card(
            self.plan,
            self._entry,
            base=base_of(self._settings.home, self._entry),
            sha256=self._sha256,
            losses=progress.losses,
            seconds=progress.seconds,
            facts=facts,
        )
        write_whole(folder.card, json.dumps(document, indent=1).encode())
        folder.cache.unlink(missing_ok=True)
        folder.tell(
            "completed", step=progress.step, steps=self.plan.steps, seconds=round(progress.seconds, 1)
        )


def _drawn(rng: np.random.Generator, count: int, of: int) -> torch.Tensor:
    """Positions of a step's latents, each at most once while they last."""
    return torch.from_numpy(rng.permutation(of)[:count] if count <= of else rng.integers(0, of, count))


def _loaded(name: str, catalog: Catalog, settings: Settings, device: torch.device) -> LatentModel:
    """The model from its standard weights: graphs of vendors can't be trained."""
    entry = catalog.model(name)
    store = ComponentStore(catalog.families[entry.family].models)
    precision = (
        "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else entry.weights.dtype
    )
    dtype = resolve_dtype(precision, entry, device)
    assembly = store.load(entry, settings.home, device, dtype)
    for component in assembly.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    wrapped: LatentModel = import_module(f"jubako.families.{entry.family}").wrap(assembly.pipeline, entry)
    return wrapped
