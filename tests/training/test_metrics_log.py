"""metrics.jsonl after a resumed run."""

from __future__ import annotations

from helpers.files import files_of

from quarkrl.training.metrics_log import MetricsFile


def test_metrics_go_back_to_where_they_were_and_are_rewritten_where_they_are_shorter(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.truncate(0, [])
    assert files_of(tmp_path) == set()
    metrics.path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    metrics.truncate(12, [])
    assert metrics.path.read_text() == '{"step": 1}\n'
    metrics.truncate(24, [{"step": 1}, {"step": 2}])
    assert metrics.path.read_text() == '{"step": 1}\n{"step": 2}\n'
