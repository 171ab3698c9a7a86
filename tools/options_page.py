"""Write docs/options.md, the reference of the options, from their declarations: `python -m tools.options_page`."""

import dataclasses
from pathlib import Path

from quarkrl.cli.chat import ChatOptions
from quarkrl.cli.common import RewardOptions
from quarkrl.cli.evaluate import EvaluationRewards, InputOptions
from quarkrl.cli.export import ExportOptions
from quarkrl.cli.generate import GenerateOptions
from quarkrl.cli.play import PlayOptions
from quarkrl.cli.push import PushOptions
from quarkrl.cli.report import ReportOptions
from quarkrl.cli.samples import SamplesOptions
from quarkrl.cli.score import ScoreOptions
from quarkrl.cli.train_options import RunOptions
from quarkrl.cli.watch import WatchOptions
from quarkrl.cli.words import WordsOptions
from quarkrl.evaluation.options import EvaluationOptions
from quarkrl.options import choices_of, default_of, join_words, limits_in_words, typed_fields
from quarkrl.sampling.options import SamplingOptions
from quarkrl.training.options import GROUPS, INHERITED, QuarkOptions
from quarkrl.training.sizing import NAMES

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
RESUME = {"free": "yes", "branch": "from a checkpoint", "fixed": "no", "selection": "depends"}
INTRODUCTION = """\
# Options

This page is generated: `python -m tools.options_page`. Each option is a flag, such as `--kl_coef 0.1`. Each option of
`quarkrl train` is also a key of its YAML file, such as `kl_coef: 0.1`. The default is in parentheses. "Resume" says
whether a resumed run may change the option. Options with that note are also arguments of `QuarkConfig`.

The parentheses have the defaults of `QuarkConfig`, which are the paper's. `quarkrl train` fits these options to model,
prompts and rewards instead ([choosing.md](choosing.md)): {chosen}.

- *yes*: always.
- *from a checkpoint*: only with `--resume_from_checkpoint DIR`.
- *no*: never.
- *depends*: *from a checkpoint* in a run with `load_best_model_at_end`, otherwise *yes*.

"""


def page() -> str:
    """Return the text of the page."""
    train = [typed for options in (RunOptions, QuarkOptions) for typed in typed_fields(options)]
    run = {field.name for field in dataclasses.fields(RunOptions)}
    chosen = join_words(f"`{name}`" for name in NAMES).replace(" or ", " and ")
    lines = [INTRODUCTION.format(chosen=chosen), "## quarkrl train\n\n"]
    for group in GROUPS:
        rows = [(field, kind) for field, kind in train if field.metadata["group"] == group]
        lines += [f"### {group.capitalize()}\n\n", *_entries(rows, no_rule=run), "\n"]
    rules: dict[str, list[str]] = {}
    for name, field in INHERITED.items():
        rules.setdefault(RESUME[field.metadata["resume"]], []).append(f"`{name}`")
    lines.append(
        "### Of transformers.TrainingArguments\n\n"
        "Every field of `transformers.TrainingArguments` is an option; `quarkrl train --help_all` lists them. A\n"
        "resumed run may change all of them, except for these.\n\n"
    )
    lines += [f"- Resume: {rule}. {', '.join(names)}.\n" for rule, names in rules.items() if rule != "yes"]
    for command, classes in {
        "samples": (SamplesOptions,),
        "watch": (WatchOptions,),
        "generate": (GenerateOptions, SamplingOptions),
        "chat": (ChatOptions,),
        "play": (PlayOptions,),
        "words": (WordsOptions, RewardOptions, SamplingOptions),
        "evaluate": (InputOptions, EvaluationRewards, EvaluationOptions),
        "score": (ScoreOptions, RewardOptions),
        "report": (ReportOptions,),
        "export": (ExportOptions,),
        "push": (PushOptions,),
    }.items():
        rows = [typed for options in classes for typed in typed_fields(options)]
        lines += [f"\n## quarkrl {command}\n\n", *_entries(rows, no_rule={field.name for field, _ in rows})]
    return "".join(lines)


def _entries(rows: list[tuple[dataclasses.Field, object]], no_rule: set[str]) -> list[str]:
    lines = []
    for field, kind in rows:
        choices = choices_of(field, kind)
        valid = join_words(choices) if choices else limits_in_words(field.metadata)
        sentences = [field.metadata["help"], f"Valid: {valid}." if valid else ""]
        if field.name not in no_rule:
            sentences.append(f"Resume: {RESUME[field.metadata['resume']]}.")
        lines.append(f"- `{field.name}`{_in_words(default_of(field))}: {' '.join(filter(None, sentences))}\n")
    return lines


def _in_words(default: object) -> str:
    if default is dataclasses.MISSING:
        return " (required)"
    if default is None or default in ([], ()):
        return ""
    return f" (`{' '.join(map(str, default)) if isinstance(default, list | tuple) else default}`)"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
