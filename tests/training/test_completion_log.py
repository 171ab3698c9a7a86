"""The best and worst completions after each exploration: on the console, in the pool's files, and how many."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.eight_letters import PROMPTS
from helpers.runs import share_of_a, small_trainer
from rich.console import Console

from quarkrl.algorithm.pool_table import choose_extremes


@pytest.fixture
def lines(tmp_path):
    """Run a small run; return what it prints to the console."""

    def run(**options) -> list[str]:
        trainer = small_trainer(tmp_path, share_of_a, disable_tqdm=False, **options)
        trainer.progress.console = Console(file=io.StringIO(), width=80)
        trainer.train()
        return trainer.progress.console.file.getvalue().splitlines()

    return run


def test_a_run_shows_the_best_and_the_worst_completion_and_writes_all_texts(lines, tmp_path):
    shown = [line for line in lines() if "  best " in line or "  worst " in line]
    assert [line.split()[1:3] for line in shown] == [[str(i), rank] for i in (1, 2) for rank in ("best", "worst")]
    table = pq.read_table(tmp_path / "pool/iteration-000000.parquet")
    best = table.to_pylist()[table["reward"].to_numpy().argmax()]
    assert shown[0].startswith(f"iteration 1  best  {best['reward']:.3f}  ")
    assert set(table["prompt"].to_pylist()) <= set(PROMPTS)
    # The texts are those that the reward has read: words, of which it counts "a".
    for row in table.to_pylist():
        assert row["completion"].split().count("a") == row["completion_ids"].count(0)


def test_no_completions_are_shown_with_log_completions_0(lines):
    assert not [line for line in lines(log_completions=0) if "  best " in line]


def test_no_completion_is_shown_twice():
    table = pa.table({"reward": [0.2, 0.5, 0.1], "prompt": ["p"] * 3, "completion": ["a", "b", "c"]})
    assert [(row["rank"], row["completion"]) for row in choose_extremes(table, 5)] == [
        ("best", "b"),
        ("best", "a"),
        ("worst", "c"),
    ]
