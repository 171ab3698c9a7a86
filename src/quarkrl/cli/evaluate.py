"""`quarkrl evaluate`: measure a model and its reference on the same prompts."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quarkrl.builtin import BUILTIN, locate_model
from quarkrl.cli.common import (
    REWARD_HELP,
    PromptSource,
    RewardOptions,
    busy,
    console,
    in_chat_template,
    model_path,
    note,
    progress_bars,
    quiet_libraries,
    resolve_rewards,
    working_directory,
)
from quarkrl.cli.inputs import check_model, check_prompts, check_rewards, missing_reward
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.cli.run_prompts import check_has_held_out, held_out_of_run
from quarkrl.cli.run_rewards import rewards_of_training
from quarkrl.errors import UserError
from quarkrl.evaluation.options import NO_REFERENCE, EvaluationOptions
from quarkrl.names import unique_names
from quarkrl.options import check_options, option
from quarkrl.runs.records import holds_run

if TYPE_CHECKING:
    from quarkrl.data.prompts import Prompts
    from quarkrl.evaluation.results import CorpusRow, Evaluation, Row
    from quarkrl.rewards.scorer import Scorer

AnyRow = TypeVar("AnyRow", "Row", "CorpusRow")

NAME = "evaluate"
HELP = "measure a model and its reference on the same prompts"

HELD_OUT = "held-out"  # The name of the run's own prompts.
_CORPUS_COLUMNS = ("text", "prompt", "completion")


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """Where prompts, judges and texts come from, and where results go.

    Raises:
        UserError: a value is out of its limits.
    """

    prompts: list[str] | None = option(
        None,
        "Prompts: files, data sets or builtin, one table each (default: the held-out prompts of the run). The first is "
        "in-domain.",
        metavar="FILE",
        group="prompts",
    )
    prompt_column: str = option("prompt", "Column that holds the prompt.", metavar="COLUMN", group="prompts")
    prompt_split: str = option("train", "Split of a data set.", metavar="SPLIT", group="prompts")
    prompt_tokens: int | None = option(
        None, "Truncate texts to their first N tokens, and skip shorter texts.", at_least=1, group="prompts"
    )
    limit: int | None = option(
        None, "Use the first N prompts of each file and of the corpus.", at_least=1, group="prompts"
    )
    judges: list[str] = option(
        default_factory=list, help="Further scorers, reported beside the reward.", metavar="REWARD", group="reward"
    )
    corpus: str | None = option(
        None,
        "Human-written texts; adds rep, wrep, token accuracy and perplexity.",
        metavar="FILE",
        group="metrics",
    )
    output: str | None = option(
        None, "Save figures and protocol as JSON, and completions as Parquet beside it.", metavar="FILE", group="output"
    )
    save_guidance: bool = option(
        False,
        "Record the scale of --target with the model: generate, chat and QuarkGenerator then use it.",
        group="output",
    )
    plot: str | None = option(None, "Draw the curves: .png, .svg or .pdf.", metavar="FILE", group="output")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class EvaluationRewards(RewardOptions):
    """Which rewards score texts: by default those of training."""

    reward: list[str] | None = option(  # type: ignore[assignment]
        None, f"{REWARD_HELP} The default is the reward of training.", metavar="REWARD", group="reward"
    )

    def or_recorded(self, model: str) -> "EvaluationRewards":
        """Return these rewards, or those that a model was trained with if none is named; say which.

        Raises:
            UserError: none is recorded, or none that may be used (`rewards_of_training`).
        """
        if self.reward:
            return self
        rewards = rewards_of_training(model)
        if rewards is None:
            raise missing_reward(", and the model's quark.json names none")
        note(f"reward: {' '.join(rewards.names)}, as in training")
        return dataclasses.replace(self, reward=rewards.names, reward_label=self.reward_label or rewards.label)


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl evaluate`."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="model",
        help="a run or its final/, a checkpoint, a hub name, a GGUF file; or several",
    )
    groups = ("models", "prompts", "reward", "sampling", "metrics", "output")
    add_flags(parser, InputOptions, EvaluationRewards, EvaluationOptions, groups=groups)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the tables, and save what the options name."""
    inputs, options = options_from(arguments, InputOptions), options_from(arguments, EvaluationOptions)
    rewards = _check(arguments, inputs, options)
    with busy(f"loading {' '.join(arguments.models)}"):
        from quarkrl.evaluation.plots import plot_curves
        from quarkrl.evaluation.results import output_paths
        from quarkrl.evaluation.tables import print_table
        from quarkrl.models.precision import slow_bf16_note

        quiet_libraries()
        models = [model_path(name) for name in arguments.models]
        trained = model_path(options.steered_by or arguments.models[0])  # It names prompts and rewards.
        _check_models(models, inputs, arguments.target)
        output, plot = (path and os.path.abspath(path) for path in (inputs.output, inputs.plot))  # A reward may chdir.
        if options.bf16 and (line := slow_bf16_note()):
            note(line)
        directory = os.getcwd()
        rewards = rewards.or_recorded(trained)
        all_scorers = scorers(rewards, inputs.judges)
    with working_directory(directory):  # Importing a reward may have changed it.
        evaluations = [_evaluate(model, trained, inputs, options, all_scorers) for model in models]
    evaluation = evaluations[0] if len(models) == 1 else join_evaluations(_short_names(arguments.models), evaluations)
    evaluation.protocol["options"] = dict(vars(arguments))  # As typed: files, builtin names, truncation.
    print_table(evaluation, console(stderr=False))
    if output:
        evaluation.save(output)
        json_path, parquet_path = output_paths(output)
        note(f"figures and protocol: {json_path}   completions: {parquet_path}")
    if plot:
        plot_curves(evaluation, plot)
        note(f"curves: {plot}")
    if inputs.save_guidance:
        _save_guidance(models[0], evaluation, options)


def _check_models(models: Sequence[str], inputs: InputOptions, target: str | None) -> None:
    """Check the options that a single model needs, or one in a directory.

    Raises:
        UserError: the models do not go with them.
    """
    for name, value in (("plot", inputs.plot), ("target", target)):
        if value and len(models) > 1:
            raise UserError(f"{name} {value!r}: must be left out with several models. Evaluate them one by one.")
    if inputs.save_guidance and not target:
        raise UserError("save_guidance: must have a target. Set --target 'toxicity<=0.02', for example.")
    if inputs.save_guidance and not os.path.isfile(os.path.join(models[0], "quark.json")):
        raise UserError(
            f"save_guidance: model {models[0]!r} must be a directory with quark.json. Leave the option out."
        )


def _save_guidance(model: str, evaluation: "Evaluation", options: EvaluationOptions) -> None:
    """Record the scale that meets the target as the model's default."""
    from quarkrl.models.model_card import add_facts
    from quarkrl.models.quark_json import DEFAULT_GUIDANCE

    outcome = evaluation.protocol["target"]
    if outcome["guidance_scale"] is None:
        note("default guidance: unchanged, since no γ meets the target")
        return
    names = ("guidance_scale", "target")
    recorded = {name: outcome[name] for name in names}
    recorded |= {"guidance_from": str(options.guidance_from), "guidance_rule": options.guidance_rule}
    add_facts(model, **{DEFAULT_GUIDANCE: recorded})
    note(f"default guidance: γ = {recorded['guidance_scale']:g}, recorded in {os.path.join(model, 'quark.json')}")


def _check(arguments: argparse.Namespace, inputs: InputOptions, options: EvaluationOptions) -> EvaluationRewards:
    """Check what the options name, before torch is imported; return the rewards."""
    for name in arguments.models:
        check_model(name)
    check_model(options.perplexity_model, "perplexity_model")
    if options.reference != NO_REFERENCE:
        check_model(options.reference, "reference")
    check_model(options.steered_by, "steered_by")
    trained = options.steered_by or arguments.models[0]
    if inputs.prompts is None:
        check_has_held_out(trained)
    check_prompts(*(inputs.prompts or []), inputs.corpus)
    rewards = options_from(arguments, EvaluationRewards)
    check_rewards(rewards.reward or [], rewards.reward_label)
    check_rewards(inputs.judges)
    if (directory := _local_model(trained)) is not None:
        rewards = rewards.or_recorded(directory)
    _check_outputs(inputs)  # Before hours of sampling.
    return rewards


def _local_model(name: str) -> str | None:
    """Return the directory of a model, as far as it is known without reading checkpoints; None for any other."""
    final = Path(name) / "final"
    if final.is_dir() or name == BUILTIN:
        return str(final) if final.is_dir() else str(locate_model(name))
    return name if os.path.isdir(name) and not holds_run(Path(name)) else None


def _evaluate(
    model: str, trained: str, inputs: InputOptions, options: EvaluationOptions, all_scorers: "list[Scorer]"
) -> "Evaluation":
    from quarkrl.evaluation.evaluate import evaluate

    resolved = dataclasses.replace(
        options,
        reference=options.reference and model_path(options.reference),
        perplexity_model=options.perplexity_model and model_path(options.perplexity_model),
        steered_by=options.steered_by and model_path(options.steered_by),
    )
    scorer, *judges = all_scorers
    with progress_bars("evaluate") as notify:
        return evaluate(
            model,
            load_prompt_sets(model, inputs, options, trained),
            scorer,
            resolved,
            judges=judges,
            corpus=load_corpus(inputs.corpus, inputs.limit) if inputs.corpus else None,
            needs_curve=bool(inputs.plot),
            notify=notify,
        )


def join_evaluations(names: Sequence[str], evaluations: "Sequence[Evaluation]") -> "Evaluation":
    """Return the evaluations of several models as one, whose rows have the model in their names.

    The reference of the first model is a row of its own; those of the others are left out if they are the same model.
    """
    first = evaluations[0]
    rows: list[Row] = []
    corpus: list[CorpusRow] = []
    for name, evaluation in zip(names, evaluations, strict=True):
        reference: str | None = "reference"
        if evaluation is not first:
            is_same = evaluation.protocol["reference"] == first.protocol["reference"]
            reference = None if is_same else f"{name} reference"
        # Curves are of one model, so no row has a quantile.
        rows += [dataclasses.replace(row, quantile=None) for row in _renamed(evaluation.rows, name, reference)]
        corpus += _renamed(evaluation.corpus, name, reference)
    protocol = {**first.protocol, "models": {n: e.protocol for n, e in zip(names, evaluations, strict=True)}}
    return dataclasses.replace(first, rows=rows, corpus=corpus, protocol=protocol)


def _renamed(rows: "Sequence[AnyRow]", name: str, reference: str | None) -> "list[AnyRow]":
    """The rows with the model's name in theirs; that of the reference gets a name of its own, or is left out."""
    named = [(row, reference if row.name == "reference" else f"{name} {row.name}") for row in rows]
    return [dataclasses.replace(row, name=new) for row, new in named if new is not None]


def _short_names(models: Sequence[str]) -> list[str]:
    """Return the last part of each path that is not `final`; a repeated one has a number."""
    paths = [Path(model) for model in models]
    return unique_names(path.parent.name if path.name == "final" else path.name for path in paths)


def load_prompt_sets(
    model: str, inputs: InputOptions, options: EvaluationOptions, run: str | None = None
) -> "dict[str, Prompts]":
    """Load each file of prompts; return the sets by the name of their file, without its suffix.

    Args:
        model: its tokenizer truncates and encodes.
        inputs, options: what the user has set.
        run: a model whose run has the prompts if no file is named; by default the same model.

    Raises:
        UserError: a file cannot be read, or has an invalid row.
    """
    from quarkrl.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model_path(model), options.trust_remote_code)
    sets: dict[str, Prompts] = {}
    if inputs.prompts is None:
        sets[HELD_OUT] = held_out_of_run(run or model, options.skip_bad_prompts, tokenizer)
        note(f"prompts: {len(sets[HELD_OUT])} held-out prompts of the run. Set --prompts for others.")
    files = inputs.prompts or []
    names = unique_names(Path(file.removesuffix(".gz")).stem for file in files)
    for name, file in zip(names, files, strict=True):
        source = PromptSource(file, inputs.prompt_column, inputs.prompt_split, tokens=inputs.prompt_tokens)
        prompts = source.load(options.skip_bad_prompts, tokenizer)
        sets[name] = prompts
    if inputs.limit:
        sets = {name: prompts.first(inputs.limit) for name, prompts in sets.items()}
    is_raw = options.raw or inputs.prompt_tokens is not None  # Beginnings of texts are continued, not answered.
    return dict(zip(sets, in_chat_template(list(sets.values()), model_path(model), tokenizer, is_raw), strict=True))


def load_corpus(source: str, limit: int | None) -> "Prompts":
    """Load texts: the lines of a file, or its column `text`, `prompt` or `completion`; empty texts are skipped.

    Raises:
        UserError: the file cannot be read, or has none of the columns.
    """
    from quarkrl.data.prompts import load_prompts

    texts = load_prompts(source, column=_CORPUS_COLUMNS, skip_bad=True, column_option=None)
    return texts.first(limit) if limit else texts


def scorers(rewards: RewardOptions, judges: Sequence[str]) -> "list[Scorer]":
    """Return the scorer of the reward and one of each judge. The score cache serves those that can be cached.

    Raises:
        UserError: a reward cannot be resolved, or there is a score cache and nothing can be cached.
    """
    from quarkrl.rewards.reward import is_cached
    from quarkrl.rewards.scorer import Scorer

    cache = rewards.cache_path
    groups = [resolve_rewards(rewards.reward, rewards.reward_label), *(resolve_rewards([name]) for name in judges)]
    cached = [any(map(is_cached, group)) for group in groups]
    cached[0] |= not any(cached)  # The constructor of this scorer reports that nothing can be cached.
    return [Scorer(group, cache=cache if use_cache else None) for group, use_cache in zip(groups, cached, strict=True)]


def _check_outputs(inputs: InputOptions) -> None:
    """Check the paths of the outputs."""
    from quarkrl.evaluation.plots import check_plot
    from quarkrl.evaluation.results import output_paths

    if inputs.output:
        output_paths(inputs.output)
    if inputs.plot:
        check_plot(inputs.plot)
