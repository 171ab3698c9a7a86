"""`quarkrl train`: train a model with Quark. `train_options.py` reads its options."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkrl.cli.common import (
    PromptSource,
    RewardOptions,
    is_first_process,
    model_path,
    note,
    note_skipped,
    prompts_path,
    quiet_libraries,
    working_directory,
)
from quarkrl.cli.report import try_to_report
from quarkrl.cli.train_options import RunOptions, TrainCommand, parse_train, preset_names
from quarkrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quarkrl.data.prompts import Prompts
    from quarkrl.rewards.scorer import Scorer
    from quarkrl.training.config import QuarkConfig

NAME = "train"
HELP = "train a model with Quark"


parse = parse_train


def run(command: TrainCommand) -> Path:
    """Train; return the directory of the final model."""
    from transformers import EarlyStoppingCallback

    from quarkrl.models.adapters import lora_config
    from quarkrl.models.loading import load_model, load_tokenizer
    from quarkrl.runs.directory import ConfigFile, check_no_run, locked
    from quarkrl.training.trainer import QuarkTrainer

    run, config = command.run, command.config
    _check_required(run, config)
    if line := command.ignored_options_note():
        note(line)
    quiet_libraries()
    output_dir, resume = Path(config.output_dir), run.resume or config.resume_from_checkpoint
    with locked(output_dir) if is_first_process() else nullcontext():
        if not resume:
            check_no_run(output_dir)
        directory = os.getcwd()
        scorer = _scorer(run, config)
        path, patience = model_path(run.model or ""), run.early_stopping_patience
        loading: dict[str, Any] = {"dtype": run.dtype, "attn_implementation": run.attn_implementation}
        with working_directory(directory):  # Importing a reward may have changed it.
            model = load_model(path, run.trust_remote_code, load_in_4bit=run.load_in_4bit, **loading)
            command, choice = command.with_size_defaults(model.num_parameters())
            run, config = command.run, command.config
            tokenizer = load_tokenizer(path, run.trust_remote_code)
            ref_path = model_path(run.ref_model) if run.ref_model else None
            trainer = QuarkTrainer(
                model,
                scorer,
                config,
                train_dataset=train_prompts(run, config.skip_bad_prompts, tokenizer),
                eval_dataset=held_out_prompts(run, config.skip_bad_prompts, tokenizer) if run.eval_prompts else None,
                processing_class=tokenizer,
                ref_model=load_model(ref_path, run.trust_remote_code, **loading) if ref_path else None,
                peft_config=lora_config(run),
                callbacks=[
                    ConfigFile(command.non_default_options),
                    *([EarlyStoppingCallback(patience)] if patience else []),
                ],
            )
        trainer.progress.start_notes += [choice] if choice else []
        note_skipped(trainer.prompts)
        trainer.interrupts.exit_on_second_sigint = True
        trainer.train(resume_from_checkpoint=resume)
        final = trainer.save_final()
    note(f"model: {final}   samples: {output_dir / 'pool'}   metrics: {output_dir / 'metrics.jsonl'}")
    if report := try_to_report(output_dir):
        note(f"report: {report}")
    return final


def train_prompts(run: RunOptions, skip_bad: bool, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Any:
    """Load the prompts to explore, or open their stream. The tokenizer counts `prompt_tokens`."""
    if run.stream_prompts:
        from quarkrl.data.readers import open_stream

        if run.prompt_tokens is not None:
            raise UserError(f"prompt_tokens {run.prompt_tokens}: must be left out of a run with --stream_prompts.")
        return open_stream(prompts_path(run.prompts or "", "train"), run.prompt_split, run.prompt_column)
    source = PromptSource(run.prompts or "", run.prompt_column, run.prompt_split, "train", run.prompt_tokens)
    return source.load(skip_bad, tokenizer)


def held_out_prompts(run: RunOptions, skip_bad: bool, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "Prompts":
    """Load the held-out prompts. If they come from the data set of the training prompts, its test split is used."""
    split = run.eval_prompt_split or ("test" if run.eval_prompts == run.prompts else "train")
    return PromptSource(run.eval_prompts or "", run.prompt_column, split, tokens=run.prompt_tokens).load(
        skip_bad, tokenizer
    )


def _check_required(run: RunOptions, config: "QuarkConfig") -> None:
    for name in ("model", "prompts", "reward"):
        if getattr(run, name) is None:
            if run.resume:
                raise UserError(f"output_dir {config.output_dir!r}: must hold config.yaml to resume. Set --config.")
            raise UserError(f"{name} is missing. Set --{name}, or --config with one of {', '.join(preset_names())}.")


def _scorer(run: RunOptions, config: "QuarkConfig") -> "Scorer":
    rewards = RewardOptions(run.reward or [], run.reward_label, config.score_cache)
    weights, condition_on = config.reward_weights, config.condition_on
    return rewards.scorer(weights=weights, condition_on=condition_on, timeout=config.reward_timeout)
