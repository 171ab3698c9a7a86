"""The files of a run, read for its report. Each may be missing: the run may be young, old, or still going."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from quarkrl.errors import UserError
from quarkrl.report.pool_history import PoolHistory, read_pool_history
from quarkrl.report.saved_results import SavedResults, read_results
from quarkrl.runs.records import METRICS_FILE, OPTIONS_FILE, RUN_FILE, holds_run, list_checkpoints, near_run

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class RunFiles:
    """What a run has written.

    Attributes:
        directory: of the run.
        options: the options that the user set, from config.yaml.
        identity: run.json: all options that the result depends on, digests, rewards, versions.
        facts: quark.json beside the weights of final/, or of the last checkpoint.
        logs: the rows of metrics.jsonl.
        history: the pool, iteration by iteration; None without samples.
        results: the evaluation at the end of the run; None without one.
    """

    directory: Path
    options: dict[str, Any]
    identity: dict[str, Any]
    facts: dict[str, Any]
    logs: list[dict[str, Any]]
    history: PoolHistory | None
    results: SavedResults | None

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.directory.resolve().name

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its final model."""
        return (self.directory / "final").is_dir()

    @property
    def recorded_options(self) -> dict[str, Any]:
        """The options that the result depends on, defaults included."""
        return self.identity.get("options") or {}

    @property
    def num_iterations(self) -> int | None:
        """The number of iterations that the run has in all."""
        return self.identity.get("num_iterations")

    @property
    def rewards(self) -> list[str]:
        """The names of the rewards."""
        rewards = self.identity.get("rewards") or []
        return [str(reward.get("name", "reward")) for reward in rewards if isinstance(reward, dict)]

    @cached_property
    def tokenizer_source(self) -> str | None:
        """A directory or name from which the run's tokenizer can be loaded."""
        for directory in (self.directory / "final", *reversed(list_checkpoints(self.directory))):
            if (directory / "tokenizer_config.json").is_file():
                return str(directory)
        return self.options.get("model")

    def logged(self, name: str) -> list[tuple[int, float]]:
        """Return the steps and values of a logged figure."""
        rows = ((row.get("step"), row.get(name)) for row in self.logs)
        return [(step, value) for step, value in rows if isinstance(step, int) and isinstance(value, int | float)]

    def logged_by_iteration(self, name: str) -> list[tuple[float, float]]:
        """Return iterations, from 1, and values of a figure that is logged once per iteration, after exploring."""
        rows = ((row["iteration"] + 1, row.get(name)) for row in self.logs if "iteration" in row)
        return [(float(number), float(value)) for number, value in rows if isinstance(value, int | float)]


def read_run(directory: str | os.PathLike) -> RunFiles:
    """Read the files of a run.

    Raises:
        UserError: the directory holds no run, or a pool file is damaged.
    """
    run = Path(directory)
    if not run.is_dir():
        hint = near_run(run) or " Name the --output_dir of one."
        raise UserError(f"run {str(directory)!r}: must be the directory of a run.{hint}")
    if not holds_run(run):
        raise UserError(
            f"run {str(directory)!r}: must hold samples or a model. Name the --output_dir of a run that has begun."
        )
    identity = _read_json(run / RUN_FILE)
    homes = [run / "final", *reversed(list_checkpoints(run))]
    return RunFiles(
        directory=run,
        options=_read_options(run / OPTIONS_FILE),
        identity=identity,
        facts=next(filter(None, (_read_json(home / "quark.json") for home in homes)), {}),
        logs=_read_logs(run / METRICS_FILE),
        history=read_pool_history(run / "pool", identity.get("options") or {}),
        results=read_results(run / RESULTS_FILE),
    )


def _read_options(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError):
        return {}
    return options if isinstance(options, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none that can be read, since a report shows what it has."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_logs(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; the last line of a run that goes on may be incomplete."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
