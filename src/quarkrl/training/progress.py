"""What a run shows and writes while it goes: bars for explore, score and learn, and `metrics.jsonl`."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from torch import Tensor
from transformers import TrainerCallback

from quarkrl.storage.atomic import atomic_file, report_write_errors
from quarkrl.storage.json import nan_to_null


def new_bars(console: Console, enabled: bool = True) -> Bars:
    """Bars with time spent, time left and live figures (a task's field `figures`); they vanish when done."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    # Where nobody watches, a bar that vanishes leaves only empty lines.
    return Bars(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal))


class Progress(TrainerCallback):
    """Bars with live figures and the time left, and one line for each iteration that is over.

    Args:
        enabled: False shows nothing.
        console: where to; standard error by default.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None):
        self.enabled = enabled
        self.console = console or Console(stderr=True, highlight=False)
        self._bars: Bars | None = None
        self._explored: dict[str, Any] = {}
        self._learned: dict[str, Any] = {}
        self._rewards: list[float] = []

    @contextmanager
    def sampling(self, title: str, total: int) -> Iterator[None]:
        """Bars for sampling and scoring `total` completions."""
        self._rewards = []
        bars = self._open()
        self._explore = bars.add_task(f"{title}  explore", total=total, figures="")
        self._score = bars.add_task(f"{title}  score", total=total, figures="")
        try:
            yield
        finally:
            self.close()

    def sampled(self, count: int) -> None:
        """So many more completions are sampled."""
        if self._bars:
            self._bars.advance(self._explore, count)

    def scored(self, rewards: np.ndarray) -> None:
        """A batch's `(n, A)` rewards are known."""
        if self._bars:
            self._rewards += rewards[np.isfinite(rewards).all(axis=1)].mean(axis=1).tolist()
            mean = np.mean(self._rewards) if self._rewards else np.nan
            self._bars.update(self._score, advance=len(rewards), figures=f"reward {mean:.3f}")

    def _open(self) -> Bars:
        self._bars = new_bars(self.console, enabled=self.enabled)
        self._bars.start()
        return self._bars

    def close(self) -> None:
        """Take away the bars that are open, if any: at the end of a phase, or when an error ends the run."""
        if self._bars:
            self._bars.stop()
            self._bars = None

    def note(self, text: str) -> None:
        """Say something that is to be seen whether or not bars are."""
        self.console.print(text, soft_wrap=True, markup=False)

    # Learning: the epoch is the iteration.

    def on_step_begin(self, args, state, control, **_):
        if self._bars is None and state.is_world_process_zero:
            bars = self._open()
            number = state.global_step // args.steps_per_iteration
            self._learn = bars.add_task(f"iteration {number}  learn", total=args.steps_per_iteration, figures="")
            bars.advance(self._learn, state.global_step % args.steps_per_iteration)

    def on_step_end(self, args, state, control, **_):
        if self._bars:
            self._bars.advance(self._learn)

    def on_log(self, args, state, control, logs=None, **_):
        logs = logs or {}
        if "unscored" in logs:
            self._explored = logs
        elif "nll" in logs:
            self._learned = logs
            if self._bars:
                self._bars.update(self._learn, figures=f"nll {logs['nll']:.3f}  kl {logs['kl']:.3f}")
        elif any(name.startswith("eval_") for name in logs) and self.enabled and state.is_world_process_zero:
            self._print("  held out", {n: v for n, v in logs.items() if "reward" in n})

    def on_epoch_end(self, args, state, control, **_):
        self.close()
        if not self.enabled or not state.is_world_process_zero:
            return
        shown = {n: v for n, v in self._explored.items() if n not in _NOT_IN_THE_LINE}
        shown |= {n: self._learned[n] for n in ("nll", "kl") if n in self._learned}
        number, last = (state.global_step - 1) // args.steps_per_iteration, args.num_iterations - 1
        self._print(f"iteration {number}/{last}", shown)

    def _print(self, title: str, figures: dict[str, Any]) -> None:
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        self.console.print(f"{title}  {text}", soft_wrap=True)


_NOT_IN_THE_LINE = ("iteration", "epoch", "seconds_sample", "seconds_score", "eos_share", "completion_length")


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


class MetricsFile(TrainerCallback):
    """Appends everything that is logged to `metrics.jsonl` in the run's directory, a JSON object a line."""

    def __init__(self, directory: str | os.PathLike):
        self.path = Path(directory) / "metrics.jsonl"

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero:
            with report_write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(_line({"step": state.global_step, **(logs or {})}))

    @property
    def size(self) -> int:
        """In bytes; 0 where there is no file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def sync(self) -> None:
        """Flush to the disk what is written."""
        if self.path.exists():
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())

    def cut(self, size: int, history: list[dict[str, Any]]) -> None:
        """Go back to a size it had; where it is shorter than that, rewrite it from what was logged until then."""
        if size <= self.size:
            if self.path.exists():
                os.truncate(self.path, size)
            return
        with atomic_file(self.path) as file:
            file.writelines(_line(row).encode() for row in history)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(nan_to_null(row)) + "\n"


class LossMeans:
    """Sums of the loss's parts over tokens: since the last log, and in the current step."""

    names = ("nll", "kl", "entropy")

    def __init__(self) -> None:
        self._logged = self._step = torch.zeros(len(self.names) + 2, dtype=torch.float64)

    def add(self, sums: Tensor, tokens: int, completions: int) -> None:
        """Count a batch: the sum of each part over its tokens, its tokens, its completions."""
        counts = torch.tensor([tokens, completions], dtype=torch.float64)
        self._step = self._step + torch.cat((sums.double().cpu(), counts))

    @property
    def step(self) -> dict[str, float]:
        """The current step's sums on this process, by name, and its `tokens`."""
        return dict(zip((*self.names, "tokens"), self._step.tolist(), strict=False))

    def drop_step(self) -> None:
        """Nothing is learned from the current step."""
        self._step = torch.zeros_like(self._step)

    @property
    def state(self) -> list[float]:
        """The sums since the last log, to be put back by a resumed run."""
        return self._logged.tolist()

    @state.setter
    def state(self, sums: list[float]) -> None:
        self._logged = torch.tensor(sums, dtype=torch.float64)

    def end_step(self) -> None:
        """The optimizer has stepped."""
        self._logged = self._logged + self._step
        self._step = torch.zeros_like(self._step)

    def last_per_completion(self, accelerator: Any) -> tuple[float, float]:
        """Mean KL and entropy of a completion in the current step, over all processes."""
        _nll, kl, entropy, _tokens, completions = accelerator.reduce(self._step.to(accelerator.device)).tolist()
        return kl / completions, entropy / completions

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Means per token since the last drain, over all processes; NaN, also for the loss, where there was none."""
        *sums, tokens, _completions = accelerator.reduce(self._logged.to(accelerator.device)).tolist()
        self._logged = torch.zeros_like(self._logged)
        if not tokens:
            return dict.fromkeys((*self.names, "loss"), math.nan)
        return {name: value / tokens for name, value in zip(self.names, sums, strict=True)}
