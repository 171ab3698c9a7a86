"""An evaluation on disk: `results.json` with figures and protocol, `results.parquet` beside it with completions."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from quarkrl.errors import UserError
from quarkrl.storage.json import nan_to_null

if TYPE_CHECKING:
    from quarkrl.evaluation.evaluate import Evaluation


def save(evaluation: "Evaluation", path: str | os.PathLike) -> None:
    """Write both files, each whole or not at all; the JSON comes last and names the other.

    Args:
        evaluation: what to save.
        path: of the JSON; the Parquet file has its name, with another suffix.

    Raises:
        UserError: the path is a directory, or ends in .parquet.
    """
    target, completions = checked_output(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    table = completions_table(evaluation)
    _write(completions, lambda file: pq.write_table(table, file))
    document = {
        "protocol": evaluation.protocol,
        "results": [
            {
                "prompts": row.prompts_name,
                "name": row.name,
                "quantile": row.quantile,
                "guidance_scale": row.guidance_scale,
                "figures": row.figures,
                "intervals": row.intervals,
                "left_out": row.left_out,
            }
            for row in evaluation.rows
        ],
        "corpus": [
            {
                "name": row.name,
                "tokens": row.tokens,
                "figures": row.figures,
                "intervals": row.intervals,
                "left_out": row.left_out,
            }
            for row in evaluation.corpus
        ],
        "completions": completions.name,
    }
    text = json.dumps(nan_to_null(document), indent=1, ensure_ascii=False) + "\n"
    _write(target, lambda file: file.write(text.encode("utf-8")))


def checked_output(path: str | os.PathLike) -> tuple[Path, Path]:
    """Where the JSON and the Parquet file go.

    Raises:
        UserError: the path is a directory, ends in .parquet, or leads through a file.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"output {str(path)!r} is a directory: want the name of a file")
    if target.suffix == ".parquet":
        raise UserError(f"output {str(path)!r}: want a name that ends in .json; the .parquet file comes beside it")
    if not (folder := next(parent for parent in target.absolute().parents if parent.exists())).is_dir():
        raise UserError(f"output {str(path)!r}: {str(folder)!r} is no directory")
    return target, target.with_suffix(".parquet")


def completions_table(evaluation: "Evaluation") -> pa.Table:
    """A line for each completion: where it came from, its text, its perplexity and its scores.

    Scores are named "reward", "reward: NAME" for each of several rewards, and "NAME" for a judge.
    """
    columns: dict[str, list[Any]] = {}
    names = {name: None for row in evaluation.rows for name in row.scores}
    for row in evaluation.rows:
        prompts = evaluation.prompt_sets[row.prompts_name].prompts
        count, samples = row.rewards.shape
        said = [prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
        lines = count * samples
        values: dict[str, list[Any]] = {
            "prompts": [row.prompts_name] * lines,
            "prompt_number": [i for i in range(count) for _ in range(samples)],
            "prompt": [prompt for prompt in said for _ in range(samples)],
            "row": [row.name] * lines,
            "quantile": [row.quantile] * lines,
            "guidance_scale": [row.guidance_scale] * lines,
            "sample": list(range(samples)) * count,
            "completion": [text for texts in row.completions for text in texts],
            "perplexity": _nullable(row.perplexities.ravel().tolist()),
            **{name: _nullable(row.scores[name].ravel().tolist()) for name in names},
        }
        for name, column in values.items():
            columns.setdefault(name, []).extend(column)
    types = {"quantile": pa.int64(), "guidance_scale": pa.float64()}
    types |= {name: pa.float64() for name in ("perplexity", *names)}
    return pa.table({name: pa.array(column, types.get(name)) for name, column in columns.items()})


def _nullable(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _write(target: Path, write: Callable[[BinaryIO], Any]) -> None:
    temporary = target.with_name(target.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
