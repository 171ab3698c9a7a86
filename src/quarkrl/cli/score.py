"""`quarkrl score`: score texts, to examine a reward before training with it."""

import argparse
import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkrl.cli.common import RewardOptions, busy, console, note, progress_bars
from quarkrl.cli.inputs import check_rewards
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.cli.streams import print_json, read_standard_input
from quarkrl.errors import UserError, truncate
from quarkrl.options import check_options, option
from quarkrl.storage.atomic import atomic_file, write_text

if TYPE_CHECKING:
    import numpy as np

    from quarkrl.data.prompts import Prompts
    from quarkrl.rewards.scorer import Scorer, Scores

NAME = "score"
HELP = "score texts, to examine a reward before training with it"

_TEXT_COLUMNS = ("completion", "text", "prompt")
_OUTPUTS = (".jsonl", ".csv", ".parquet")
_BLOCKS, _BINS = "▁▂▃▄▅▆▇█", 30
BATCH_SIZE = 128  # As many texts as a reward receives at a time in training, by default.


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Which texts are scored, and how the scores are printed."""

    column: str | None = option(None, "Column that holds the text (default: completions, completion, text or prompt).")
    skip_bad_prompts: bool = option(False, "Skip invalid rows, and count them.")
    json: bool = option(
        False,
        "Print one JSON object per line: text, or prompt and completion if there are prompts; reward, and what rewards "
        "log.",
    )
    output: str | None = option(None, "Save every text with its reward: .jsonl, .csv or .parquet.", metavar="FILE")
    limit: int = option(3, "Best and worst texts to print, so many of each.", at_least=0)
    reward_timeout: float = option(
        3600.0,
        f"Time limit in seconds for the rewards of {BATCH_SIZE} texts; inf is no limit.",
        above=0,
        infinite=True,
        metavar="SECONDS",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.output is not None and Path(self.output).suffix not in _OUTPUTS:
            raise UserError(f"output {self.output!r}: must end in {', '.join(_OUTPUTS)}. Set --output scores.jsonl.")


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl score`."""
    parser.add_argument(
        "file", help="texts: .txt (one per line), .jsonl, .json, .csv, .tsv, .parquet; - is standard input"
    )
    add_flags(parser, ScoreOptions, RewardOptions)


def run(arguments: argparse.Namespace) -> None:
    """Score each text; print the distribution of the rewards and the best and worst texts, or a line per text."""
    options, reward_options = options_from(arguments, ScoreOptions), options_from(arguments, RewardOptions)
    output = None if options.output is None else Path(options.output).absolute()  # A reward may change the directory.
    rows = _load(arguments.file, options)
    check_rewards(reward_options.reward, reward_options.reward_label)
    with busy(f"loading {' '.join(reward_options.reward)}"):
        scorer = reward_options.scorer(timeout=options.reward_timeout)  # Importing a reward may change the directory.
    with progress_bars("score") as notify:
        scored = _score(rows, scorer, options, notify)
    details = [f"{count} skipped ({reason})" for reason, count in rows.skipped.items()]
    details += [f"{scorer.cache_hits} from cache"] if reward_options.score_cache else []
    details += [f"{name} {sum(values) / len(values):.4f}" for name, values in scored.metrics.items()]
    if output is not None:
        _save(output, scored.rows)
    if options.json:
        note(_summary(scored.rewards, details))
    else:
        _print_report(scored, details, options.limit)
    if output is not None:
        note(f"scores: {output}")


@dataclasses.dataclass
class _Scored:
    """Texts with their rewards.

    Attributes:
        rows: of `--json` and `--output`.
        rewards: `(n,)`; NaN if missing.
        terms: by name, the scores of each of several rewards.
        metrics: by name, the numbers that rewards have logged.
    """

    rows: list[dict[str, Any]]
    rewards: "np.ndarray"
    terms: dict[str, list[float]]
    metrics: dict[str, list[float]]


def _load(file: str, options: ScoreOptions) -> "Prompts":
    from quarkrl.data.prompts import load_prompts

    return load_prompts(
        read_standard_input() if file == "-" else file,
        column=options.column or _TEXT_COLUMNS,
        skip_bad=options.skip_bad_prompts,
        allow_empty=True,  # A completion may be empty, and has a reward.
        split_completions=options.column is None,
        column_option="column",
    )


def _score(rows: "Prompts", scorer: "Scorer", options: ScoreOptions, notify: Any) -> _Scored:
    import numpy as np

    texts = [str(text) for text in rows.prompts]
    prompts = [_prompt_text(prompt) for prompt in rows.columns.get("prompt", [None] * len(texts))]
    scored = _Scored([], np.zeros(0), {}, {})
    for start in range(0, len(texts), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        others = {name: values[part] for name, values in rows.columns.items()}
        scores = scorer(prompts[part], texts[part], [[] for _ in texts[part]], others)
        new = _rows([_texts_of(rows, i) for i in range(len(texts))[part]], scores)
        for row in new if options.json else ():
            print_json(row)
        scored.rows += new
        scored.rewards = np.append(scored.rewards, scores.rewards[:, 0])
        for target, source in ((scored.terms, scores.terms), (scored.metrics, scores.metrics)):
            for name, values in source.items():
                target.setdefault(name, []).extend(values)
        notify("texts", min(start + BATCH_SIZE, len(texts)), len(texts))
    return scored


def _texts_of(rows: "Prompts", index: int) -> dict[str, Any]:
    """The text of a row by the name that `quarkrl train --scored_data` reads: with its prompt, it is a completion."""
    text = str(rows.prompts[index])
    prompt = rows.columns["prompt"][index] if "prompt" in rows.columns else None
    return {"text": text} if prompt is None else {"prompt": _prompt_text(prompt), "completion": text}


def _rows(texts: Sequence[dict[str, Any]], scores: "Scores") -> list[dict[str, Any]]:
    return [
        _row(
            text,
            reward,
            {name: values[i] for name, values in scores.terms.items()},
            {name: values[i] for name, values in scores.extra.items()},
        )
        for i, (text, reward) in enumerate(zip(texts, scores.rewards[:, 0], strict=True))
    ]


def _save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one row per text, in the format that the suffix names; scores of several rewards become columns."""
    from quarkrl.data.chats import prompt_text

    flat = [
        {name: value for name, value in row.items() if name not in ("scores", "extra")}
        | ({"prompt": prompt_text(row["prompt"])} if "prompt" in row else {})
        | {f"score.{name}": value for name, value in row.get("scores", {}).items()}
        | {f"extra.{name}": value for name, value in row.get("extra", {}).items()}
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_file(path) as file:
            pq.write_table(pa.Table.from_pylist(flat), file)
    else:
        names = list(dict.fromkeys(name for row in flat for name in row))
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(flat)


def _print_report(scored: _Scored, details: list[str], limit: int) -> None:
    """Print the distribution of each reward, and the texts with the highest and the lowest."""
    import numpy as np
    from rich.table import Table

    out = console(stderr=False)
    valid = np.flatnonzero(~np.isnan(scored.rewards))
    out.print(_counts(scored.rewards, details), soft_wrap=True)
    if not len(valid):
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("mean", "std", "min", "10 %", "median", "90 %", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in {"reward": scored.rewards, **scored.terms}.items():
        array = np.asarray(values, dtype=float)
        known = array[~np.isnan(array)]
        if known.size:
            figures = (known.mean(), known.std(), *np.quantile(known, (0, 0.1, 0.5, 0.9, 1)))
            table.add_row(truncate(name, 20), *(f"{figure:.4g}" for figure in figures))
    out.print(table)
    for line in _distribution(scored.rewards[valid]):
        out.print(line, soft_wrap=True)
    order = valid[np.argsort(scored.rewards[valid], kind="stable")]
    worst = order[: min(limit, len(order) // 2)]
    best = order[len(worst) :][::-1][:limit]
    for title, indices in (("best", best), ("worst", worst)):
        for i in indices:
            terms = "".join(f"  {name} {values[i]:.3g}" for name, values in scored.terms.items())
            row = scored.rows[i]
            text = truncate(" ".join(row.get("completion", row.get("text", "")).split()), 200)
            out.print(f"{title:<5}  {scored.rewards[i]:.4g}{terms}  {text}", soft_wrap=True)


def _distribution(rewards: "np.ndarray") -> list[str]:
    """A histogram; and of a reward of few values, the share of each."""
    import numpy as np

    low, high = rewards.min(), rewards.max()
    values, counts = np.unique(rewards, return_counts=True)
    if len(values) <= 5:
        shares = ", ".join(
            f"{value:.4g}: {count / len(rewards):.0%}" for value, count in zip(values, counts, strict=True)
        )
        return [f"values: {shares}"]
    bins, _ = np.histogram(rewards, bins=_BINS)
    tops = np.ceil(bins / bins.max() * len(_BLOCKS)).astype(int)
    picture = "".join(_BLOCKS[top - 1] if top else " " for top in tops)
    lines = [f"distribution: {low:.4g} {picture} {high:.4g}"]
    if low >= 0 and high <= 1:
        lines.append(f"share below 0.5: {np.mean(rewards < 0.5):.1%}")
    if (top := counts[-1] / len(rewards)) >= 0.2:
        lines.append(f"share of the highest value: {top:.0%}")
    return lines


def _row(texts: dict[str, Any], reward: float, terms: dict[str, float], extra: dict[str, str | None]) -> dict[str, Any]:
    """A text with its reward, the score of each of several rewards, and the columns that rewards have logged."""
    row: dict[str, Any] = {**texts, "reward": _rounded(reward)}
    if terms:
        row["scores"] = {name: _rounded(score) for name, score in terms.items()}
    if extra:
        row["extra"] = extra
    return row


def _counts(rewards: "np.ndarray", details: list[str]) -> str:
    import numpy as np

    return ", ".join([f"{len(rewards)} texts", f"{np.isnan(rewards).sum()} without a reward", *details])


def _summary(rewards: "np.ndarray", details: list[str]) -> str:
    """The number of texts and the distribution of their rewards, in one line."""
    import numpy as np

    valid = rewards[~np.isnan(rewards)]
    counts = _counts(rewards, details)
    if not len(valid):
        return counts
    low, median, high = np.quantile(valid, (0.1, 0.5, 0.9))
    return (
        f"{counts}; reward: mean {valid.mean():.4f}, 10th percentile {low:.4f}, median {median:.4f}, "
        f"90th percentile {high:.4f}"
    )


def _prompt_text(prompt: Any) -> Any:
    """A prompt as a reward receives it in training. RealToxicityPrompts has objects with a text."""
    return (prompt.get("text") if isinstance(prompt, dict) else prompt) or ""


def _rounded(value: float) -> float | None:
    """The value with six decimals; None for NaN."""
    return round(float(value), 6) if value == value else None
