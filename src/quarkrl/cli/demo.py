"""`quarkrl demo`: unlearn toxicity on the embedded model, then compare it with its reference."""

import argparse
import itertools
from pathlib import Path

from quarkrl.cli import train
from quarkrl.cli.common import note
from quarkrl.cli.parser import Parser

NAME = "demo"
HELP = "unlearn toxicity on the built-in model, in minutes on a laptop"


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl demo`."""
    parser.add_argument("--output_dir", metavar="DIR", help="directory of the run (runs/demo, or the next free name)")


def run(arguments: argparse.Namespace) -> None:
    """Train with the preset tiny-toxicity, which ends with tables and examples."""
    output_dir = arguments.output_dir or free_directory("runs/demo")
    note("Unlearning toxicity on the built-in 1M-parameter model: explore, quantize, learn. Then a comparison.")
    measured = ["--held_out", "300", "--result_samples", "25"]  # As docs/results-builtin.md says.
    train.run(train.parse(["--config", "tiny-toxicity", "--output_dir", output_dir, *measured]))


def free_directory(name: str) -> str:
    """Return `name`, or the first of `name-2`, `name-3`, … that holds no run."""
    from quarkrl.runs.records import holds_run

    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in names if not holds_run(Path(candidate)))
