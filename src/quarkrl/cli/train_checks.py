"""Checks of `quarkrl train` before torch and transformers are imported: an error shows at once, not after seconds.

The options are parsed a second time afterwards (`train_options.py`), with those of `transformers.TrainingArguments`,
whose names and types are read from its source here.
"""

import argparse
import ast
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quarkrl.cli.config_file import as_flags, check_entries, file_entries, preset_names
from quarkrl.cli.guesses import expand_train
from quarkrl.cli.inputs import check_model, check_prompts, check_rewards, missing_reward
from quarkrl.cli.parser import options_from, reader
from quarkrl.cli.train_options import RunOptions, list_options, options_without_null, train_parser
from quarkrl.errors import UserError
from quarkrl.options import check_options
from quarkrl.runs.records import OPTIONS_FILE, check_no_run, check_resumable
from quarkrl.training.options import QuarkOptions

_NUMBERS = {"int": int, "float": float}


def check_train(argv: Sequence[str]) -> None:
    """Check the arguments of `quarkrl train`, and what they name.

    Raises:
        UserError: an option is unknown or has an invalid value, or a model, a file or a reward does not exist.
    """
    values = _parse(expand_train(argv))
    run = options_from(argparse.Namespace(**values), RunOptions)
    check_options(options_from(argparse.Namespace(**values), QuarkOptions))
    directory = (values.get("output_dir") or [None])[0]
    resumes = run.resume or bool(values.get("resume_from_checkpoint"))
    if run.resume and not values.get("resume_from_checkpoint") and directory is not None:
        check_resumable(Path(directory))
    _check_required(run, directory)
    check_model(run.model)
    check_model(run.ref_model, "ref_model")
    check_prompts(run.prompts, run.scored_data, run.eval_prompts)
    check_rewards(run.reward or [], run.reward_label)
    if directory is not None and not resumes:
        check_no_run(Path(directory))


def inherited_options() -> dict[str, str]:
    """Return the options of `transformers.TrainingArguments` with their types, from its source.

    The package is not imported. A test compares the names with those of the class.
    """
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    tree = ast.parse(Path(package.origin).with_name("training_args.py").read_bytes())
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = (node for node in next(classes).body if isinstance(node, ast.AnnAssign))
    return {field.target.id: ast.unparse(field.annotation) for field in fields if isinstance(field.target, ast.Name)}


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    """Parse flags and file. The values of inherited options are lists, empty ones for bare flags."""
    parser = train_parser()
    own = {field.name for options in (RunOptions, QuarkOptions) for field in dataclasses.fields(options)}
    inherited = {name: kind for name, kind in inherited_options().items() if name not in own}
    for name, annotation in inherited.items():
        kind = _NUMBERS.get(annotation.removesuffix(" | None"), str)
        flags = [f"--{name}", f"--no_{name}"]
        parser.add_argument(*flags, dest=name, nargs="*", type=reader(kind), default=argparse.SUPPRESS)
    known = [*own, *inherited]
    parser.flag_names = [*known, "config"]
    entries, source = file_entries(argv, known)
    check_entries(source, entries, list_options(QuarkOptions) | inherited.keys(), options_without_null(QuarkOptions))
    parser.set_defaults(**{name: None for name, value in entries.items() if value is None and name in own})
    return vars(parser.parse([*as_flags(entries), *argv]))


def _check_required(run: RunOptions, directory: str | None) -> None:
    only_scored = run.scored_data is not None and run.prompts is None
    for name in ("prompt_tokens", "stream_prompts") if only_scored else ():
        if getattr(run, name):
            raise UserError(f"{name} {getattr(run, name)}: must be left out of a run without prompts. Set --prompts.")
    needed = ["model", "prompts", "reward"]
    if only_scored:  # A reward only measures, then.
        needed = ["model", *(["reward"] if run.eval_prompts else [])]
    for name in needed:
        if getattr(run, name) is not None:
            continue
        if run.resume:
            raise UserError(
                f"output_dir {directory!r}: must hold {OPTIONS_FILE} to resume. For a run of a script, call "
                "trainer.train(resume_from_checkpoint=True) there; otherwise set --config."
            )
        if name == "reward":
            raise missing_reward()
        builtin = " to builtin, a file or a data set" if name == "prompts" else ""
        presets = ", ".join(preset_names())
        raise UserError(f"{name} is missing. Set --{name}{builtin}, or --config with one of {presets}.")
