"""The command `quarkrl`: train, generate, evaluate, score, demo.

A user's mistake ends with one line, `error: …`, and exit code 2; a finished command with 0. What a command is asked
for goes to standard output; progress and notes go to standard error.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkrl import __version__
from quarkrl.cli import evaluate as evaluate_command
from quarkrl.cli import score as score_command
from quarkrl.cli.train_options import Parser, RunArguments, left_out, natural, parse_train, positive, preset_names
from quarkrl.errors import UserError
from quarkrl.runs.interrupts import Stopped

if TYPE_CHECKING:
    from rich.console import Console

    from quarkrl.data.prompts import Prompts
    from quarkrl.evaluation.evaluate import Evaluation
    from quarkrl.rewards.scorer import Scorer
    from quarkrl.training.config import QuarkConfig

BUILTIN = "builtin"  # Names the embedded model, and its prompts.


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Libraries' own warnings, about what the user did not write and cannot change.
    warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|is_gradient_checkpointing|find_unused).*")
    try:
        argv = sys.argv[1:] if argv is None else list(argv)
        if argv[:1] == ["train"]:  # It has a parser of its own, made from the options' dataclasses.
            train(*parse_train(argv[1:]))
        else:
            arguments = _parser().parse_args(argv)
            arguments.run(arguments)
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to say, and the interpreter must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:  # OSError: a directory that cannot be written, a full disk.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        from quarkrl.training.overlap import wait_for_all

        _note(str(stopped))
        wait_for_all()
        return stopped.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(prog="quarkrl", description="Teach a language model what not to do, with Quark.")
    parser.add_argument("--version", action="version", version=f"quarkrl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="unlearn toxicity on the built-in model; minutes on a laptop")
    demo.add_argument("--output_dir", help="where the run goes (default: runs/demo, or runs/demo-2, … if taken)")
    demo.set_defaults(run=_demo)

    commands.add_parser("train", help="train a model with Quark (quarkrl train --help lists its options)")

    generate = commands.add_parser("generate", help="completions of a trained model, of any quantile")
    generate.add_argument("model", help="a run's final/, a checkpoint, a hub name, or a plain model")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given again")
    source.add_argument("--prompts", metavar="FILE", help="prompts: a file or a data set")
    generate.add_argument("--skip_bad_prompts", action="store_true", help="leave bad prompts out, and say how many")
    generate.add_argument("--quantile", default="best", help="best, worst, or 0 (worst) to K-1 (default: %(default)s)")
    generate.add_argument("--num_return_sequences", type=positive, default=1, metavar="N", help="for each prompt")
    generate.add_argument("--json", action="store_true", help="a JSON object a line: prompt, completions")
    _add_sampling(generate)
    generate.add_argument("--guidance_scale", type=float, default=1.0, help="1 (default) is plain, more goes further")
    generate.add_argument("--guidance_from", default="worst", help="a quantile, or reference (default: worst)")
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser("evaluate", help="measure a model beside its reference")
    evaluate_command.add_options(evaluate)
    _add_reward(evaluate)
    _add_sampling(evaluate)
    evaluate.set_defaults(run=_evaluate)

    score = commands.add_parser("score", help="score texts, to get to know a reward before training on it")
    score_command.add_options(score)
    _add_reward(score)
    score.set_defaults(run=_score)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, default=20, help="tokens of a completion (default: 20)")
    parser.add_argument("--min_new_tokens", type=int, default=0, help="tokens before EOS may come (default: 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: 1.0)")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus (default: 0.9)")
    parser.add_argument("--greedy", action="store_true", help="take the most likely token each time")
    parser.add_argument("--seed", type=natural, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument("--batch_size", type=positive, default=128, help="completions at a time (default: 128)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with a model")


def _add_reward(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reward", nargs="+", required=True, metavar="REWARD", help=_reward_help())
    parser.add_argument("--reward_label", help="label of a classifier, or 'not LABEL'")
    parser.add_argument("--score_cache", metavar="FILE", help="keeps scores, so that no text is scored twice")


def _reward_help() -> str:
    return RunArguments.__dataclass_fields__["reward"].metadata["help"]


# Commands.


def train(run: RunArguments, config: "QuarkConfig", given: dict[str, Any]) -> Path:
    """Train as `quarkrl train` does; returns where the final model is."""
    from transformers import EarlyStoppingCallback

    from quarkrl.models.loading import load_model, load_tokenizer
    from quarkrl.runs import directory as rundir
    from quarkrl.training.held_out import check_metric
    from quarkrl.training.trainer import QuarkTrainer

    for name in ("model", "prompts", "reward"):
        if getattr(run, name) is None:
            if run.resume:
                raise UserError(f"output_dir {config.output_dir!r} has no config.yaml to resume with: give --config")
            raise UserError(f"{name} is missing: give --{name}, or --config with one of {', '.join(preset_names())}")
    if line := left_out(given, config):
        _note(line)
    _quiet()
    output_dir, resume = Path(config.output_dir), run.resume or config.resume_from_checkpoint
    with rundir.locked(output_dir) if _is_first_process() else nullcontext():
        if not resume and rundir.holds_run(output_dir):
            raise UserError(
                f"output_dir {str(output_dir)!r} already holds a run: choose another --output_dir, "
                "or go on with it by --resume"
            )
        scorer = _scorer(run.reward, run.reward_label, config)
        check_metric(config.metric_for_best_model, scorer.attributes, scorer.names)
        path, skip_bad, patience = _model_path(run.model or ""), config.skip_bad_prompts, run.early_stopping_patience
        trusted, stoppers = run.trust_remote_code, [EarlyStoppingCallback(patience)] if patience else []
        trainer = QuarkTrainer(
            load_model(path, trusted, dtype=run.dtype, attn_implementation=run.attn_implementation),
            scorer,
            config,
            train_dataset=_prompts(run, run.prompts or "", run.prompt_split, skip_bad),
            eval_dataset=_held_out(run, skip_bad) if run.eval_prompts else None,
            processing_class=load_tokenizer(path, trusted),
            ref_model=load_model(_model_path(run.ref_model), trusted) if run.ref_model else None,
            peft_config=_lora(run.lora_rank),
            callbacks=[rundir.ConfigFile(given), *stoppers],
        )
        _note_skipped(trainer.prompts)
        trainer.interrupts.at_once = True
        trainer.train(resume_from_checkpoint=resume)
        final = trainer.save_final()
    _note(f"model: {final}   samples: {output_dir / 'pool'}   metrics: {output_dir / 'metrics.jsonl'}")
    return final


def _generate(arguments: argparse.Namespace) -> None:
    from quarkrl.data.prompts import load_prompts
    from quarkrl.sampling.generator import QuarkGenerator

    _quiet()
    sampling = _sampling(arguments)
    source = arguments.prompt if arguments.prompt else arguments.prompts
    loaded = load_prompts(source, skip_bad=arguments.skip_bad_prompts)
    _note_skipped(loaded)
    trusted = arguments.trust_remote_code
    generator = QuarkGenerator.from_pretrained(_model_path(arguments.model), trust_remote_code=trusted)
    prompts = loaded.prompts
    completions = generator.generate(
        prompts,
        quantile=arguments.quantile,
        num_return_sequences=arguments.num_return_sequences,
        seed=arguments.seed,
        guidance_scale=arguments.guidance_scale,
        guidance_from=arguments.guidance_from,
        batch_size=arguments.batch_size,
        **dataclasses.asdict(sampling),
    )
    for prompt, texts in zip(prompts, completions, strict=True):
        if arguments.json:
            print(json.dumps({"prompt": prompt, "completions": texts}, ensure_ascii=False))
        else:
            for text in texts:
                print(f"{prompt}{text}" if isinstance(prompt, str) else text)


def _evaluate(arguments: argparse.Namespace) -> None:
    _quiet()
    evaluate_command.run(
        arguments,
        sampling=_sampling(arguments),
        model_path=_model_path,
        prompts_path=lambda name: _builtin_prompts("eval") if name == BUILTIN else name,
        evaluate=_evaluated,
        console=_console(stderr=False),
        note=_note,
    )


def _score(arguments: argparse.Namespace) -> None:
    score_command.run(arguments, _scorer(arguments.reward, arguments.reward_label, cache=arguments.score_cache), _note)


def _demo(arguments: argparse.Namespace) -> None:
    from quarkrl.data.prompts import load_prompts
    from quarkrl.evaluation.tables import print_side_by_side, print_table

    output_dir = arguments.output_dir or free_directory("runs/demo")
    run, config, given = parse_train(["--config", "tiny-toxicity", "--output_dir", output_dir])
    _note("Unlearning toxicity on the built-in 1M-parameter model: explore, quantize, learn.")
    final = train(run, config, given)
    _quiet()
    prompts = load_prompts(_builtin_prompts("eval"))
    scorer = _scorer(run.reward, run.reward_label)
    at_once = config.generation_batch_size or 128
    evaluation = _evaluated(final, prompts, scorer, reference=_model_path(BUILTIN), batch_size=at_once)
    results = Path(output_dir) / "results.json"
    evaluation.save(results)
    print_table(evaluation, _console(stderr=False))
    print_side_by_side(evaluation, 3, _console(stderr=False))
    _note(f"model: {final}   samples: {config.output_dir}/pool   results: {results}")
    _note(f'try it: quarkrl generate {final} --prompt "You are" --quantile worst')


# What the commands share.


def free_directory(name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, … that holds no run."""
    from quarkrl.runs.directory import holds_run

    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in names if not holds_run(Path(candidate)))


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # As torchrun and accelerate number them.


def _scorer(
    rewards: Sequence[str] | None, label: str | None, config: "QuarkConfig | None" = None, cache: str | None = None
) -> "Scorer":
    from quarkrl.rewards.registry import resolve
    from quarkrl.rewards.scorer import Scorer

    functions = [resolve(name, label=label) for name in rewards or []]
    if config is None:
        return Scorer(functions, cache=cache)
    return Scorer(functions, config.reward_weights, config.condition_on, config.score_cache, config.reward_timeout)


def _prompts(run: RunArguments, source: str, split: str, skip_bad: bool, builtin: str = "train") -> "Prompts":
    from quarkrl.data.prompts import load_prompts

    path = _builtin_prompts(builtin) if source == BUILTIN else source
    prompts = load_prompts(path, split=split, column=run.prompt_column, skip_bad=skip_bad)
    if run.prompt_tokens is None:
        return prompts
    from quarkrl.data.truncation import cut
    from quarkrl.models.loading import load_tokenizer

    return cut(prompts, load_tokenizer(_model_path(run.model or ""), run.trust_remote_code), run.prompt_tokens)


def _held_out(run: RunArguments, skip_bad: bool) -> "Prompts":
    source = run.eval_prompts or ""
    # Of the data set that is trained on, another split, or nothing would be held out.
    split = run.eval_prompt_split or ("test" if source == run.prompts else "train")
    return _prompts(run, source, split, skip_bad, "eval")


def _note_skipped(prompts: "Prompts") -> None:
    if prompts.skipped:
        _note(f"prompts left out: {', '.join(f'{count} {reason}' for reason, count in prompts.skipped.items())}")


def _builtin_prompts(split: str) -> str:
    from quarkrl.builtin import prompts_path

    return str(prompts_path(split))  # type: ignore[arg-type]


def _model_path(name: str) -> str:
    from quarkrl.builtin import model_path

    return str(model_path()) if name == BUILTIN else name


def _lora(rank: int | None) -> Any:
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _sampling(arguments: argparse.Namespace) -> Any:
    from quarkrl.sampling.strategy import Sampling

    return Sampling(
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.min_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        do_sample=not arguments.greedy,
    )


def _evaluated(*args: Any, **kwargs: Any) -> "Evaluation":
    """`evaluation.evaluate` with a bar for each row."""
    from quarkrl.evaluation.evaluate import evaluate

    with _bars() as notify:
        return evaluate(*args, notify=notify, **kwargs)


@contextmanager
def _bars() -> Iterator[Any]:
    from quarkrl.training.progress import new_bars

    bars, tasks = new_bars(_console()), {}

    def notify(name: str, done: int, total: int) -> None:
        if name not in tasks:
            bars.start()  # Not before: bars that show nothing leave an empty line, beside an error too.
            tasks[name] = bars.add_task(f"evaluate  {name}", total=total, figures="")
        bars.update(tasks[name], completed=done)

    try:
        yield notify
    finally:
        if tasks:
            bars.stop()


def _console(stderr: bool = True) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def _note(text: str) -> None:
    if _is_first_process():
        print(text, file=sys.stderr, flush=True)


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
