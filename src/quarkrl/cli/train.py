"""`quarkrl train`: train a model with Quark. `train_options.py` reads its options."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkrl.cli.before_after import BeforeAfter, evaluation_options, show_after, show_before, summary
from quarkrl.cli.common import (
    IN_TEMPLATE_NOTE,
    RewardOptions,
    busy,
    has_plain_texts,
    is_first_process,
    model_path,
    note,
    note_skipped,
    quiet_libraries,
    working_directory,
)
from quarkrl.cli.report import try_to_report
from quarkrl.cli.run_prompts import load_run_prompts
from quarkrl.cli.train_checks import check_train
from quarkrl.cli.train_options import RunOptions, TrainCommand, parse_train, print_help
from quarkrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quarkrl.data.prompts import Prompts
    from quarkrl.evaluation.results import Evaluation
    from quarkrl.rewards.scorer import Scorer
    from quarkrl.training.config import QuarkConfig
    from quarkrl.training.first_look import FirstLook
    from quarkrl.training.sizing import RewardSpread
    from quarkrl.training.trainer import QuarkTrainer

NAME = "train"
HELP = "train a model with Quark"


def parse(argv: Sequence[str]) -> TrainCommand:
    """Parse the arguments; what can be wrong without torch and transformers is checked before they are imported.

    Raises:
        UserError: an option is unknown or invalid, or names what does not exist.
    """
    print_help(argv)
    check_train(argv)
    with busy("loading torch and transformers"):
        return parse_train(argv)


def run(command: TrainCommand) -> Path | None:
    """Train, and compare the model with the one before; return the directory of the final model, if there is one."""
    from quarkrl.runs.records import check_no_run

    run, config = command.run, command.config
    if line := command.ignored_options_note():
        note(line)
    quiet_libraries()
    output_dir, resume = Path(config.output_dir), config.resume_from_checkpoint or run.resume
    with _place(output_dir, run.dry_run):
        if not resume:
            check_no_run(output_dir)
        directory = os.getcwd()
        with busy(f"loading {run.model}"):
            scorer = _scorer(run, config)
            with working_directory(directory):  # Importing a reward may have changed it.
                trainer, comparison = _prepare(command, scorer)
        trainer.progress.show_start_notes()
        note_skipped(trainer.prompts)
        if run.dry_run:
            note("dry run: nothing was trained or written; a few completions were sampled and scored for the plan")
            return None
        with working_directory(directory):
            baseline = comparison and comparison.measure_before()
        if baseline:
            show_before(baseline)
        trainer.interrupts.exit_on_second_sigint = True
        trainer.train(resume_from_checkpoint=resume)
        final = trainer.save_final()
    note(f"model: {final}   samples: {output_dir / 'pool'}   metrics: {output_dir / 'metrics.jsonl'}")
    if comparison and baseline:
        del trainer
        with working_directory(directory):
            _compare(comparison, baseline, final)
    with working_directory(directory):
        report = try_to_report(output_dir)
    if report:
        note(f"report: {report}")
    if config.push_to_hub and is_first_process():
        _push(final, config)
    return final


def _push(final: Path, config: "QuarkConfig") -> None:
    """Upload the final model, whose card has the results by now."""
    from quarkrl.models.hub import END_OF_TRAINING, push_directory

    name, private, revision = config.hub_name, config.hub_private_repo, config.hub_revision
    try:
        with busy(f"uploading {final}"):
            address = push_directory(final, name, private, revision, END_OF_TRAINING)
    except UserError as error:
        raise UserError(f"{error} The model is saved. Upload it later: quarkrl push {final} {name}") from error
    note(f"hub: {address}")


def _place(output_dir: Path, dry_run: bool) -> AbstractContextManager[None]:
    """Return the context of a run's directory: locked, or as it was before if nothing is to be started."""
    from quarkrl.runs.directory import locked

    if dry_run:
        return _without_new_directories(output_dir)
    return locked(output_dir) if is_first_process() else nullcontext()


@contextmanager
def _without_new_directories(output_dir: Path) -> Iterator[None]:
    """Remove the directories that are created within the context. `Trainer` creates that of its run."""
    from quarkrl.runs.directory import make_run_directory

    missing = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    make_run_directory(output_dir)  # Whether the run could; `Trainer` would report it as an error of its own.
    try:
        yield
    finally:
        for path in filter(Path.exists, missing):
            path.rmdir()


def _prepare(command: TrainCommand, scorer: "Scorer | None") -> "tuple[QuarkTrainer, BeforeAfter | None]":
    """Load model and prompts, choose the options that follow from them, and make the trainer and what measures it."""
    from transformers import EarlyStoppingCallback

    from quarkrl.models.adapters import lora_config
    from quarkrl.models.loading import load_model, load_tokenizer
    from quarkrl.runs.directory import ConfigFile
    from quarkrl.training.trainer import QuarkTrainer

    run, config = command.run, command.config
    path, patience = model_path(run.model or ""), run.early_stopping_patience
    loading: dict[str, Any] = {"dtype": run.dtype, "attn_implementation": run.attn_implementation}
    model = load_model(path, run.trust_remote_code, load_in_4bit=run.load_in_4bit, **loading)
    tokenizer = load_tokenizer(path, run.trust_remote_code)
    prompts = load_run_prompts(run, config.skip_bad_prompts, tokenizer)
    raw = config.raw = _is_raw(run, config, prompts.read, tokenizer)
    look = None if run.resume else _first_look(run, config, model, tokenizer, prompts.read)
    speed = look.speed if look else None
    with working_directory(os.getcwd()):  # A call of a reward may change it.
        spread = _spread(command, look, scorer, prompts.scored)
    num_scored = len(prompts.scored or ()) if prompts.training is None else None
    num_prompts = None if run.stream_prompts else len(prompts.training or ())
    command, choice = command.with_defaults(model.num_parameters(), num_prompts, speed, num_scored, spread)
    run, config = command.run, command.config
    config.raw = raw
    config.push_to_hub &= not run.dry_run  # The trainer would create the repository.
    ref_path = model_path(run.ref_model) if run.ref_model else None
    trainer = QuarkTrainer(
        model,
        scorer,
        config,
        train_dataset=prompts.training,
        eval_dataset=prompts.evaluated,
        processing_class=tokenizer,
        ref_model=load_model(ref_path, run.trust_remote_code, **loading) if ref_path else None,
        peft_config=lora_config(run),
        callbacks=[
            ConfigFile(command.non_default_options),
            *([EarlyStoppingCallback(patience)] if patience else []),
        ],
        scored_data=prompts.scored,
    )
    if config.raw is False:
        trainer.progress.start_notes.append(IN_TEMPLATE_NOTE)
    trainer.prompts_source, trainer.scored_source = run.prompts, run.scored_data
    comparison = _comparison(run, trainer, scorer, prompts.measured)
    if speed:
        evaluated = comparison.num_completions if comparison else 0
        if prompts.evaluated and config.eval_strategy == "epoch":
            evaluated += config.num_iterations * len(prompts.evaluated) * config.eval_samples_per_prompt
        estimate = trainer.plan.time(speed, evaluated)
        trainer.progress.start_notes.append(estimate.describe())
        trainer.progress.plan = None if config.resume_from_checkpoint else estimate
    trainer.progress.start_notes += filter(None, [choice, prompts.note])
    return trainer, comparison


def _is_raw(
    run: RunOptions, config: "QuarkConfig", sources: "Sequence[Prompts]", tokenizer: "PreTrainedTokenizerBase"
) -> bool | None:
    """Return the option `raw`: False for a chat model's texts, unless it is set. A resumed run keeps what it had."""
    from quarkrl.data.chats import reads_chats
    from quarkrl.runs.records import recorded_fact

    if config.raw is not None or run.prompt_tokens is not None:
        return config.raw
    if run.resume or config.resume_from_checkpoint:
        options = recorded_fact(Path(config.output_dir), "options")
        return options.get("raw") if isinstance(options, dict) else None  # `open_run` reports a damaged file.
    has_texts = any(has_plain_texts(prompts, tokenizer) for prompts in sources)
    wraps = has_texts or (run.stream_prompts and reads_chats(tokenizer))
    return False if wraps else None


def _first_look(
    run: RunOptions, config: "QuarkConfig", model: Any, tokenizer: Any, sources: "Sequence[Prompts]"
) -> "FirstLook | None":
    """Sample a few completions, where one process has the whole model.

    Raises:
        UserError: there is a budget and the speed cannot be measured.
    """
    from quarkrl.data.chat_defaults import with_chat_defaults
    from quarkrl.training.first_look import take_first_look

    is_simple = config.world_size == 1 and not config.fsdp and not config.deepspeed and config.engine == "builtin"
    look = None
    if is_simple and not run.stream_prompts:
        tokenizer = with_chat_defaults(tokenizer, config.system_prompt, config.chat_template_kwargs)
        with suppress(UserError):  # The trainer reports it, with the limit that its reward tokens need.
            look = take_first_look(model, tokenizer, sources[0], config)
    if run.budget and not look:
        raise UserError(
            f"budget {run.budget!r}: must be left out where the speed of the model is not known: several processes, "
            "vLLM, or a stream. Set --num_iterations."
        )
    return look


def _spread(
    command: TrainCommand, look: "FirstLook | None", scorer: "Scorer | None", scored: "Prompts | None"
) -> "RewardSpread | None":
    """Return how the rewards differ, of the run's scored samples or of a first look; None if nothing depends on it.

    An async reward asks a server, which may cost money or limit requests, so it is not called before the run.
    """
    from quarkrl.training.first_look import spread_of_columns

    if not command.chooses_by_rewards:
        return None
    if scored is not None:
        return spread_of_columns(scored, command.config)
    return look.spread(scorer, command.config) if look and scorer and not scorer.is_async else None


def _comparison(run: RunOptions, trainer: "QuarkTrainer", scorer: "Scorer | None", prompts: "Prompts | None") -> Any:
    """Return what measures the model before and after training, in the first process; None if the run does without."""
    if scorer is None or not run.held_out or not is_first_process():
        return None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or run.load_in_4bit:
        why = "4-bit weights" if run.load_in_4bit else "sharded weights"
        trainer.progress.start_notes.append(f"results: {why} are not measured. Use quarkrl evaluate after the run.")
        return None
    from quarkrl.data.hold_out import choose_prompts

    config = trainer.args
    prompts = prompts or choose_prompts(replace(trainer.prompts, ids=[]), run.held_out)
    prompts = replace(prompts, in_template=config.raw is False)
    plan = trainer.plan
    explored = plan.explored * config.num_iterations if plan.explores else plan.num_scored
    options = evaluation_options(
        config,
        explored,
        len(prompts),
        samples=run.result_samples,
        trust_remote_code=run.trust_remote_code,
        bf16=run.dtype == "bfloat16",
    )
    start = model_path(run.model or "")
    return BeforeAfter(
        start,
        prompts,
        scorer,
        options,
        Path(config.output_dir),
        config.keep_special_tokens,
        plan.fewer_draws(),
    )


def _compare(comparison: BeforeAfter, baseline: "Evaluation", final: Path) -> None:
    """Measure the final model and show what has changed. The run is finished: an error does not end the command."""
    import gc

    import torch

    from quarkrl.models.model_card import add_facts

    gc.collect()  # The trainer's models, before others are loaded.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        evaluation = comparison.measure_after(final, baseline)
    except UserError as error:
        note(f"results: not measured. {error}")
    else:
        show_after(evaluation, final)
        add_facts(final, evaluation=summary(evaluation))


def _scorer(run: RunOptions, config: "QuarkConfig") -> "Scorer | None":
    """Return the rewards of a run; None if it names none, because all of its samples have scores."""
    if run.reward is None:
        return None
    rewards = RewardOptions(run.reward or [], run.reward_label, config.score_cache)
    weights, condition_on = config.reward_weights, config.condition_on
    return rewards.scorer(weights=weights, condition_on=condition_on, timeout=config.reward_timeout)
