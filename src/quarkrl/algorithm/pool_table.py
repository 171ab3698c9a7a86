"""The pool of a run as one Arrow table with texts, for people: read from its files while the run goes on, too."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quarkrl.algorithm.pool import find_edges
from quarkrl.errors import UserError, one_line

_IDS, _TEXTS = ("prompt_ids", "completion_ids"), ("prompt", "completion")

# From token ids of prompts and of completions to the texts of both.
Decode = Callable[[list[list[int]], list[list[int]]], tuple[Sequence[str], Sequence[str]]]


def read_pool_table(
    directory: str | os.PathLike, num_quantiles: int, ceiling: float | None = None, decode: Decode | None = None
) -> pa.Table:
    """Read the samples of a run.

    Args:
        directory: the `pool/` of the run.
        num_quantiles: K.
        ceiling: `reward_ceiling` of the run.
        decode: makes the texts of files that an older version wrote without them.

    Returns:
        A row per sample: `iteration`, `quantile` as of the latest iteration, the rewards (`attributes_of`), `prompt`
        and `completion`. Each of several attributes has a column `quantile.NAME`. `score.NAME` and `extra.NAME` are
        there if the run has written them. The prompt of a chat is the JSON of its messages.

    Raises:
        UserError: there are no samples, or a file is damaged.
    """
    paths = sorted(Path(directory).glob("iteration-*.parquet"))
    if not paths:
        raise UserError(f"{directory}: must hold samples, and has none yet. Wait for the end of the first exploration.")
    table = pa.concat_tables([_read(path, decode) for path in paths], promote_options="default")
    names = attributes_of(table)
    for name in names:
        rewards = table[name].to_numpy()
        edges = find_edges(rewards, num_quantiles, ceiling) if len(rewards) >= num_quantiles else np.zeros(0)
        quantiles = np.searchsorted(edges, rewards, side="right").astype(np.int16)
        table = table.append_column("quantile" if len(names) == 1 else f"quantile.{name}", pa.array(quantiles))
    return table


def attributes_of(table: pa.Table) -> list[str]:
    """Return the names of the columns with rewards by which the quantiles are cut."""
    others = {"iteration", "quantile", *_IDS, *_TEXTS}
    return [name for name in table.column_names if name not in others and "." not in name]


def choose_extremes(table: pa.Table, count: int) -> list[dict[str, Any]]:
    """Return `count` rows with the highest and `count` with the lowest reward, none twice, with `rank` added."""
    names = attributes_of(table)
    rewards = np.mean([table[name].to_numpy() for name in names], axis=0)
    order = np.argsort(rewards, kind="stable")
    worst = order[: min(count, len(order) // 2)]
    best = order[len(worst) :][::-1][:count]
    columns = [*names, "prompt", "completion"]
    chosen = table.select(columns).take(np.concatenate([best, worst])).to_pylist()
    ranks = ["best"] * len(best) + ["worst"] * len(worst)
    return [{"rank": rank, **row} for rank, row in zip(ranks, chosen, strict=True)]


def _read(path: Path, decode: Decode | None) -> pa.Table:
    try:
        names = pq.read_schema(path).names
        has_texts = set(_TEXTS) <= set(names)
        table = pq.read_table(path, columns=[name for name in names if name not in _IDS] if has_texts else None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: must be an undamaged pool file ({one_line(error)}). Restore it.") from error
    if not has_texts and decode is not None:
        for name, texts in zip(_TEXTS, decode(*(table[ids].to_pylist() for ids in _IDS)), strict=True):
            table = table.append_column(name, pa.array(texts, pa.string()))
    table = table.select([name for name in table.column_names if name not in _IDS]).replace_schema_metadata(None)
    number = int(path.stem.rpartition("-")[2])
    return table.add_column(0, "iteration", pa.array(np.full(len(table), number, np.int32)))
