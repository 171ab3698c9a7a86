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
    assert (task.description, task.completed) == ("iteration 0  learn", 1)
    progress.close()


def test_a_metric_whose_name_looks_like_markup_is_shown_as_it_is():
    console = Console(file=io.StringIO(), width=200)
    progress = Progress(console=console)
    progress._print("iteration 0/1", {"metric.[/acc]": 1.0, "metric.acc[top]": 2.0})
    assert "metric.[/acc] 1" in console.file.getvalue() and "metric.acc[top] 2" in console.file.getvalue()
