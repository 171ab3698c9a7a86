"""The progress of a run on the console: bars for exploring, scoring and learning, and a line per iteration."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress as Bars
from transformers import TrainerCallback

from quarkrl.errors import format_seconds
from quarkrl.training.bars import new_bars
from quarkrl.training.time_left import TimeLeft, TimePlan

logger = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """Shows bars with current figures, and prints one line at the end of each iteration.

    Args:
        enabled: False shows only what is passed to `note`.
        console: the console to write to; standard error by default.

    Attributes:
        start_notes: lines to show and to log when training begins.
        plan: the estimated time of the run. The first exploration corrects it, and then it is None.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None):
        self.enabled = enabled
        self.console = console or Console(stderr=True, highlight=False)
        self.start_notes: list[str] = []
        self.plan: TimePlan | None = None
        self._bars: Bars | None = None
        self._explored_logs: dict[str, Any] = {}
        self._learned_logs: dict[str, Any] = {}
        self._rewards: list[float] = []
        self._time_left = TimeLeft()
        self._measured_steps = 0
        self._passes = self._sampled = 0
        self._sampling_start = 0.0

    @contextmanager
    def sampling(self, title: str, total: int, passes: int = 0) -> Iterator[None]:
        """Show bars for sampling and scoring `total` completions.

        Args:
            title: what they are for.
            total: their number.
            passes: the forward passes per token of an exploration. Its first completions correct the plan.
        """
        self._rewards, self._passes = [], passes
        self._sampled, self._sampling_start = 0, time.perf_counter()
        bars = self._open()
        self._explore = bars.add_task(f"{title}  explore", total=total, figures="")
        self._score = bars.add_task(f"{title}  score", total=total, figures="")
        try:
            yield
        finally:
            self.close()

    def advance_sampling(self, count: int) -> None:
        """Advance the bar of sampling by `count` completions."""
        if self._bars:
            self._bars.advance(self._explore, count)
        if self.plan and self._passes:
            self._sampled += count
            seconds = time.perf_counter() - self._sampling_start
            if seconds >= _LEAST_SECONDS:
                correction, self.plan = self.plan.correct(seconds, self._sampled, self._passes), None
                if correction and self.enabled:
                    self.note(correction)

    def advance_scoring(self, rewards: np.ndarray) -> None:
        """Advance the bar of scoring by a batch.

        Args:
            rewards: `(n, A)`; non-finite ones are left out of the mean.
        """
        if self._bars:
            self._rewards += rewards[np.isfinite(rewards).all(axis=1)].mean(axis=1).tolist()
            mean = np.mean(self._rewards) if self._rewards else np.nan
            self._bars.update(self._score, advance=len(rewards), figures=f"reward {mean:.3f}")

    def _open(self) -> Bars:
        self.close()  # An evaluation within an iteration comes while the bar of learning is open.
        self._bars = new_bars(self.console, enabled=self.enabled)
        self._bars.start()
        return self._bars

    def close(self) -> None:
        """Remove the bars, at the end of a phase or when an error ends the run."""
        if self._bars:
            self._bars.stop()
            self._bars = None

    def note(self, text: str) -> None:
        """Print a line, even if the bars are disabled."""
        self.console.print(text, soft_wrap=True, markup=False)

    def show_start_notes(self) -> None:
        """Show and log the notes about the run, each once."""
        notes, self.start_notes = self.start_notes, []
        for text in notes:
            logger.info(text)
            if self.enabled:
                self.note(text)

    def on_train_begin(self, args, state, control, **_):
        """Show and log the notes about the run, in the first process."""
        if state.is_world_process_zero:
            self.show_start_notes()

    # While learning, an epoch is an iteration.

    def on_step_begin(self, args, state, control, **_):
        """Show the bar of learning at the iteration's first step."""
        if self._bars is None and state.is_world_process_zero:
            bars = self._open()
            number = state.global_step // args.steps_per_iteration + 1
            self._learn = bars.add_task(f"iteration {number}  learn", total=args.steps_per_iteration, figures="")
            bars.advance(self._learn, state.global_step % args.steps_per_iteration)
        self._time_left.begin_step()

    def on_step_end(self, args, state, control, **_):
        """Advance the bar of learning, and say once how long the run will take."""
        self._time_left.end_step()
        if self._bars:
            self._bars.advance(self._learn)
        self._measured_steps += 1
        seconds = self._time_left.seconds(args, state.global_step)
        shown = self.enabled and state.is_world_process_zero and self._measured_steps == _STEPS_OF_FIRST_ESTIMATE
        if shown and seconds is not None:
            self.note(f"time: about {format_seconds(seconds)} left, without evaluations")

    def on_log(self, args, state, control, logs=None, **_):
        """Show the latest metrics, and keep them for the line of the iteration."""
        logs = logs or {}
        if "unscored" in logs:
            self._explored_logs = logs
            if "seconds_sample" in logs:  # Not if the iteration was recalled from disk.
                self._time_left.explored(args, logs)
        elif "distill_guidance_scale" in logs:  # There are no rewards, and the latest would look like this iteration's.
            self._explored_logs = {"distils γ": logs["distill_guidance_scale"]}
        elif "pool_size" in logs:  # Nothing was explored.
            self._explored_logs = {"pool_size": logs["pool_size"]}
        elif "nll" in logs:
            self._learned_logs = logs
            if self._bars:
                figures = "  ".join(f"{name} {logs[name]:.3f}" for name in ("nll", "kl") if name in logs)
                self._bars.update(self._learn, figures=figures)
        elif any(name.startswith("eval_") for name in logs) and self.enabled and state.is_world_process_zero:
            self._print("  held out", {n: v for n, v in logs.items() if "reward" in n})

    def on_epoch_end(self, args, state, control, **_):
        """Close the bars, and print the line of the iteration."""
        self.close()
        if not self.enabled or not state.is_world_process_zero:
            return
        shown = {n: v for n, v in self._explored_logs.items() if n not in _HIDDEN_FIGURES}
        if "eos_share" in self._explored_logs and args.min_completion_length < args.max_completion_length:
            shown["cut off"] = f"{1 - self._explored_logs['eos_share']:.0%}"  # at the length limit, without EOS
        shown |= {n: self._learned_logs[n] for n in ("nll", "kl") if n in self._learned_logs}
        if seconds := self._time_left.seconds(args, state.global_step):
            shown["left"] = format_seconds(seconds)
        number = -(-state.global_step // args.steps_per_iteration)
        self._print(f"iteration {number}/{args.total_iterations}", shown)

    def _print(self, title: str, figures: dict[str, Any]) -> None:
        text = "  ".join(f"{name} {_format(value)}" for name, value in figures.items())
        self.note(f"{title}  {text}")


# The first steps are slower than later ones. A few give an estimate early.
_STEPS_OF_FIRST_ESTIMATE = 5
_LEAST_SECONDS = 2.0  # Completions of a shorter time say little about the speed.
_HIDDEN_FIGURES = ("iteration", "epoch", "seconds_sample", "seconds_score", "eos_share", "completion_length")


def _format(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
