"""An evaluation's curves as an image: what was asked for against what came of it."""

import os
from pathlib import Path
from typing import Any

from quarkrl.errors import UserError
from quarkrl.evaluation.evaluate import Evaluation, Row
from quarkrl.evaluation.tables import curves

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | os.PathLike) -> Any:
    """matplotlib, if `path` can be drawn to.

    Raises:
        UserError: matplotlib is not installed, or the suffix is none that it draws here.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise UserError(f"plot {str(path)!r}: want a name that ends in {', '.join(_SUFFIXES)}")
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"--plot needs pip install matplotlib ({error})") from error
    return matplotlib


def plot_curves(evaluation: Evaluation, path: str | os.PathLike) -> None:
    """Draw reward, with its 95 % intervals, over quantiles and guidance scales; with perplexity and dist-2 over these.

    Raises:
        UserError: there is no curve, or it cannot be drawn.
    """
    matplotlib = check_plot(path)
    sets = {name: evaluation.of(name) for name in evaluation.prompt_sets}
    found = {name: dict(curves(rows)) for name, rows in sets.items()}
    panels = [
        (label, metric)
        for label in next(iter(found.values()))
        for metric in (("reward",) if label.startswith("quantile") else ("reward", "perplexity", "dist-2"))
    ]
    if not panels:
        raise UserError("no curve to plot: want --quantiles all, or --guidance_scales 1 2 4")
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "quarkrl"}):  # The same figures give the same file.
        figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
        for axes, (label, metric) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for i, (name, rows) in enumerate(sets.items()):
                _draw(axes, found[name][label], metric, f"C{i}", name if len(sets) > 1 else "policy")
                _draw_reference(axes, rows, metric, f"C{i}", f", {name}" if len(sets) > 1 else "")
            axes.set_xlabel(label)
            axes.set_ylabel(metric)
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(sets), frameon=False)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix.lower() == ".svg" else None)


def _draw(axes: Any, points: list[tuple[float, Row]], metric: str, color: str, label: str) -> None:
    values = [row.figures[metric] for _, row in points]
    ends = [row.intervals[metric] for _, row in points]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    at = [x for x, _ in points]
    axes.errorbar(at, values, yerr=(below, above), color=color, marker="o", capsize=3, label=label)
    axes.set_xticks(at)


def _draw_reference(axes: Any, rows: list[Row], metric: str, color: str, of: str) -> None:
    for row in rows:
        if row.name == "reference":
            axes.axhline(row.figures[metric], color=color, linestyle="--", linewidth=1, label=f"reference{of}")
            axes.axhspan(*row.intervals[metric], color=color, alpha=0.12, linewidth=0)
