"""`quarkrl export`: a trained model with its adapter merged into the weights, as an adapter, or as a GGUF file."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from quarkrl.cli.common import busy, note, quiet_libraries
from quarkrl.cli.inputs import check_model
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.errors import UserError
from quarkrl.options import check_options, option

NAME = "export"
HELP = "write a trained model with its adapter merged, as an adapter, or as a GGUF file"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What is written, and where to."""

    output: str | None = option(None, "Directory to write; it must be new or empty.", metavar="DIR")
    merge: bool = option(False, "Write whole weights, as in final/.")
    adapter: bool = option(False, "Write the adapter alone, for peft; it holds the reward tokens' rows.")
    gguf: str | None = option(None, "Write a GGUF file for llama.cpp and Ollama; it must be new.", metavar="FILE")
    gguf_type: Literal["f32", "f16", "q8_0"] = option("f16", "Type of the GGUF file's matrices.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Data type of the weights: float32, bfloat16, float16, or auto.", metavar="DTYPE"
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")

    def __post_init__(self) -> None:
        check_options(self)
        forms = [self.merge, self.adapter, self.gguf is not None]
        if forms.count(True) != 1:
            raise UserError(
                "merge, adapter, gguf: exactly one must be set. Set --merge for whole weights, --adapter for the "
                "adapter, or --gguf FILE for llama.cpp."
            )
        if (self.output is None) == (self.gguf is None):
            raise UserError("output: must be set with --merge and --adapter, and not with --gguf. Correct --output.")
        if self.gguf is not None and os.path.exists(self.gguf):
            raise UserError(f"gguf {self.gguf!r}: must be a new file. Set another --gguf.")
        output = Path(self.output or "")
        if self.output and output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"output {self.output!r}: must be a new or an empty directory. Set another --output.")


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl export`."""
    parser.add_argument("model", help="directory of a run, final/ of a run, a checkpoint, or a hub name")
    add_flags(parser, ExportOptions)


def run(arguments: argparse.Namespace) -> None:
    """Load the model and write it."""
    options = options_from(arguments, ExportOptions)
    check_model(arguments.model)
    with busy(f"exporting {arguments.model}"):
        lines = _export(arguments.model, options)
    for line in lines:
        note(line)


def _export(model: str, options: ExportOptions) -> list[str]:
    """Load the model and write it; return lines for the user."""
    from quarkrl.models.export import export_adapter, export_gguf, export_merged
    from quarkrl.runs.directory import model_of_run

    quiet_libraries()
    source = model_of_run(model, "checkpoint" if options.adapter else "final")
    loading: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, "dtype": options.dtype}
    if options.gguf is not None:
        text_prefix = export_gguf(source, Path(options.gguf), options.gguf_type, **loading)
        hint = f"llama.cpp asks for the best quantile{_exception(text_prefix)}"
        return [f"model: {options.gguf}   from: {source}", hint]
    write = export_merged if options.merge else export_adapter
    write(source, Path(options.output or ""), **loading)
    return [f"{'model' if options.merge else 'adapter'}: {options.output}   from: {source}"]


def _exception(text_prefix: str) -> str:
    shown = text_prefix if text_prefix.isprintable() else repr(text_prefix)
    return f" in chats; start each text with {shown}" if text_prefix else ""
