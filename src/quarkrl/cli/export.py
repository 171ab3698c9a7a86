"""`quarkrl export`: a trained model with its adapter merged into the weights, or as an adapter."""

import argparse
import dataclasses
from pathlib import Path
from typing import Literal

from quarkrl.cli.common import note, quiet_libraries
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.errors import UserError
from quarkrl.options import check_options, option

NAME = "export"
HELP = "write a trained model with its adapter merged, or as an adapter"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What is written, and where to."""

    output: str = option(help="Directory to write; it must be new or empty.", metavar="DIR")
    merge: bool = option(False, "Write whole weights, as in final/.")
    adapter: bool = option(False, "Write the adapter alone, for peft; it holds the reward tokens' rows.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Data type of the weights: float32, bfloat16, float16, or auto.", metavar="DTYPE"
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.merge == self.adapter:
            raise UserError(
                "merge, adapter: exactly one must be set. Set --merge for whole weights, or --adapter for the adapter."
            )
        output = Path(self.output)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"output {self.output!r}: must be a new or an empty directory. Set another --output.")


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl export`."""
    parser.add_argument("model", help="directory of a run, final/ of a run, a checkpoint, or a hub name")
    add_flags(parser, ExportOptions)


def run(arguments: argparse.Namespace) -> None:
    """Load the model and write it."""
    from quarkrl.models.export import export_adapter, export_merged
    from quarkrl.runs.directory import model_of_run

    options = options_from(arguments, ExportOptions)
    quiet_libraries()
    source = model_of_run(arguments.model, "final" if options.merge else "checkpoint")
    write = export_merged if options.merge else export_adapter
    write(source, Path(options.output), trust_remote_code=options.trust_remote_code, dtype=options.dtype)
    note(f"{'model' if options.merge else 'adapter'}: {options.output}   from: {source}")
