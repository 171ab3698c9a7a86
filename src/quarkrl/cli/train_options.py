"""The options of `quarkrl train`, from flags and from a YAML file or preset.

The entries of a file become flags that precede the user's own. One parser reads, checks and reports both, and a flag
takes precedence over the file. Types come from the options, not from YAML, which reads 1e-5 as text.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

from quarkrl.cli.common import REWARD_HELP, REWARD_LABEL_HELP
from quarkrl.cli.config_file import as_flags, check_entries, file_entries, preset_names
from quarkrl.cli.guesses import expand_train
from quarkrl.cli.parser import Parser, add_flags, describe_fully, options_from, summarize
from quarkrl.errors import UserError
from quarkrl.models.options import AdapterOptions
from quarkrl.options import check_options, option, takes_list, typed_fields
from quarkrl.training import sizing
from quarkrl.training.options import GROUPS, QuarkOptions
from quarkrl.training.sizing import (
    SAMPLED,
    describe_defaults,
    describe_excess,
    fit_to_budget,
    fit_to_prompts,
    fit_to_samples,
    parse_duration,
    size_defaults,
)

if TYPE_CHECKING:
    from quarkrl.training.config import QuarkConfig
    from quarkrl.training.sizing import RewardSpread, Speed

HELD_OUT = 64  # The default of held_out.
_UNSET = object()  # In the place of a default that depends on the model's size.
USAGE = "quarkrl train --config PRESET|FILE [--OPTION VALUE …]"
EXAMPLES = """\
examples:
  quarkrl train --config tiny-toxicity --output_dir runs/mine --kl_coef 0.2
  quarkrl train --model gpt2 --prompts prompts.txt --reward toxicity --output_dir runs/mine"""


@dataclass
class RunOptions(AdapterOptions):
    """Options of `quarkrl train` beside those of `QuarkConfig`."""

    model: str | None = option(None, "Model to train: a directory, a GGUF file, a hub name, or builtin.", group="model")
    ref_model: str | None = option(
        None, "Reference model p_0. The default is the model before training.", group="model", metavar="MODEL"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32",
        "Data type of the weights: float32, bfloat16, float16, or auto.",
        group="model",
        metavar="DTYPE",
    )
    attn_implementation: str | None = option(
        None, "Attention implementation: sdpa, eager (default on a CPU), …", group="model", metavar="NAME", rare=True
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model and the reference.", group="model"
    )
    defaults: Literal["size", "paper"] = option(
        "size",
        "Defaults fitted to model, prompts and rewards, or the paper's.",
        group="model",
    )

    budget: str | None = option(
        None,
        "Time that the run may take, such as 30m. It lowers the iterations, prompts and steps that are not set.",
        group="model",
        metavar="TIME",
    )
    dry_run: bool = option(False, "Print the plan of the run, and start nothing.", group="model")

    prompts: str | None = option(
        None, "Prompts to explore: a file, a data set, builtin or builtin-chats.", group="prompts", metavar="SOURCE"
    )
    prompt_column: str = option("prompt", "Column of the prompt.", group="prompts", metavar="NAME")
    prompt_split: str = option("train", "Split of a data set, such as train[:5000].", group="prompts", metavar="SPLIT")
    prompt_tokens: int | None = option(
        None, "Truncate texts to their first N tokens, and skip shorter texts.", at_least=1, group="prompts"
    )
    scored_data: str | None = option(
        None,
        "Samples to start from: prompt, completion, reward. They take the place of the first exploration. Without "
        "--prompts, the run learns from them alone (docs/offline.md).",
        group="prompts",
        metavar="SOURCE",
    )
    stream_prompts: bool = option(
        False,
        "Read the prompts while exploring. For more prompts than memory holds; prompts_per_iteration must be set.",
        group="prompts",
        rare=True,
    )
    eval_prompts: str | None = option(
        None, "Held-out prompts, evaluated after each iteration.", group="prompts", metavar="SOURCE"
    )
    eval_prompt_split: str | None = option(
        None,
        "Split of eval_prompts. The default is test if prompts names the same data set, else train.",
        group="prompts",
        metavar="SPLIT",
    )

    held_out: int | None = option(
        None,
        "Prompts of the table before/after; 0: no table. From eval_prompts, or held out of prompts before training "
        "(docs/guide.md). The default is 64.",
        at_least=0,
        group="prompts",
    )
    result_samples: int | None = option(
        None,
        "Completions per prompt of the table before/after. The default is 2 to 8, by the length of the run.",
        at_least=1,
        group="prompts",
        rare=True,
    )

    reward: list[str] | None = option(None, REWARD_HELP, group="reward", metavar="REWARD")
    reward_label: str | None = option(None, REWARD_LABEL_HELP, group="reward", metavar="LABEL")

    resume: bool = option(
        False,
        "Resume the run in this directory, or in output_dir. Its config.yaml gives the options unless --config is set.",
        group="saving and evaluating",
        metavar="RUN",
    )
    early_stopping_patience: int | None = option(
        None,
        "Stop after N evaluations without a better held-out reward. The best checkpoint becomes final/.",
        at_least=1,
        group="saving and evaluating",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.budget is not None:
            parse_duration(self.budget)


# Options of TrainingArguments that `--help` shows, too: name, placeholder, text. They are read like all the others.
_COMMON_INHERITED = [
    ("output_dir", "DIR", "Directory of the run"),
    ("seed", "N", "Seed of sampling, draws and new weights (42)"),
    ("eval_strategy", "WHEN", "When to evaluate: epoch (default if eval_prompts is set), steps, or no"),
    ("load_best_model_at_end", "BOOL", "Make the best checkpoint final/"),
    ("logging_steps", "N", "Optimizer steps between two logged rows"),
    ("report_to", "NAME", "Trackers: wandb, tensorboard, …"),
]


class TrainCommand(NamedTuple):
    """What `quarkrl train` runs.

    Attributes:
        run: options of the command itself.
        config: options of the trainer.
        non_default_options: the options that differ from their defaults, for `config.yaml`.
        parsed: the values from which the others were made.
    """

    run: RunOptions
    config: "QuarkConfig"
    non_default_options: dict[str, Any]
    parsed: "ParsedValues"

    def with_defaults(
        self,
        parameters: int,
        num_prompts: int | None = None,
        speed: "Speed | None" = None,
        num_scored: int | None = None,
        spread: "RewardSpread | None" = None,
    ) -> tuple["TrainCommand", str | None]:
        """Set the options that depend on model, prompts and rewards, except those that a flag or the file sets.

        Args:
            parameters: the number of the model's parameters.
            num_prompts: the prompts of the run; None if they are streamed.
            speed: of the model, which `budget` needs.
            num_scored: the samples of a run that explores nothing; None of one that explores.
            spread: of the rewards of some samples.

        Returns:
            The command, and a line for the user about what was chosen, or None.
        """
        parsed = self.parsed
        if not parsed.unset:
            return self, None
        rank = None if "lora_rank" in parsed.unset else self.run.lora_rank or 0
        options = size_defaults(parameters, rank, self._required_dpo_coef(explores=num_scored is None))
        fixed = {name: parsed.values[name] for name in options.keys() - parsed.unset}
        if not self.config.do_sample:
            fixed["samples_per_prompt"] = 1  # Greedy completions of a prompt are equal.
        if count := self._required_quantiles():
            fixed.setdefault("num_quantiles", count)
        if spread and "num_quantiles" not in fixed:
            options["num_quantiles"] = spread.num_quantiles
        per_batch = self.config.gradient_accumulation_steps * self.config.world_size
        excess = ""
        if num_scored is not None:
            fit_to_samples(options, num_scored, fixed, per_batch)
            if speed and self.run.budget:
                fit_to_budget(options, 0, fixed, speed, parse_duration(self.run.budget), per_batch)
        elif num_prompts is not None:
            fit_to_prompts(options, num_prompts, fixed, per_batch, spread)
            if speed and self.run.budget:
                fit_to_budget(options, num_prompts, fixed, speed, parse_duration(self.run.budget), per_batch)
                excess = describe_excess(options, num_prompts, fixed, speed, self.run.budget, per_batch)
        chosen = {name: value for name, value in options.items() if name in parsed.unset}
        command = _make_command(
            parsed._replace(values={**parsed.values, **chosen}, unset=frozenset(), recorded=frozenset(sizing.NAMES))
        )
        if num_scored is not None:  # It samples only to distil.
            chosen = {name: value for name, value in chosen.items() if name not in SAMPLED}
        elif num_prompts is not None and chosen.get("prompts_per_iteration"):
            chosen["prompts_per_iteration"] = min(chosen["prompts_per_iteration"], num_prompts)  # What the plan says.
        seen = spread.describe(options, fixed) if spread else ""
        return command, "\n".join(filter(None, [describe_defaults(parameters, chosen) + excess, seen]))

    @property
    def chooses_by_rewards(self) -> bool:
        """Whether options are to be chosen that depend on the rewards."""
        return bool(self.parsed.unset & {"num_quantiles", "samples_per_prompt"})

    def _required_dpo_coef(self, explores: bool) -> float | None:
        """Return the weight of the DPO term that is set, or 0 where there are no pairs; None if it is to be chosen."""
        if "dpo_coef" not in self.parsed.unset:
            return self.config.dpo_coef
        is_alone = "samples_per_prompt" not in self.parsed.unset and self.config.samples_per_prompt == 1
        has_pairs = explores and self.config.do_sample and not is_alone and self.config.condition_on == "sum"
        return None if has_pairs else 0.0

    def _required_quantiles(self) -> int | None:
        """Return the number of quantiles that another option needs; None if there is none."""
        run, config = self.run, self.config
        attributes = len(run.reward or [1]) if config.condition_on == "each" else 1
        if config.words is not None and len(config.words) % attributes == 0:
            return len(config.words) // attributes
        return config.num_quantiles if str(config.guidance_from).isdecimal() else None

    def ignored_options_note(self) -> str | None:
        """Return a message about options that `QuarkConfig` ignores in a single process, or None."""
        names = [
            name
            for name in ("ddp_backend", "fsdp")
            if self.non_default_options.get(name) and not getattr(self.config, name)
        ]
        if not names:
            return None
        launch = "torchrun --nproc_per_node N -m quarkrl.cli train …"
        return f"{' and '.join(names)} ignored: there is one process. To start several: {launch}"


class ParsedValues(NamedTuple):
    """Options as they were parsed.

    Attributes:
        values: the value of each option, by name.
        defaults: the values without any flag or file.
        unset: the options whose defaults depend on the model's size, and that are to be chosen yet.
        recorded: the options that `config.yaml` holds even if they have their defaults.
    """

    values: dict[str, Any]
    defaults: dict[str, Any]
    unset: frozenset[str]
    recorded: frozenset[str]


def parse_train(argv: Sequence[str]) -> TrainCommand:
    """Parse flags and file.

    Raises:
        UserError: an option is unknown or invalid, or the file cannot be read.
    """
    print_help(argv)
    argv = expand_train(argv)
    from quarkrl.training.config import QuarkConfig

    parser = train_parser(_hugging_face_flags(QuarkConfig))
    declared = [field for options in (RunOptions, QuarkConfig) for field in dataclasses.fields(options) if field.init]
    parser.flag_names = [*(field.name for field in declared), "config"]
    # As parsed: for some options of TrainingArguments, HfArgumentParser has another default than the dataclass.
    defaults = vars(parser.parse([]))
    entries, source = file_entries(argv, [field.name for field in declared])
    check_entries(source, entries, list_options(QuarkConfig), options_without_null(QuarkConfig))
    parser.set_defaults(**dict.fromkeys(sizing.NAMES, _UNSET))
    parser.set_defaults(**{name: None for name, value in entries.items() if value is None})
    parser.set_defaults(eval_strategy=None)  # Its default depends on another option.
    values = vars(parser.parse([*as_flags(entries), *argv]))
    for name in _one_or_several(QuarkConfig):
        if isinstance(values[name], list) and len(values[name]) == 1:
            (values[name],) = values[name]
    unset = frozenset(name for name in sizing.NAMES if values[name] is _UNSET)
    values |= {name: defaults[name] for name in unset}
    if values["entropy_target"] is not None:  # It adapts α, which the defaults by size turn off.
        unset -= {"entropy_coef"}
    for name in ("hub_token", "push_to_hub_token"):
        if values.get(name):
            raise UserError(
                f"{name}: must not be on the command line or in a file. Set HF_TOKEN, or run `hf auth login`."
            )
    if values["eval_strategy"] is None:  # Held-out prompts are evaluated after each iteration by default.
        values["eval_strategy"] = "epoch" if values["eval_prompts"] else defaults["eval_strategy"]
    resumes = values["resume"] or values["resume_from_checkpoint"]
    if values["held_out"] is None:
        values["held_out"] = _held_out_of_saved_run(values["output_dir"]) if resumes else HELD_OUT
    _check_selection(values)
    if values["eval_strategy"] != "no" and not values["eval_prompts"]:
        raise UserError(f"eval_strategy {values['eval_strategy']}: must be no without prompts. Set --eval_prompts.")
    # config.yaml of a run that is resumed is complete: it has what was chosen when the run started.
    is_complete = values["defaults"] == "paper" or (values["resume"] and values["config"] is None)
    by_size = frozenset() if is_complete else unset
    if values["budget"] is not None and not by_size and not values["resume"]:
        raise UserError(
            f"budget {values['budget']!r}: must be left out of a preset and of --defaults paper, which set amounts. "
            "Leave those out, or set --num_iterations."
        )
    return _make_command(ParsedValues(values, defaults, by_size, recorded=frozenset(sizing.NAMES) - unset))


def _make_command(parsed: ParsedValues) -> TrainCommand:
    """Make the options of the command and of the trainer.

    Raises:
        UserError: a value is invalid.
    """
    from quarkrl.training.config import QuarkConfig

    values = dict(parsed.values)
    try:
        run = options_from(argparse.Namespace(**values), RunOptions)
        config = options_from(argparse.Namespace(**values), QuarkConfig)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    values["bf16"] = config.bf16  # What "auto" has chosen: a resumed run keeps it on any machine.
    declared = [
        field.name for options in (RunOptions, QuarkConfig) for field in dataclasses.fields(options) if field.init
    ]
    non_default = {
        name: values[name]
        for name in declared
        if name not in ("budget", "dry_run")  # config.yaml has what follows from them.
        and (values[name] != parsed.defaults[name] or name in parsed.recorded)
    }
    return TrainCommand(run, config, non_default, parsed)


def _held_out_of_saved_run(output_dir: str | None) -> int:
    """Return the option of the run to resume. A run from before this option exists trains on all of its prompts."""
    import yaml

    try:
        entries = yaml.safe_load((Path(output_dir or "") / "config.yaml").read_bytes())
        return int(entries.get("held_out", 0))
    except (OSError, yaml.YAMLError, AttributeError, ValueError, TypeError):
        return 0


# The parser


def train_parser(
    inherited: argparse.ArgumentParser | None = None,
    describe: Callable[[dataclasses.Field], str] = summarize,
) -> Parser:
    """Return the parser of the run's and Quark's own options.

    Args:
        inherited: a parser of the options of `TrainingArguments` to include.
        describe: makes the text for `--help` from a field.
    """
    parser = Parser(
        prog="quarkrl train",
        usage=USAGE,
        description="Train a model with Quark.",
        epilog=EXAMPLES,
        parents=[inherited] if inherited else [],
    )

    def text(field: dataclasses.Field) -> str:
        if not field.metadata.get("fitted"):
            return describe(field)
        without_default: Any = dataclasses.field(default=None, metadata=field.metadata)
        return f"{describe(without_default)} (default fitted)"

    parser.add_argument(
        "--help_all", action="store_true", help="list rare options and those of transformers.TrainingArguments, too"
    )
    parser.add_argument("--config", metavar="FILE|PRESET", help=f"Presets: {', '.join(preset_names())}")
    add_flags(parser, RunOptions, QuarkOptions, groups=GROUPS, switches=False, describe=text)
    return parser


def print_help(argv: Sequence[str]) -> None:
    """Print the help and exit if that is wanted: `--help` without importing transformers, `--help_all` with all."""
    if "--help_all" in argv or "--help-all" in argv:
        from quarkrl.training.config import QuarkConfig

        train_parser(_hugging_face_flags(QuarkConfig), describe=describe_fully).print_help()
        sys.exit(0)
    if "--help" in argv or "-h" in argv:
        parser = train_parser()
        group = parser.add_argument_group("of transformers.TrainingArguments, all of which are options")
        for name, metavar, text in _COMMON_INHERITED:
            group.add_argument(f"--{name}", metavar=metavar, help=text)
        parser.print_help()
        sys.exit(0)


def _hugging_face_flags(config: type) -> argparse.ArgumentParser:
    """Return a parser of the options that a config inherits from `TrainingArguments` unchanged."""
    from transformers import HfArgumentParser

    own, hints = {field.name for field in dataclasses.fields(QuarkOptions)}, get_type_hints(config)
    lists = _one_or_several(config)
    hints |= dict.fromkeys(lists, list[str])  # HfArgumentParser would take one word for them.
    inherited = [
        (field.name, hints[field.name], _copy(field, is_list=field.name in lists))
        for field in dataclasses.fields(config)
        if field.init and field.name not in own
    ]
    return HfArgumentParser(dataclasses.make_dataclass("Inherited", inherited, kw_only=True), add_help=False)


def _one_or_several(config: type) -> set[str]:
    """The names of the options that are a text or several."""
    return {name for name, kind in get_type_hints(config).items() if {str, list[str]} <= set(get_args(kind))}


def _copy(field: dataclasses.Field, is_list: bool) -> Any:
    if is_list:  # HfArgumentParser reads the default of a list from a function only.
        return dataclasses.field(default_factory=lambda: field.default, metadata=field.metadata)
    return dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=field.metadata)


def list_options(config: type) -> set[str]:
    """Return the names of the options that may take several values."""
    return {
        field.name
        for options in (RunOptions, config)
        for field, kind in typed_fields(options)
        if takes_list(kind) or any(map(takes_list, get_args(kind)))
    }


def options_without_null(config: type) -> set[str]:
    """Return the names of the options that always have a value."""
    kinds = {**get_type_hints(RunOptions), **get_type_hints(config)}
    return {name for name, kind in kinds.items() if kind is not Any and type(None) not in get_args(kind)}


def _check_selection(values: dict[str, Any]) -> None:
    """Check the options that keep the best checkpoint: they need evaluations, and checkpoints to choose from."""
    patience = values["early_stopping_patience"]
    if patience is not None:
        values["load_best_model_at_end"] = True
        values["restore_callback_states_from_checkpoint"] = True  # A resumed run continues to count.
    if not values["load_best_model_at_end"]:
        return
    option = "load_best_model_at_end True" if patience is None else f"early_stopping_patience {patience}"
    if not values["eval_prompts"]:
        raise UserError(f"{option}: must come with held-out prompts. Set --eval_prompts.")
    if values["save_strategy"] == "no":
        raise UserError(f"{option}: must come with checkpoints to choose from. Set --save_strategy epoch.")
