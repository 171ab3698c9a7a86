"""`quarkrl report`: a run as one HTML file, or several runs compared."""

import argparse
import dataclasses
import os
from pathlib import Path

from quarkrl.cli.common import busy, is_first_process, note
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.errors import describe_exception
from quarkrl.options import option

NAME = "report"
HELP = "write a run, or a comparison of several runs, as one HTML file"

_COMPARISON = "comparison.html"


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Where the report goes."""

    output: str | None = option(
        None, f"HTML file to write (default: report.html in the run; {_COMPARISON} for several runs).", metavar="FILE"
    )


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl report`."""
    parser.add_argument("runs", nargs="+", metavar="run", help="directory of a run; several are compared")
    add_flags(parser, ReportOptions)


def run(arguments: argparse.Namespace) -> None:
    """Write the file, and say where it is."""
    options, runs = options_from(arguments, ReportOptions), arguments.runs
    with busy(f"reading {' '.join(runs)}"):
        from quarkrl.report import write_comparison, write_report

        if len(runs) == 1:
            path = write_report(runs[0], options.output)
        else:
            path = write_comparison(runs, options.output or _COMPARISON)
    note(f"report: {path}")


def try_to_report(run: str | os.PathLike) -> Path | None:
    """Write the report of a run that has ended, in its first process. A failure is a note: the run is not at fault."""
    if not is_first_process():
        return None
    try:
        from quarkrl.report import write_report

        return write_report(run)
    except Exception as error:  # noqa: BLE001 - whatever the reason, the model and the samples are saved
        note(f"no report was written ({describe_exception(error)}). Try again: quarkrl report {os.fspath(run)}")
        return None
