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
    """Print each preset with the first sentence of its file."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in preset_names():
        table.add_row(name, _first_sentence((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")))
    console(stderr=False).print(table)
    note("start one: quarkrl train --config NAME   read one: its file in " + str(PRESETS))


def _first_sentence(text: str) -> str:
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return re.split(r"(?<=\.)\s", comment)[0]
