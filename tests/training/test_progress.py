"""The progress of a run on a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
from rich.console import Console

from quarkrl.training.progress import Progress


def test_an_evaluation_within_an_iteration_replaces_the_bar_of_learning():
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = Progress(console=console)
    args = SimpleNamespace(steps_per_iteration=4, num_iterations=1)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    progress.on_step_begin(args, state, None)
    learning = progress._bars
    with progress.sampling("held out", 8):
        assert not learning.live.is_started
        progress.advance_sampling(8)
        progress.advance_scoring(np.ones((8, 1)))
    state.global_step = 1
    progress.on_step_begin(args, state, None)
    (task,) = progress._bars.tasks
    assert (task.description, task.completed) == ("iteration 1  learn", 1)
    progress.close()


def test_a_metric_whose_name_looks_like_markup_is_shown_as_it_is():
    console = Console(file=io.StringIO(), width=200)
    progress = Progress(console=console)
    progress._print("iteration 0/1", {"metric.[/acc]": 1.0, "metric.acc[top]": 2.0})
    assert "metric.[/acc] 1" in console.file.getvalue() and "metric.acc[top] 2" in console.file.getvalue()


def test_the_line_of_an_iteration_says_what_is_cut_off_at_the_length_limit():
    state = SimpleNamespace(global_step=4, is_world_process_zero=True)
    for shortest, expected in ((3, "cut off 75%"), (20, "unscored 0")):  # Without EOS all of them are, by choice.
        console = Console(file=io.StringIO(), width=200)
        progress = Progress(console=console)
        args = SimpleNamespace(steps_per_iteration=4, total_iterations=2, max_completion_length=20)
        args.min_completion_length = shortest
        progress.on_log(args, state, None, {"iteration": 0, "reward": 0.5, "unscored": 0, "eos_share": 0.25})
        progress.on_epoch_end(args, state, None)
        assert console.file.getvalue().strip().endswith(expected)
