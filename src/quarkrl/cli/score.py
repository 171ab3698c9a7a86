"""The command `quarkrl score`: its options, and what it does with them."""

import argparse
import json
import sys
from typing import Any

from quarkrl.cli.common import RewardOptions, note
from quarkrl.cli.flags import Parser, add_flags, options_from

NAME = "score"
HELP = "score texts, to get to know a reward before training on it"


def add_options(parser: Parser) -> None:
    """What `quarkrl score` takes beside the reward."""
    parser.add_argument("file", help="texts: .txt (one a line), .jsonl, .csv, .parquet; - reads lines from stdin")
    parser.add_argument("--column", help="column that holds the text (default: completion, text or prompt)")
    parser.add_argument("--skip_bad_prompts", action="store_true", help="leave bad rows out, counted")
    parser.add_argument("--json", action="store_true", help="a JSON object a line: text, reward")
    add_flags(parser, RewardOptions)


def run(arguments: argparse.Namespace) -> None:
    """Score and print."""
    import numpy as np

    from quarkrl.data.prompts import load_prompts

    scorer = options_from(arguments, RewardOptions).scorer()
    source: Any = [line.rstrip("\n") for line in sys.stdin] if arguments.file == "-" else arguments.file
    columns = arguments.column or ("completion", "text", "prompt")
    # A model may say nothing, and the reward of that is a reward.
    loaded = load_prompts(source, column=columns, skip_bad=arguments.skip_bad_prompts, empty=True)
    texts = [str(text) for text in loaded.prompts]
    asked = [_text(prompt) for prompt in loaded.columns.get("prompt", [None] * len(texts))]
    scores = scorer(asked, texts, [[] for _ in texts], loaded.columns)
    rewards = scores.rewards[:, 0]
    for i, text in enumerate(texts):
        row: dict[str, Any] = {"text": text, "reward": _rounded(rewards[i])}
        if scores.terms:
            row["scores"] = {name: _rounded(values[i]) for name, values in scores.terms.items()}
        shown = "-" if np.isnan(rewards[i]) else format(rewards[i], ".4f")
        print(json.dumps(row, ensure_ascii=False) if arguments.json else f"{shown}\t{text}")
    found = rewards[~np.isnan(rewards)]
    left_out = "".join(f", {count} left out ({reason})" for reason, count in loaded.skipped.items())
    cached = f", {scorer.cache_hits} from cache" if arguments.score_cache else ""
    if len(found):
        low, middle, high = np.quantile(found, (0.1, 0.5, 0.9))
        note(
            f"{len(texts)} texts, {len(texts) - len(found)} unscored{left_out}{cached}; "
            f"reward mean {found.mean():.4f}, 10 % below {low:.4f}, median {middle:.4f}, 10 % above {high:.4f}"
        )


def _text(prompt: Any) -> Any:
    """A prompt as rewards get it in training: RealToxicityPrompts nests its text."""
    return (prompt.get("text") if isinstance(prompt, dict) else prompt) or ""


def _rounded(value: float) -> float | None:
    return round(float(value), 6) if value == value else None
