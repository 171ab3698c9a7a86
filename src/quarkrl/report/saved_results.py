"""An evaluation as `Evaluation.save` wrote it: the figures of results.json, the completions beside it."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class SavedRow:
    """The figures of one model, with one requested quantile and guidance scale (`evaluation.results.Row`)."""

    name: str
    prompts_name: str
    quantile: int | None
    guidance_scale: float
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    def half_width(self, metric: str) -> float:
        """Half of the confidence interval of a figure; NaN without one."""
        low, high = self.intervals.get(metric, (math.nan, math.nan))
        return (high - low) / 2


@dataclass(frozen=True)
class SavedResults:
    """All figures of an evaluation.

    Attributes:
        rows: in the order of the evaluation.
        protocol: the settings that the figures depend on.
        completions: one line per completion (`evaluation.results.completions_table`); None if the file is missing.
    """

    rows: list[SavedRow]
    protocol: dict[str, Any]
    completions: pa.Table | None

    @property
    def prompt_sets(self) -> list[str]:
        """The names of the sets of prompts; the first is in-domain."""
        return list(dict.fromkeys(row.prompts_name for row in self.rows))

    @property
    def extent(self) -> str:
        """What the figures were measured on: prompts, and samples of each."""
        prompts = self.protocol.get("prompts", {}).get(self.prompt_sets[0], {}).get("count")
        samples = self.protocol.get("samples_per_prompt")
        return f"{prompts} held-out prompts × {samples}" if prompts and samples else "held-out prompts"

    @property
    def first_rows(self) -> list[SavedRow]:
        """The rows of the first set of prompts."""
        return [row for row in self.rows if row.prompts_name == self.prompt_sets[0]]

    @property
    def before(self) -> SavedRow | None:
        """The reference."""
        return next((row for row in self.first_rows if row.name == "reference"), None)

    @property
    def after(self) -> SavedRow | None:
        """The policy on its best quantile, without guidance."""
        plain = [row for row in self.first_rows if row.name != "reference" and row.guidance_scale == 1]
        named = [row for row in plain if row.name in ("best", "model")]
        ranked = sorted((row for row in plain if row.quantile is not None), key=lambda row: row.quantile or 0)
        return next(iter([*named, *ranked[::-1]]), None)

    @property
    def worst(self) -> SavedRow | None:
        """The policy on its worst quantile, without guidance."""
        rows = [row for row in self.first_rows if row.quantile == 0 and row.guidance_scale == 1]
        return rows[0] if rows else None


def read_results(path: str | os.PathLike) -> SavedResults | None:
    """Read an evaluation; None if the file is missing or another program wrote it."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = [_row(entry) for entry in document["results"]]
        protocol, parquet = document["protocol"], path.with_name(Path(document["completions"]).name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return SavedResults(rows, protocol, _read_completions(parquet)) if rows else None


def _read_completions(path: Path) -> pa.Table | None:
    try:
        return pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException):
        return None


def _row(entry: dict[str, Any]) -> SavedRow:
    return SavedRow(
        name=str(entry["name"]),
        prompts_name=str(entry["prompts"]),
        quantile=entry["quantile"],
        guidance_scale=_number(entry["guidance_scale"]),
        figures={str(name): _number(value) for name, value in entry["figures"].items()},
        intervals={str(name): _pair(ends) for name, ends in entry["intervals"].items()},
    )


def _pair(ends: Sequence[float | None]) -> tuple[float, float]:
    low, high = ends
    return _number(low), _number(high)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
