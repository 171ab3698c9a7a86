"""A few of the best and worst completions of each iteration, on the console and as a table in trackers."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import TrainerCallback

from quarkrl.algorithm.pool_table import choose_extremes
from quarkrl.data.chats import displayed
from quarkrl.errors import truncate
from quarkrl.runs.records import continues_prompts
from quarkrl.training.progress import Progress

_WIDTH = 200  # Characters of a completion on the console.


class CompletionLog(TrainerCallback):
    """Shows the best and worst completions of an exploration, which it reads from the pool's file.

    Args:
        progress: shows lines on the console.
    """

    def __init__(self, progress: Progress):
        self._progress = progress

    def on_log(self, args, state, control, logs=None, **_):
        """Show completions after an exploration, in the first process."""
        is_exploration = logs is not None and "unscored" in logs and "iteration" in logs
        if not (is_exploration and args.log_completions and state.is_world_process_zero):
            return
        number = logs["iteration"]
        table = pq.read_table(Path(args.output_dir) / "pool" / f"iteration-{number:06d}.parquet")
        if "completion" not in table.column_names:  # Written by an older version.
            return
        rows = choose_extremes(table, args.log_completions)
        if self._progress.enabled:
            for row in rows:
                self._progress.note(_line(number, row, continues_prompts(Path(args.output_dir))))
        _send_to_trackers(args.report_to, number, state.global_step, rows)


def _line(number: int, row: dict[str, Any], is_continued: bool) -> str:
    figures = " ".join(f"{value:.3f}" for name, value in row.items() if name not in ("rank", "prompt", "completion"))
    text = " ".join("".join(displayed(row["prompt"], row["completion"], is_continued)).split())
    return f"iteration {number + 1}  {row['rank']:<5} {figures}  {truncate(text, _WIDTH)}"


def _send_to_trackers(report_to: list[str], number: int, step: int, rows: list[dict[str, Any]]) -> None:
    """Log a table `completions` to the trackers that have tables, and are in use."""
    rows = [{"iteration": number, **row} for row in rows]
    columns = list(rows[0])
    values = [[row[name] for name in columns] for row in rows]
    if "wandb" in report_to and (wandb := sys.modules.get("wandb")) and wandb.run is not None:
        wandb.log({"completions": wandb.Table(columns=columns, data=values)}, commit=False)
    if "trackio" in report_to and (trackio := sys.modules.get("trackio")):
        pandas = importlib.import_module("pandas")
        trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(rows))}, step=step)
    if "mlflow" in report_to and (mlflow := sys.modules.get("mlflow")) and mlflow.active_run() is not None:
        data = {name: [row[name] for row in rows] for name in columns}
        mlflow.log_table(data, artifact_file="completions.json")
