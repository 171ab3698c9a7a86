"""Fill the template: one HTML file with charts, texts and tables, which needs nothing else."""

import base64
import hashlib
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from quarkrl import __version__
from quarkrl.errors import UserError
from quarkrl.report import charts, comparison
from quarkrl.report.colors import palette
from quarkrl.report.run_files import RunFiles, read_run
from quarkrl.report.sections import run_sections
from quarkrl.storage.atomic import write_text

FILE_NAME = "report.html"


def write_report(run: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Write the report of a run.

    Args:
        run: the directory of the run.
        output: the HTML file; by default `report.html` in the directory of the run.

    Returns:
        The path of the file.

    Raises:
        UserError: the directory holds no run, a file is damaged, or vl-convert is missing.
    """
    path = _output_path(output or Path(run) / FILE_NAME)
    data = read_run(run)
    charts.check_drawing()
    return _write(path, "run.html.jinja", _num_quantiles([data]), run_sections(data))


def write_comparison(runs: Sequence[str | os.PathLike], output: str | os.PathLike) -> Path:
    """Write a report that compares several runs.

    Args:
        runs: their directories.
        output: the HTML file.

    Returns:
        The path of the file.

    Raises:
        UserError: a directory holds no run, a file is damaged, or vl-convert is missing.
    """
    path = _output_path(output)
    data = [read_run(run) for run in runs]
    charts.check_drawing()
    return _write(path, "comparison.html.jinja", _num_quantiles(data), comparison.sections(data))


def _output_path(path: str | os.PathLike) -> Path:
    """Check where a report is to be written, before it is made."""
    path = Path(path)
    if path.suffix != ".html":
        raise UserError(f"output {str(path)!r}: must end in .html. Append a file name, such as report.html.")
    return path


def _num_quantiles(runs: Sequence[RunFiles]) -> int:
    return max((run.history.num_quantiles for run in runs if run.history), default=2)


def _write(path: Path, template: str, num_quantiles: int, values: dict[str, Any]) -> Path:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("quarkrl.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = format_figure
    script = (files("quarkrl.report") / "templates" / "page.js").read_text(encoding="utf-8")
    # The browser runs this one script and nothing else, and requests nothing, whatever the texts contain.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template(template).render(
        **values,
        style=(files("quarkrl.report") / "templates" / "page.css").read_text(encoding="utf-8"),
        palette=palette(num_quantiles),
        script=script,
        script_digest=digest,
        version=__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def format_figure(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals; a dash if it is missing."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"
