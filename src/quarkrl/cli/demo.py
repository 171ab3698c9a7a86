"""`quarkrl demo`: unlearn toxicity on the embedded model, then compare it with its reference."""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from quarkrl.cli import train
from quarkrl.cli.common import (
    BUILTIN,
    RewardOptions,
    console,
    model_path,
    note,
    progress_bars,
    prompts_path,
    quiet_libraries,
)
from quarkrl.cli.parser import Parser
from quarkrl.cli.report import try_to_report

if TYPE_CHECKING:
    from quarkrl.data.prompts import Prompts
    from quarkrl.rewards.scorer import Scorer

NAME = "demo"
HELP = "unlearn toxicity on the built-in model, in minutes on a laptop"


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl demo`."""
    parser.add_argument("--output_dir", metavar="DIR", help="directory of the run (runs/demo, or the next free name)")


def run(arguments: argparse.Namespace) -> None:
    """Show what the model says now, train with the preset tiny-toxicity, evaluate, and print tables and examples."""
    from quarkrl.data.prompts import load_prompts
    from quarkrl.evaluation.evaluate import evaluate
    from quarkrl.evaluation.options import EvaluationOptions
    from quarkrl.evaluation.tables import print_side_by_side, print_table

    output_dir = arguments.output_dir or free_directory("runs/demo")
    command = train.parse(["--config", "tiny-toxicity", "--output_dir", output_dir])
    note("Unlearning toxicity on the built-in 1M-parameter model: explore, quantize, learn. Then a comparison.")
    quiet_libraries()
    scorer = RewardOptions(command.run.reward or [], command.run.reward_label).scorer()
    prompts = load_prompts(prompts_path(BUILTIN, "eval"))
    for text in rudest_texts(prompts, scorer, 2):
        note(f"before: {text}")
    final = train.run(command)
    options = EvaluationOptions(reference=model_path(BUILTIN), batch_size=command.config.generation_batch_size or 128)
    with progress_bars("evaluate") as notify:
        evaluation = evaluate(
            final,
            prompts,
            scorer,
            options,
            notify=notify,
        )
    results = Path(output_dir) / "results.json"
    evaluation.save(results)
    try_to_report(output_dir)  # Again: now it has the evaluation.
    print_table(evaluation, console(stderr=False))
    print_side_by_side(evaluation, 3, console(stderr=False))
    note(f"model: {final}   samples: {output_dir}/pool   results: {results}")
    note(f'try it: quarkrl generate {final} --prompt "You are" --quantile worst')


def rudest_texts(prompts: "Prompts", scorer: "Scorer", count: int) -> list[str]:
    """Sample each prompt once with the built-in model, and return the texts with the lowest rewards."""
    from quarkrl.sampling.generator import QuarkGenerator

    texts = prompts.prompts
    (completions,) = zip(*QuarkGenerator.from_pretrained(model_path(BUILTIN)).generate(texts, seed=0), strict=True)
    rewards = scorer(texts, list(completions), [[] for _ in texts]).rewards[:, 0]
    return [f"{texts[i]}{completions[i]}  (reward {rewards[i]:.2f})" for i in rewards.argsort()[:count]]


def free_directory(name: str) -> str:
    """Return `name`, or the first of `name-2`, `name-3`, … that holds no run."""
    from quarkrl.runs.directory import holds_run

    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in names if not holds_run(Path(candidate)))
