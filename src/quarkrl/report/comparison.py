"""What the comparison of several runs says: their figures, their curves, and the options that differ."""

import math
from collections.abc import Sequence
from typing import Any

from quarkrl.names import unique_names
from quarkrl.report import charts
from quarkrl.report.charts import Axes, Chart, Point
from quarkrl.report.facts import in_words, model_name
from quarkrl.report.run_files import RunFiles
from quarkrl.report.saved_results import SavedRow
from quarkrl.report.sections import Headline, frontier, headlines


def sections(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return the values of the template `comparison.html.jinja`."""
    by_name = dict(zip(unique_names(run.name for run in runs), runs, strict=True))
    return {
        "title": f"{len(runs)} runs",
        "names": list(by_name),
        "models": [model_name(run) for run in runs],
        "colors": {name: f"var(--s-{i % 6})" for i, name in enumerate(by_name)},
        "figures": _figures(by_name),
        "extents": [run.results.extent if run.results else "–" for run in runs],
        "has_one_reward": len({tuple(run.rewards) for run in runs}) == 1,
        "charts": _charts(by_name),
        "options": _differences(by_name),
    }


def _figures(runs: dict[str, RunFiles]) -> list[tuple[str, list[Any]]]:
    """Lines of metric and, for each run, its headline of that metric or None."""
    of_run = {name: {h.label: h for h in headlines(run.results)} if run.results else {} for name, run in runs.items()}
    labels = dict.fromkeys(label for figures in of_run.values() for label in figures)
    lines: list[tuple[str, list[Any]]] = [
        (label, [figures.get(label) for figures in of_run.values()]) for label in labels
    ]
    worst = [run.results and run.results.worst and _worst_reward(run.results.worst) for run in runs.values()]
    return [*lines, ("reward, worst quantile", worst)] if any(worst) else lines


def _worst_reward(row: SavedRow) -> Headline:
    return Headline("reward", None, row.figures["reward"], (math.nan, row.half_width("reward")))


def _charts(runs: dict[str, RunFiles]) -> list[Chart]:
    rewards = {name: run.logged_by_iteration("reward") for name, run in runs.items()}
    lengths = {name: run.logged_by_iteration("completion_length") for name, run in runs.items()}
    kl: dict[str, list[Point]] = {name: [(float(x), y) for x, y in run.logged("kl")] for name, run in runs.items()}
    held_out: dict[str, list[Point]] = {
        name: [(float(x), y) for x, y in run.logged("eval_reward")] for name, run in runs.items()
    }
    distinct = {
        name: list(zip(map(float, run.history.numbers), run.history.distinct[2].tolist(), strict=True))
        for name, run in runs.items()
        if run.history
    }
    shares = Axes("iteration", "share", iterations=True, percent=True)
    drawn = [
        ("Reward by iteration", "Means while exploring.", rewards, Axes("iteration", "mean reward", iterations=True)),
        ("Held-out reward", "Means on held-out prompts.", held_out, Axes("step", "mean reward")),
        (
            "Reward against KL",
            "A point per iteration: higher reward at lower KL is better.",
            {name: frontier(run) for name, run in runs.items()},
            Axes("KL to the reference, nats per token", "mean reward"),
        ),
        ("KL to the reference", "", kl, Axes("step", "nats per token")),
        ("Completion length", "", lengths, Axes("iteration", "mean tokens", iterations=True)),
        ("Diversity", "Distinct token 2-grams.", distinct, shares),
    ]
    colors = {name: f"var(--s-{i % 6})" for i, name in enumerate(runs)}
    return [
        charts.lines(title, caption, series, axes, colors)
        for title, caption, series, axes in drawn
        if any(series.values())
    ]


def _differences(runs: dict[str, RunFiles]) -> list[tuple[str, list[str]]]:
    """The options that differ, with the value of each run."""
    all_options = [{**run.recorded_options, **run.options} for run in runs.values()]
    names = sorted(set().union(*all_options) - {"output_dir"})
    lines = [(name, [in_words(options.get(name)) for options in all_options]) for name in names]
    return [line for line in lines if len(set(line[1])) > 1]
