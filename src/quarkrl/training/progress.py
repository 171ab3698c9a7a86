"""What a run shows and writes while it goes: bars for explore, score and learn, and `metrics.jsonl`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback


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
