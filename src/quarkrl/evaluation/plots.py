"""The curves of an evaluation as an image: figures over the requested quantile and the guidance scale."""

import os
from pathlib import Path
from typing import Any

from quarkrl.errors import UserError
from quarkrl.evaluation.results import Evaluation, Row, curves, no_curve

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | os.PathLike) -> Any:
    """Import matplotlib, after a check that it can draw to `path`.

    Raises:
        UserError: the suffix is not supported, or matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise UserError(f"plot {str(path)!r}: must end in one of {', '.join(_SUFFIXES)}.")
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"plot {str(path)!r} needs matplotlib: pip install matplotlib ({error}).") from error
    return matplotlib


def plot_curves(evaluation: Evaluation, path: str | os.PathLike) -> None:
    """Draw the curves of an evaluation, with 95 % confidence intervals and the reference as a dashed line.

    A panel for the reward over the requested quantile, and three over the guidance scale: reward, perplexity, dist-2.

    Raises:
        UserError: there is no curve, or it cannot be drawn to `path`.
    """
    matplotlib = check_plot(path)
    sets = {name: evaluation.rows_of(name) for name in evaluation.prompt_sets}
    curves_of = {name: dict(curves(rows)) for name, rows in sets.items()}
    panels = [
        (label, metric)
        for label in next(iter(curves_of.values()))
        for metric in (("reward", "perplexity", "dist-2") if label.startswith("guidance") else ("reward",))
    ]
    if not panels:
        raise no_curve()
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "quarkrl"}):  # The same figures give the same file.
        figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
        for axes, (label, metric) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for i, (name, rows) in enumerate(sets.items()):
                _draw(axes, curves_of[name][label], metric, f"C{i}", name if len(sets) > 1 else "policy")
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
    xs = [x for x, _ in points]
    axes.errorbar(xs, values, yerr=(below, above), color=color, marker="o", capsize=3, label=label)
    axes.set_xticks(xs)


def _draw_reference(axes: Any, rows: list[Row], metric: str, color: str, suffix: str) -> None:
    for row in rows:
        if row.name == "reference":
            axes.axhline(row.figures[metric], color=color, linestyle="--", linewidth=1, label=f"reference{suffix}")
            axes.axhspan(*row.intervals[metric], color=color, alpha=0.12, linewidth=0)
