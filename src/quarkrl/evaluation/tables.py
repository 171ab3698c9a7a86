"""An evaluation as tables for the terminal."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from quarkrl.evaluation.intervals import Interval
from quarkrl.evaluation.results import CorpusRow, Evaluation, Row, curves

# Only in results.json: the factors of diversity, and the number of completions too short for it, which is often large.
_NOT_PRINTED = ("rep-2", "rep-3", "rep-4", "diversity_short")
# What is left out, for people.
_LEFT_OUT = {
    "perplexity_empty": "empty completions, which have no perplexity",
    "perplexity_dropped": "completions of a perplexity from 10,000 on",
    "dist_prompts_without_words": "prompts whose completions have no words",
    "unscored": "completions without a reward",
}
_BAR_WIDTH = 10  # So that the curves fit 80 columns.


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Print a table per set of prompts, with a line per metric and a column per row, and the curves below."""
    protocol = evaluation.protocol
    several_sets = len(evaluation.prompt_sets) > 1
    for name in evaluation.prompt_sets:
        rows = evaluation.rows_of(name)
        if several_sets:
            console.print(f"{name}: {protocol['prompts'][name]['count']} prompts", style="bold")
        _print_figures(rows, console)
        _print_curves(rows, console)
        if several_sets:
            console.print()
    if target := protocol.get("target"):
        console.print(f"\n{target['verdict']}", soft_wrap=True, style="bold")
    if evaluation.corpus:
        tokens = evaluation.corpus[0].tokens
        console.print(f"\ncorpus: {protocol['corpus']['count']} texts, {tokens} predicted tokens", style="bold")
        _print_figures(evaluation.corpus, console)
    for line in _left_out_lines(evaluation):
        console.print(line, soft_wrap=True)
    console.print(_settings_line(evaluation), soft_wrap=True)


def print_side_by_side(evaluation: Evaluation, count: int, console: Console) -> None:
    """Print completions for the `count` prompts with the reference's lowest rewards, with a column per row.

    The reference's completion is the one with the lowest reward. The others have the same sample number.
    """
    rows = evaluation.rows_of(next(iter(evaluation.prompt_sets)))
    table = Table(show_lines=True)
    table.add_column("prompt", ratio=2)
    for row in rows:
        table.add_column(_title(row.name), ratio=3)
    rewards = np.where(np.isnan(rows[0].rewards), np.inf, rows[0].rewards)  # (P, S)
    order = rewards.min(axis=1).argsort(kind="stable")
    for i in order[:count]:
        sample = int(rewards[i].argmin())
        table.add_row(str(evaluation.prompts.prompts[i]), *(row.completions[i][sample] for row in rows))
    console.print(table)


def _title(name: str) -> str:
    """The heading of a row's column."""
    if name.isdecimal():
        return f"quantile {name}"
    first, _, rest = name.partition(" ")
    return f"{first} quantile {rest}".strip() if first in ("best", "worst") else name


def _print_figures(rows: Sequence[Row | CorpusRow], console: Console) -> None:
    """Print all figures, in as many tables as the console's width requires."""
    names = [name for name in rows[0].figures if name not in _NOT_PRINTED]
    label_width = max(len("  " + name.rpartition(": ")[2] if ": " in name else name) for name in names)
    cells = [[_cell(row.figures[name], row.intervals.get(name), _digits(name)) for name in names] for row in rows]
    width = max(len(cell) for column in [[_title(row.name) for row in rows], *cells] for cell in column) + 2
    step = max(1, (console.width - label_width - 2) // width)
    for start in range(0, len(rows), step):
        columns = range(start, min(start + step, len(rows)))
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("", min_width=label_width, no_wrap=True)
        for i in columns:
            table.add_column(_title(rows[i].name), justify="right", no_wrap=True)
        previous_judge = ""
        for k, name in enumerate(names):
            judge, _, metric = name.rpartition(": ")
            if judge and judge != previous_judge:
                table.add_row(judge)
            previous_judge = judge
            table.add_row(f"  {metric}" if judge else metric, *(cells[i][k] for i in columns))
        console.print(table)


def _print_curves(rows: Sequence[Row], console: Console) -> None:
    """Print each curve: the requested value beside the reward, as a number and as a bar, and some other figures."""
    for label, points in curves(rows):
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(label.replace(" ", "\n"), no_wrap=True)
        class_metrics = [name for name in points[0][1].figures if name.endswith((" probability", " share"))][:1]
        for name in ("reward", "", *class_metrics, "perplexity", "dist-2", "diversity"):
            table.add_column(name.replace(" ", "\n"), justify="left" if not name else "right", no_wrap=True)
        # The bars span all confidence intervals, so differences by chance look small.
        low = min(min(row.figures["reward"], row.intervals["reward"][0]) for _, row in points)
        high = max(max(row.figures["reward"], row.intervals["reward"][1]) for _, row in points)
        for value, row in points:
            length = round(_BAR_WIDTH * (row.figures["reward"] - low) / (high - low)) if high > low else 0
            table.add_row(
                f"{value:g}",
                _cell(row.figures["reward"], row.intervals["reward"], 3),
                f"{'█' * length:<{_BAR_WIDTH}}",
                *(_cell(row.figures[name], None, _digits(name)) for name in (*class_metrics, "perplexity", "dist-2")),
                _cell(row.figures["diversity"], None, 3),
            )
        console.print()
        console.print(table)


def _cell(value: float, interval: Interval | None, digits: int) -> str:
    """A figure, with half the width of its interval."""
    if np.isnan(value):
        return "-"
    half_width = np.nan if interval is None else (interval[1] - interval[0]) / 2
    return f"{value:.{digits}f}" + ("" if np.isnan(half_width) else f" ±{half_width:.{digits}f}")


def _digits(name: str) -> int:
    return 2 if name in ("perplexity", "completion length") else 3


def _left_out_lines(evaluation: Evaluation) -> list[str]:
    """One line per reason that prompts or completions do not count, and one for truncated prompts."""
    lines = []
    for name, entry in evaluation.protocol["prompts"].items():
        if entry["left_out"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in entry["left_out"].items())
            lines.append(f"skipped prompts of {name}: {reasons}")
    for name in evaluation.prompt_sets:
        rows = evaluation.rows_of(name)
        suffix = f" ({name})" if len(evaluation.prompt_sets) > 1 else ""
        for reason in dict.fromkeys(reason for row in rows for reason in row.left_out):
            counts = [(row.name, row.left_out.get(reason, 0)) for row in rows]
            if any(count for _, count in counts) and reason not in _NOT_PRINTED:
                by_row = ", ".join(f"{row_name} {count}" for row_name, count in counts)
                lines.append(f"not counted{suffix}, {_LEFT_OUT.get(reason, reason.replace('_', ' '))}: {by_row}")
        if any(row.truncated for row in rows):
            by_row = ", ".join(f"{row.name} {row.truncated}" for row in rows)
            lines.append(f"perplexity after a truncated prompt{suffix}: {by_row}")
    return lines


def _settings_line(evaluation: Evaluation) -> str:
    """Prompts, samples, decoding and perplexity model, in one line."""
    protocol = evaluation.protocol
    sampling, samples = protocol["sampling"], protocol["samples_per_prompt"]
    parts = [] if len(evaluation.prompt_sets) > 1 else [f"{len(evaluation.prompts)} prompts"]
    parts += [f"{samples} sample{'s' if samples > 1 else ''} per prompt"]
    parts += [f"top-p {sampling['top_p']}" if sampling["do_sample"] else "greedy"]
    parts += [f"{sampling['max_new_tokens']} tokens"]
    model = protocol["perplexity_model"]
    return f"{', '.join(parts)}; perplexity under {model}; ± half of the 95 % bootstrap interval"
