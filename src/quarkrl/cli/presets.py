"""`quarkrl presets`: the presets for `quarkrl train --config`, with a line each."""

import argparse
import re

from quarkrl.cli.common import console, note
from quarkrl.cli.config_file import PRESETS, preset_names
from quarkrl.cli.parser import Parser

NAME = "presets"
HELP = "list the presets of quarkrl train"


def add_options(parser: Parser) -> None:
    """Add no arguments."""


def run(arguments: argparse.Namespace) -> None:
    """Print the command of each preset, and the first sentence of its file."""
    from rich.padding import Padding

    out = console(stderr=False)
    for name in preset_names():
        out.print(f"quarkrl train --config {name}", soft_wrap=True)
        sentence = _first_sentence((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
        out.print(Padding(sentence, (0, 0, 0, 4), expand=False), style="dim")
    note(f"A preset is a file: {PRESETS}/NAME.yaml. Any option behind --config takes precedence over it.")


def _first_sentence(text: str) -> str:
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return re.split(r"(?<=\.)\s", comment)[0]
