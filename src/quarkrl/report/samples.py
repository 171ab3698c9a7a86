"""The completions that a report shows: some of each iteration, and prompts that several rows complete."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from quarkrl.data.chats import displayed
from quarkrl.data.encoding import decode_completions
from quarkrl.report.pool_history import PoolHistory
from quarkrl.report.saved_results import SavedResults

MAX_ROWS = 1500
# Characters of HTML that the texts of the table may take: the report stays below 2 MB.
_TEXT_BUDGET = 1_000_000
_KINDS = ("best", "worst", "random")
Tokenizer: TypeAlias = Callable[[], Any | None]


@dataclass(frozen=True)
class SampleRow:
    """A line of the table of completions.

    Attributes:
        iteration: that sampled the completion.
        kind: why it is in the table: best, worst or random among its iteration.
        rewards, quantiles: `(A,)`, by attribute.
        prompt, completion: texts; token ids if the run has no tokenizer.
    """

    iteration: int
    kind: str
    rewards: list[float]
    quantiles: list[int]
    prompt: str
    completion: str


@dataclass(frozen=True)
class SideBySide:
    """Completions of one prompt by several rows of an evaluation.

    Attributes:
        prompt: the text.
        cells: of each row, its text and the reward; None where it has none.
    """

    prompt: str
    cells: list[tuple[str, float | None]]


def choose_rows(history: PoolHistory, tokenizer: Tokenizer, limit: int = MAX_ROWS) -> list[SampleRow]:
    """Choose best, worst and random completions of each iteration, by the first reward.

    Args:
        history: the pool.
        tokenizer: loads what decodes token ids, if the pool has no texts; it may return None, to show the ids.
        limit: the number of rows in all. If there are more iterations than that allows, some are left out evenly.
    """
    numbers = np.array(history.numbers)
    if len(numbers) > (most := max(limit // len(_KINDS), 1)):
        numbers = numbers[np.linspace(0, len(numbers) - 1, most).round().astype(int)]
    per_kind = max(limit // (len(_KINDS) * len(numbers)), 1)
    rng = np.random.default_rng(0)
    # The last iteration first, its best, worst and random samples in turn: that is what readers look for.
    chosen = [pair for number in numbers[::-1] for pair in _choose(history, int(number), per_kind, rng)]
    prompts, completions = _texts(history, [index for index, _ in chosen], tokenizer)
    rows = [
        SampleRow(
            iteration=int(history.iterations[index]),
            kind=kind,
            rewards=history.rewards[index].tolist(),
            quantiles=history.quantiles[index].tolist(),
            prompt=prompt,
            completion=completion,
        )
        for (index, kind), prompt, completion in zip(chosen, prompts, completions, strict=True)
    ]
    return truncate_to_budget(rows, _TEXT_BUDGET)


def _choose(history: PoolHistory, number: int, count: int, rng: np.random.Generator) -> list[tuple[int, str]]:
    """Indices of an iteration's samples, with their kind; equal rewards come in random order."""
    indices = rng.permutation(np.flatnonzero(history.iterations == number))
    ranked = indices[np.argsort(history.rewards[indices, 0], kind="stable")]
    count = min(count, -(-len(ranked) // len(_KINDS)))
    worst, best = ranked[:count], ranked[max(len(ranked) - count, count) :][::-1]
    others = ranked[count : len(ranked) - count]
    random = rng.choice(others, min(count, len(others)), replace=False)
    turns = zip_longest(best, worst, random)
    return [(int(index), kind) for turn in turns for kind, index in zip(_KINDS, turn, strict=True) if index is not None]


def _texts(history: PoolHistory, indices: Sequence[int], tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Prompts and completions as text: those that the run has written, or else decoded; ids without a tokenizer."""
    table = history.table.take(pa.array(indices))
    if "completion" in table.column_names:
        texts = zip(table["prompt"].to_pylist(), table["completion"].to_pylist(), strict=True)
        pairs = [displayed(prompt, completion) for prompt, completion in texts]
        return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]
    prompt_ids, completion_ids = table["prompt_ids"].to_pylist(), table["completion_ids"].to_pylist()
    if (loaded := tokenizer()) is None:
        return [" ".join(map(str, ids)) for ids in prompt_ids], [" ".join(map(str, ids)) for ids in completion_ids]
    prompts = loaded.batch_decode(prompt_ids, skip_special_tokens=True)
    return prompts, decode_completions(loaded, prompt_ids, completion_ids)


def truncate_to_budget(rows: list[SampleRow], budget: int) -> list[SampleRow]:
    """Truncate texts, all to the same length, so that their HTML has at most `budget` bytes."""
    for width in (2000, 1000, 500, 250, 120, 60, 30):
        cut = [replace(row, prompt=_tail(row.prompt, width), completion=_head(row.completion, width)) for row in rows]
        if sum(len(html.escape(row.prompt + row.completion).encode()) for row in cut) <= budget:
            break
    return cut


def _head(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _tail(text: str, width: int) -> str:
    """The end of a prompt, which a completion continues."""
    return text if len(text) <= width else "…" + text[1 - width :]


def choose_side_by_side(results: SavedResults, rude: int = 4, random: int = 4) -> tuple[list[str], list[SideBySide]]:
    """Choose prompts of an evaluation: those of the reference's lowest rewards, and random ones.

    For each prompt, the first row shows its completion of the lowest reward. The others show the same sample number.

    Args:
        results: the evaluation.
        rude: the number of prompts with the lowest rewards.
        random: the number of other prompts.

    Returns:
        The names of the rows that are compared, and the prompts.
    """
    named = {"before": results.before, "best quantile": results.after, "worst quantile": results.worst}
    rows = {name: row for name, row in named.items() if row}
    if results.completions is None or len(rows) < 2:
        return [], []
    lines = [line for line in results.completions.to_pylist() if line["prompts"] == results.prompt_sets[0]]
    texts: dict[tuple[str, int, int], dict[str, Any]] = {
        (line["row"], line["prompt_number"], line["sample"]): line for line in lines
    }
    lowest: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["row"] == next(iter(rows.values())).name and line["reward"] is not None:
            other = lowest.get(line["prompt_number"])
            if other is None or line["reward"] < other["reward"]:
                lowest[line["prompt_number"]] = line
    ranked = sorted(lowest.values(), key=lambda line: line["reward"])
    rest = np.random.default_rng(0).permutation(len(ranked))
    others = [ranked[i] for i in rest if i >= rude][:random]
    chosen = [*ranked[:rude], *others]
    return list(rows), [
        SideBySide(displayed(line["prompt"], "")[0], [_cell(texts, row.name, line) for row in rows.values()])
        for line in chosen
    ]


def _cell(texts: dict, name: str, line: dict[str, Any]) -> tuple[str, float | None]:
    other = texts.get((name, line["prompt_number"], line["sample"]), {})
    return _head(str(other.get("completion", "")), 1000), other.get("reward")
