"""The results of an evaluation, in memory and on disk.

`Evaluation.save` writes results.json with figures and protocol, and results.parquet with the completions.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quarkrl.data.chats import prompt_text
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.intervals import Interval
from quarkrl.storage.atomic import atomic_file, write_text
from quarkrl.storage.json import nan_to_null

# The columns of the table of completions that precede the scores.
_FIRST_SCORE = 9


class Point(Protocol):
    """What `curves` needs to know of a row."""

    @property
    def quantile(self) -> int | None:
        """The number of the requested quantile."""

    @property
    def guidance_scale(self) -> float:
        """γ; 1 is unguided."""


AnyPoint = TypeVar("AnyPoint", bound=Point)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The figures of S completions of each of P prompts.

    Attributes:
        figures: metric name → value; NaN if no completion counts.
        intervals: metric name → 95 % bootstrap confidence interval over prompts.
        left_out: reason → number of completions that do not count.
        truncated: number of completions that the perplexity model read with a truncated prompt, to fit its context.
            They count.
        scores: "reward", "reward: NAME" for each of several rewards, "NAME" for each judge → `(P, S)`, NaN if missing.
        perplexities: `(P, S)`, NaN for a completion that is empty or dropped.
    """

    figures: dict[str, float]
    intervals: dict[str, Interval]
    left_out: dict[str, int]
    truncated: int
    scores: dict[str, np.ndarray]
    perplexities: np.ndarray

    @property
    def rewards(self) -> np.ndarray:
        """`(P, S)`, NaN if missing."""
        return self.scores["reward"]


@dataclass(frozen=True, kw_only=True)
class Row(Measurement):
    """The measurement of one model, with one requested quantile and guidance scale, on one set of P prompts.

    Attributes:
        name: "reference"; "model" for a model without quantiles; the requested quantile; or "best γ=2" with guidance.
        completions: S texts for each prompt.
        prompts_name: name of the set of prompts.
        quantile: number of the requested quantile; None for a model without quantiles.
        guidance_scale: γ; 1 is unguided. NaN if each reward has its own, which the name says.
    """

    name: str
    completions: list[list[str]]
    prompts_name: str
    quantile: int | None
    guidance_scale: float


@dataclass(frozen=True)
class CorpusRow:
    """How well one model, with one requested quantile, predicts human-written texts.

    Attributes:
        name: "reference", "model" or the requested quantile.
        figures: metric name → value.
        intervals: metric name → 95 % bootstrap confidence interval over texts.
        left_out: reason → number of texts that do not count.
        tokens: number of predicted tokens.
    """

    name: str
    figures: dict[str, float]
    intervals: dict[str, Interval]
    left_out: dict[str, int]
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """All rows of an evaluation, and the protocol that produced them.

    Attributes:
        rows: for each set of prompts, the reference and the variants of the model.
        protocol: the settings that the figures depend on.
        prompt_sets: set name → the prompts that were used.
        corpus: the rows of the corpus, if there is one.
    """

    rows: list[Row]
    protocol: dict[str, Any]
    prompt_sets: dict[str, Prompts]
    corpus: list[CorpusRow] = field(default_factory=list)

    @property
    def prompts(self) -> Prompts:
        """The first set of prompts, which is in-domain."""
        return next(iter(self.prompt_sets.values()))

    def rows_of(self, prompts_name: str) -> list[Row]:
        """Return the rows of one set of prompts."""
        return [row for row in self.rows if row.prompts_name == prompts_name]

    def save(self, path: str | os.PathLike) -> None:
        """Write the figures and the protocol as JSON, and the completions as Parquet beside it.

        Each file is written atomically. The JSON file comes last and names the Parquet file.

        Args:
            path: the JSON file; the Parquet file has the same name with the suffix .parquet.

        Raises:
            UserError: `path` is a directory, ends in .parquet, or cannot be written.
        """
        json_path, parquet_path = output_paths(path)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        table = completions_table(self)
        with atomic_file(parquet_path) as file:
            pq.write_table(table, file)
        document = {
            "protocol": self.protocol,
            "results": [_row_entry(row) for row in self.rows],
            "corpus": [_corpus_entry(row) for row in self.corpus],
            "completions": parquet_path.name,
        }
        write_text(json_path, json.dumps(nan_to_null(document), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike, prompt_sets: dict[str, Prompts]) -> "Evaluation":
        """Read the rows and the protocol that `save` wrote; the rows of a corpus are left out.

        Args:
            path: the JSON file.
            prompt_sets: the prompts of the evaluation, which the files have as text only.

        Raises:
            OSError, ValueError, KeyError, TypeError: a file is missing or damaged.
        """
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        table = pq.read_table(Path(path).with_name(document["completions"]))
        return cls([_read_row(entry, table) for entry in document["results"]], document["protocol"], prompt_sets)


def curves(rows: Sequence[AnyPoint]) -> list[tuple[str, list[tuple[float, AnyPoint]]]]:
    """Return the curves in the rows of one set of prompts: label, and points of requested value and row, in order.

    The requested quantile with three or more points, and the guidance scale with two or more.
    """
    unguided = {row.quantile: row for row in rows if row.quantile is not None and row.guidance_scale == 1}
    guided = [row for row in rows if row.guidance_scale != 1 and not math.isnan(row.guidance_scale)]
    labelled: list[tuple[str, list[tuple[float, AnyPoint]]]] = []
    if len(unguided) > 2:
        labelled.append(("requested quantile", [(float(q), unguided[q]) for q in sorted(unguided)]))
    same_quantile = [row for row in unguided.values() if guided and row.quantile == guided[0].quantile]
    if guided and len(same_quantile) + len(guided) > 1:
        points = sorted(((row.guidance_scale, row) for row in [*same_quantile, *guided]), key=lambda point: point[0])
        labelled.append(("guidance scale γ", points))
    return labelled


def no_curve() -> UserError:
    """The error for a plot without a curve."""
    return UserError(
        "plot: there is no curve to draw. It needs three different quantiles (--quantiles all), or two guidance scales "
        "(--guidance_scales 1 2 4)."
    )


def output_paths(path: str | os.PathLike) -> tuple[Path, Path]:
    """Check where an evaluation is to be saved; return the paths of the JSON and the Parquet file.

    Raises:
        UserError: `path` is a directory, ends in .parquet, or has a parent that is a file.
    """
    json_path = Path(path)
    if json_path.is_dir():
        raise UserError(f"output {str(path)!r}: must be a file, not a directory. Append a file name, such as x.json.")
    if json_path.suffix == ".parquet":
        raise UserError(
            f"output {str(path)!r}: must end in .json. The completions go to a .parquet file of the same name."
        )
    parent = next(parent for parent in json_path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"output {str(path)!r}: {str(parent)!r} is a file, not a directory. Choose another directory.")
    return json_path, json_path.with_suffix(".parquet")


def completions_table(evaluation: Evaluation) -> pa.Table:
    """Return one line per completion: its prompt, row, text, perplexity and scores.

    The score columns are "reward", "reward: NAME" for each of several rewards, and "NAME" for each judge.
    """
    score_names = list(dict.fromkeys(name for row in evaluation.rows for name in row.scores))
    columns: dict[str, list[Any]] = {}
    for row in evaluation.rows:
        prompts = evaluation.prompt_sets[row.prompts_name].prompts
        count, samples = row.rewards.shape
        texts = list(map(prompt_text, prompts))
        lines = count * samples
        values: dict[str, list[Any]] = {
            "prompts": [row.prompts_name] * lines,
            "prompt_number": [i for i in range(count) for _ in range(samples)],
            "prompt": [text for text in texts for _ in range(samples)],
            "row": [row.name] * lines,
            "quantile": [row.quantile] * lines,
            "guidance_scale": [row.guidance_scale] * lines,
            "sample": list(range(samples)) * count,
            "completion": [completion for completions in row.completions for completion in completions],
            "perplexity": _nan_to_none(row.perplexities),
            **{name: _nan_to_none(row.scores[name]) for name in score_names},
        }
        for name, column in values.items():
            columns.setdefault(name, []).extend(column)
    types = {"quantile": pa.int64(), "guidance_scale": pa.float64()}
    types |= {name: pa.float64() for name in ("perplexity", *score_names)}
    return pa.table({name: pa.array(column, types.get(name)) for name, column in columns.items()})


def _row_entry(row: Row) -> dict[str, Any]:
    return {
        "prompts": row.prompts_name,
        "name": row.name,
        "quantile": row.quantile,
        "guidance_scale": row.guidance_scale,
        "figures": row.figures,
        "intervals": row.intervals,
        "left_out": row.left_out,
        "truncated": row.truncated,
    }


def _read_row(entry: dict[str, Any], table: pa.Table) -> Row:
    """Return a row from its entry in the JSON file and its lines in the table of completions."""
    of_row = pc.and_(pc.equal(table["row"], entry["name"]), pc.equal(table["prompts"], entry["prompts"]))
    lines = table.filter(of_row)
    samples = 1 + pc.max(lines["sample"]).as_py()

    def values(name: str) -> np.ndarray:
        return np.array(lines[name].to_pylist(), float).reshape(-1, samples)  # None becomes NaN.

    texts = lines["completion"].to_pylist()
    return Row(
        name=entry["name"],
        completions=[texts[start : start + samples] for start in range(0, len(texts), samples)],
        prompts_name=entry["prompts"],
        quantile=entry["quantile"],
        guidance_scale=math.nan if entry["guidance_scale"] is None else entry["guidance_scale"],
        figures={name: math.nan if value is None else value for name, value in entry["figures"].items()},
        intervals={name: _to_interval(ends) for name, ends in entry["intervals"].items()},
        left_out=entry["left_out"],
        truncated=entry["truncated"],
        scores={name: values(name) for name in lines.column_names[_FIRST_SCORE:]},
        perplexities=values("perplexity"),
    )


def _to_interval(ends: Sequence[float | None]) -> Interval:
    low, high = (math.nan if end is None else end for end in ends)
    return low, high


def _corpus_entry(row: CorpusRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "tokens": row.tokens,
        "figures": row.figures,
        "intervals": row.intervals,
        "left_out": row.left_out,
    }


def _nan_to_none(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.ravel().tolist()]
