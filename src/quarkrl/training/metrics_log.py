"""What a run logs: the file `metrics.jsonl`, and the means of the loss's parts between two log entries."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from quarkrl.runs.records import METRICS_FILE
from quarkrl.storage.atomic import atomic_file, report_write_errors
from quarkrl.storage.json import nan_to_null


class MetricsFile(TrainerCallback):
    """Appends each log entry to `metrics.jsonl` in the run directory, one JSON object per line."""

    def __init__(self, directory: str | os.PathLike):
        self.path = Path(directory) / METRICS_FILE

    def on_log(self, args, state, control, logs=None, **_):
        """Append a row, in the first process."""
        if state.is_world_process_zero:
            with report_write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(_line({"step": state.global_step, **(logs or {})}))

    @property
    def size(self) -> int:
        """The size of the file in bytes; 0 if it does not exist."""
        return self.path.stat().st_size if self.path.exists() else 0

    def sync(self) -> None:
        """Flush the file to the disk."""
        if self.path.exists():
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())

    def truncate(self, size: int, history: list[dict[str, Any]]) -> None:
        """Truncate the file to an earlier size.

        Args:
            size: in bytes.
            history: the log entries up to that size. The file is rewritten from them if it is shorter.
        """
        if size <= self.size:
            if self.path.exists():
                os.truncate(self.path, size)
            return
        with atomic_file(self.path) as file:
            file.writelines(_line(row).encode() for row in history)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(nan_to_null(row)) + "\n"


class LogEachIteration(TrainerCallback):
    """Logs the loss at the end of an iteration in which `logging_steps` has no step to log."""

    def on_step_end(self, args, state, control, **_):
        """Request a log entry at the last step, if the iteration has had none."""
        step, per_iteration, every = state.global_step, args.steps_per_iteration, max(state.logging_steps, 1)
        has_entry = step // every > (step - per_iteration) // every
        if args.logging_strategy == IntervalStrategy.STEPS and step % per_iteration == 0 and not has_entry:
            control.should_log = True


class LossMeans:
    """Sums the parts of the loss over completion tokens, since the last log entry and in the current step.

    Args:
        with_dpo: whether the loss has a DPO term, which is summed over completions.
    """

    def __init__(self, with_dpo: bool = False) -> None:
        self.names = ("nll", "kl", "entropy", *(("dpo",) if with_dpo else ()))
        self._logged = self._step = torch.zeros(len(self.names) + 2, dtype=torch.float64)

    def add(self, sums: Tensor, tokens: int, completions: int) -> None:
        """Add a micro-batch to the current step.

        Args:
            sums: one for each of `names`.
            tokens, completions: their numbers in the micro-batch.
        """
        counts = torch.tensor([tokens, completions], dtype=torch.float64)
        self._step = self._step + torch.cat((sums.double().cpu(), counts))

    @property
    def step(self) -> dict[str, float]:
        """The sums of the current step on this process, by name, and the number of its `tokens`."""
        return dict(zip((*self.names, "tokens"), self._step.tolist(), strict=False))

    def drop_step(self) -> None:
        """Discard the current step, because it is skipped."""
        self._step = torch.zeros_like(self._step)

    @property
    def state(self) -> list[float]:
        """The sums since the last log entry. A checkpoint saves them and a resumed run restores them."""
        return self._logged.tolist()

    @state.setter
    def state(self, sums: list[float]) -> None:
        self._logged = torch.tensor(sums, dtype=torch.float64)

    def end_step(self) -> None:
        """Add the current step to the sums of the next log entry."""
        self._logged = self._logged + self._step
        self._step = torch.zeros_like(self._step)

    def last_per_completion(self, accelerator: Any) -> tuple[float, float]:
        """Return the mean KL and the mean entropy per completion of the current step, over all processes."""
        _nll, kl, entropy, *_, completions = accelerator.reduce(self._step.to(accelerator.device)).tolist()
        return kl / completions, entropy / completions

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Return the means since the last call, over all processes, and start new ones.

        Without tokens, each mean is NaN, and so is `loss`, which overrides that of `Trainer`.
        """
        *sums, tokens, completions = accelerator.reduce(self._logged.to(accelerator.device)).tolist()
        self._logged = torch.zeros_like(self._logged)
        if not tokens:
            return dict.fromkeys((*self.names, "loss"), math.nan)
        counts = {name: completions if name == "dpo" else tokens for name in self.names}
        return {name: value / counts[name] for name, value in zip(self.names, sums, strict=True)}
