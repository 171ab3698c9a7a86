"""`quarkrl score`: score texts, to examine a reward before training with it."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from quarkrl.cli.common import RewardOptions, note
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.cli.streams import print_json, read_standard_input
from quarkrl.options import check_options, option

if TYPE_CHECKING:
    import numpy as np

    from quarkrl.rewards.scorer import Scores

NAME = "score"
HELP = "score texts, to examine a reward before training with it"

_TEXT_COLUMNS = ("completion", "text", "prompt")
BATCH_SIZE = 128  # As many texts as a reward receives at a time in training, by default.


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Which texts are scored, and how the scores are printed."""

    column: str | None = option(None, "Column that holds the text (default: completions, completion, text or prompt).")
    skip_bad_prompts: bool = option(False, "Skip invalid rows, and count them.")
    json: bool = option(False, "Print one JSON object per line: text, reward, and what rewards log.")
    reward_timeout: float = option(
        3600.0,
        f"Time limit in seconds for the rewards of {BATCH_SIZE} texts; inf is no limit.",
        above=0,
        infinite=True,
        metavar="SECONDS",
    )

    def __post_init__(self) -> None:
        check_options(self)


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl score`."""
    parser.add_argument(
        "file", help="texts: .txt (one per line), .jsonl, .json, .csv, .tsv, .parquet; - is standard input"
    )
    add_flags(parser, ScoreOptions, RewardOptions)


def run(arguments: argparse.Namespace) -> None:
    """Score each text, print a line per text, and summarize the rewards on standard error."""
    import numpy as np

    from quarkrl.data.prompts import load_prompts

    options, reward_options = options_from(arguments, ScoreOptions), options_from(arguments, RewardOptions)
    source: Any = read_standard_input() if arguments.file == "-" else arguments.file
    columns = options.column or _TEXT_COLUMNS
    # A completion may be empty, and has a reward.
    rows = load_prompts(
        source,
        column=columns,
        skip_bad=options.skip_bad_prompts,
        allow_empty=True,
        split_completions=options.column is None,
    )
    scorer = reward_options.scorer(timeout=options.reward_timeout)  # Importing a reward may change the directory.
    texts = [str(text) for text in rows.prompts]
    prompts = [_prompt_text(prompt) for prompt in rows.columns.get("prompt", [None] * len(texts))]
    rewards = np.zeros(0)
    metrics: dict[str, list[float]] = {}
    for start in range(0, len(texts), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        others = {name: values[part] for name, values in rows.columns.items()}
        scores = scorer(prompts[part], texts[part], [[] for _ in texts[part]], others)
        _print_scores(texts[part], scores, options.json)
        rewards = np.append(rewards, scores.rewards[:, 0])
        for name, values in scores.metrics.items():
            metrics.setdefault(name, []).extend(values)
    skipped = [f"{count} skipped ({reason})" for reason, count in rows.skipped.items()]
    cached = [f"{scorer.cache_hits} from cache"] if reward_options.score_cache else []
    logged = [f"{name} {np.mean(values):.4f}" for name, values in metrics.items()]
    note(_summary(rewards, [*skipped, *cached, *logged]))


def _print_scores(texts: list[str], scores: "Scores", as_json: bool) -> None:
    for i, (text, reward) in enumerate(zip(texts, scores.rewards[:, 0], strict=True)):
        terms = {name: values[i] for name, values in scores.terms.items()}
        extra = {name: values[i] for name, values in scores.extra.items()}
        if as_json:
            print_json(_row(text, reward, terms, extra))
        else:
            print(_plain_line(text, reward))


def _plain_line(text: str, reward: float) -> str:
    return f"{'-' if reward != reward else format(reward, '.4f')}\t{text}"


def _row(text: str, reward: float, terms: dict[str, float], extra: dict[str, str | None]) -> dict[str, Any]:
    """A text with its reward, the score of each of several rewards, and the columns that rewards have logged."""
    row: dict[str, Any] = {"text": text, "reward": _rounded(reward)}
    if terms:
        row["scores"] = {name: _rounded(score) for name, score in terms.items()}
    if extra:
        row["extra"] = extra
    return row


def _summary(rewards: "np.ndarray", details: list[str]) -> str:
    """The number of texts and the distribution of their rewards, in one line."""
    import numpy as np

    valid = rewards[~np.isnan(rewards)]
    counts = ", ".join([f"{len(rewards)} texts", f"{len(rewards) - len(valid)} without a reward", *details])
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
