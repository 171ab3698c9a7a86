"""`quarkrl push`: upload a trained model to the Hugging Face hub."""

import argparse
import dataclasses
from pathlib import Path

from quarkrl.cli.common import busy, note
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.errors import UserError
from quarkrl.options import option
from quarkrl.runs.records import holds_run, near_run

NAME = "push"
HELP = "upload a trained model to the Hugging Face hub"


@dataclasses.dataclass(frozen=True)
class PushOptions:
    """How the model is uploaded."""

    private: bool = option(False, "Make a new repository private.")
    revision: str | None = option(None, "Branch to write; it is created if it is missing.", metavar="BRANCH")
    message: str = option("Upload model", "Message of the commit.", metavar="TEXT")


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl push`."""
    parser.add_argument("model", help="directory of a run, final/ of a run, or an exported model")
    parser.add_argument("name", help="repository on the hub: OWNER/NAME, or NAME")
    add_flags(parser, PushOptions)


def run(arguments: argparse.Namespace) -> None:
    """Upload the model, and say where it is."""
    options = options_from(arguments, PushOptions)
    directory = _directory_of(Path(arguments.model))
    with busy(f"uploading {directory}"):
        from quarkrl.models.hub import push_directory

        address = push_directory(directory, arguments.name, options.private or None, options.revision, options.message)
    note(f"hub: {address}   from: {directory}")


def _directory_of(model: Path) -> Path:
    """The directory of a model that any program can load: `final/` of a run, or an exported model."""
    directory = model / "final" if holds_run(model) else model
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        hint = near_run(model) or " Name a run that has ended, or what `quarkrl export` has written."
        raise UserError(f"model {str(model)!r}: must be a run with final/, or the directory of a model.{hint}")
    if (directory / "trainer_state.json").is_file():
        raise UserError(
            f"model {str(model)!r}: must not be a checkpoint, whose tokenizer asks for no quantile. "
            "Export it first: quarkrl export."
        )
    return directory
