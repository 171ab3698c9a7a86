"""metrics.jsonl after a resumed run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.files import files_of

from quarkrl.training.metrics_log import LogEachIteration, MetricsFile


def test_metrics_go_back_to_where_they_were_and_are_rewritten_where_they_are_shorter(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.truncate(0, [])
    assert files_of(tmp_path) == set()
    metrics.path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    metrics.truncate(12, [])
    assert metrics.path.read_text() == '{"step": 1}\n'
    metrics.truncate(24, [{"step": 1}, {"step": 2}])
    assert metrics.path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("logging_steps", "expected"),
    [
        (500, [10, 20, 30]),  # No step of a short run is logged otherwise.
        (20, [10, 30]),  # Step 20 has an entry already.
        (4, []),  # Every iteration has one.
    ],
)
def test_an_iteration_without_a_log_entry_gets_one_at_its_end(logging_steps, expected):
    args = SimpleNamespace(steps_per_iteration=10, logging_strategy="steps")
    logged = []
    for step in range(1, 31):
        control = SimpleNamespace(should_log=False)
        state = SimpleNamespace(global_step=step, logging_steps=logging_steps)
        LogEachIteration().on_step_end(args, state, control)
        logged += [step] if control.should_log else []
    assert logged == expected
