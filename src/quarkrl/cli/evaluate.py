"""The command `quarkrl evaluate`: its options, and what it does with them."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quarkrl.cli.common import (
    RewardOptions,
    SamplingOptions,
    console,
    hide_library_progress,
    model_path,
    note,
    progress_bars,
    prompts_path,
)
from quarkrl.cli.flags import Parser, add_flags, options_from
from quarkrl.errors import UserError

if TYPE_CHECKING:
    from quarkrl.data.prompts import Prompts
    from quarkrl.rewards.scorer import Scorer


NAME = "evaluate"
HELP = "measure a model beside its reference"


def add_options(parser: Parser) -> None:
    """What `quarkrl evaluate` takes beside the reward and the decoding."""
    parser.add_argument("model", help="a run's final/, a checkpoint, a hub name, or a plain model")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help="in domain first, then any others")
    parser.add_argument(
        "--prompt_column", default="prompt", metavar="COLUMN", help="holds the prompt (default: prompt)"
    )
    parser.add_argument("--prompt_split", default="train", metavar="SPLIT", help="of a data set (default: train)")
    parser.add_argument("--prompt_tokens", type=_positive, metavar="N", help="cut texts to their first N tokens")
    parser.add_argument("--judges", nargs="+", default=[], metavar="REWARD", help="scorers to report beside the reward")
    parser.add_argument("--reference", help="the model before training; none goes without (default: as trained)")
    parser.add_argument(
        "--quantiles", nargs="+", default=["best", "worst"], metavar="Q", help="a row each; all for the control curve"
    )
    parser.add_argument(
        "--guidance_scales", nargs="+", type=float, default=[], metavar="X", help="a row each, on the best token"
    )
    parser.add_argument("--guidance_from", default="worst", metavar="FROM", help="a quantile or reference (worst)")
    parser.add_argument("--samples", type=_positive, default=25, help="completions for each prompt (default: 25)")
    parser.add_argument("--limit", type=_positive, help="the first so many prompts of each file, and texts")
    parser.add_argument("--skip_bad_prompts", action="store_true", help="leave bad and too long prompts out, counted")
    parser.add_argument("--threshold", type=_share, default=0.5, help="where a class begins (default: 0.5)")
    parser.add_argument("--perplexity_model", metavar="MODEL", help="scores perplexity (default: the reference)")
    parser.add_argument("--human_column", metavar="COLUMN", help="people's continuations of the prompts: gives MAUVE")
    parser.add_argument("--corpus", metavar="FILE", help="people's texts: gives rep, wrep, accuracy and perplexity")
    parser.add_argument("--resamples", type=_positive, default=10_000, help="of the bootstrap (default: 10000)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster, and a little off")
    parser.add_argument("--output", metavar="FILE", help="figures and protocol as JSON, completions as Parquet beside")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves: .png, .svg or .pdf")
    add_flags(parser, RewardOptions, SamplingOptions)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print, save."""
    from quarkrl.evaluation.evaluate import evaluate
    from quarkrl.evaluation.plots import check_plot, plot_curves
    from quarkrl.evaluation.results import checked_output
    from quarkrl.evaluation.tables import print_table

    hide_library_progress()
    # All that can be found wrong now is, before hours of sampling.
    if arguments.output:
        checked_output(arguments.output)
    if arguments.plot:
        check_plot(arguments.plot)
        if "all" not in arguments.quantiles and len(set(arguments.quantiles)) < 3 and not arguments.guidance_scales:
            raise UserError("no curve to plot: want --quantiles all, or --guidance_scales 1 2 4")
    scorer, *judges = scorers(arguments.reward, arguments.reward_label, arguments.judges, arguments.score_cache)
    sampling = options_from(arguments, SamplingOptions).strategy()
    with progress_bars("evaluate") as notify:
        evaluation = evaluate(
            model_path(arguments.model),
            prompt_sets(arguments.prompts, _loader(arguments), arguments.limit),
            scorer,
            reference=model_path(arguments.reference) if arguments.reference else None,
            quantiles=arguments.quantiles,
            guidance_scales=arguments.guidance_scales,
            guidance_from=arguments.guidance_from,
            sampling=sampling,
            samples=arguments.samples,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            judges=judges,
            threshold=arguments.threshold,
            perplexity_model=model_path(arguments.perplexity_model) if arguments.perplexity_model else None,
            human_column=arguments.human_column,
            corpus=corpus(arguments.corpus, arguments.limit) if arguments.corpus else None,
            skip_bad=arguments.skip_bad_prompts,
            dtype="bfloat16" if arguments.bf16 else None,
            trust_remote_code=arguments.trust_remote_code,
            resamples=arguments.resamples,
            notify=notify,
        )
    # Which files, and what was made of them; the rest says the same in other words.
    evaluation.protocol["options"] = {name: value for name, value in vars(arguments).items() if name != "run"}
    print_table(evaluation, console(stderr=False))
    if arguments.output:
        evaluation.save(arguments.output)
        completions = checked_output(arguments.output)[1]
        note(f"figures and protocol: {arguments.output}   completions: {completions}")
    if arguments.plot:
        plot_curves(evaluation, arguments.plot)
        note(f"curves: {arguments.plot}")


def prompt_sets(
    sources: Sequence[str], load: "Callable[[str], Prompts]", limit: int | None = None
) -> "dict[str, Prompts]":
    """The prompts of each source, named as its file is; a second of one name is numbered.

    Raises:
        UserError: a source cannot be read.
    """
    sets: dict[str, Prompts] = {}
    for source in sources:
        stem = Path(source).stem
        names = [name for name in sets if name == stem or name.startswith(f"{stem}-")]
        prompts = load(source)
        sets[f"{stem}-{len(names) + 1}" if stem in sets else stem] = prompts.first(limit) if limit else prompts
    return sets


def _loader(arguments: argparse.Namespace) -> "Callable[[str], Prompts]":
    """Reads the prompts of a source as the options say."""
    from quarkrl.data.prompts import load_prompts
    from quarkrl.data.truncation import cut
    from quarkrl.models.loading import load_tokenizer

    tokens = arguments.prompt_tokens
    tokenizer = tokens and load_tokenizer(model_path(arguments.model), arguments.trust_remote_code)

    def load(source: str) -> "Prompts":
        prompts = load_prompts(
            prompts_path(source, "eval"),
            split=arguments.prompt_split,
            column=arguments.prompt_column,
            skip_bad=arguments.skip_bad_prompts,
        )
        return cut(prompts, tokenizer, tokens) if tokens else prompts

    return load


def corpus(source: str, limit: int | None) -> "Prompts":
    """Texts of a corpus: a file's lines, or the column `text`, `prompt` or `completion`; empty ones are left out.

    Raises:
        UserError: it cannot be read.
    """
    from quarkrl.data.prompts import load_prompts

    texts = load_prompts(source, column=("text", "prompt", "completion"), skip_bad=True)
    return texts.first(limit) if limit else texts


def scorers(rewards: Sequence[str], label: str | None, judges: Sequence[str], cache: str | None) -> "list[Scorer]":
    """The reward's scorer and each judge's, with the cache where it keeps anything of theirs.

    Raises:
        UserError: one cannot be made, or the cache would keep nothing.
    """
    from quarkrl.rewards.registry import resolve
    from quarkrl.rewards.scorer import Scorer, is_cached

    groups = [[resolve(name, label=label) for name in rewards], *([resolve(name)] for name in judges)]
    kept = [any(map(is_cached, group)) for group in groups]
    kept[0] |= not any(kept)  # its scorer says what is wrong
    return [Scorer(group, cache=cache if keep else None) for group, keep in zip(groups, kept, strict=True)]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 1.")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be from 0 to 1.")
    return value
