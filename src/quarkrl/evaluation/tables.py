"""An evaluation as tables to read in a terminal."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from quarkrl.evaluation.corpus import CorpusRow
from quarkrl.evaluation.evaluate import Evaluation, Row
from quarkrl.evaluation.intervals import Interval

# In results.json, not in the terminal: what diversity is the product of, and the many completions too short for it.
_UNPRINTED = ("rep-2", "rep-3", "rep-4", "diversity_short")


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Metrics down, models across, a table for each set of prompts; then the curves, if there are any."""
    protocol = evaluation.protocol
    several = len(evaluation.prompt_sets) > 1
    for name in evaluation.prompt_sets:
        rows = evaluation.of(name)
        if several:
            console.print(f"{name}: {protocol['prompts'][name]['count']} prompts", style="bold")
        _print_figures(rows, console)
        _print_curve(rows, console)
        if several:
            console.print()
    if evaluation.corpus:
        tokens = evaluation.corpus[0].tokens
        console.print(f"\ncorpus: {protocol['corpus']['count']} texts, {tokens} tokens predicted", style="bold")
        _print_figures(evaluation.corpus, console)
    for line in _left_out(evaluation):
        console.print(line, soft_wrap=True)
    sampling = protocol["sampling"]
    decoding = f"top-p {sampling['top_p']}" if sampling["do_sample"] else "greedy"
    samples = protocol["samples_per_prompt"]
    counts = "" if several else f"{protocol['prompts'][next(iter(evaluation.prompt_sets))]['count']} prompts, "
    console.print(
        f"{counts}{samples} sample{'s' if samples > 1 else ''} each, {decoding}, {sampling['max_new_tokens']} tokens; "
        f"perplexity under {protocol['perplexity_model']}; ± half of the 95 % bootstrap interval",
        soft_wrap=True,
    )


def print_side_by_side(evaluation: Evaluation, count: int, console: Console) -> None:
    """Completions of the prompts on which the reference is at its worst, models across."""
    rows = evaluation.of(next(iter(evaluation.prompt_sets)))
    table = Table(show_lines=True)
    table.add_column("prompt", ratio=2)
    for row in rows:
        table.add_column(_title(row.name), ratio=3)
    # Where the reference is at its worst there is most to see; its worst completion stands beside the same draw of
    # the others.
    worst = np.where(np.isnan(rows[0].rewards), np.inf, rows[0].rewards)
    order = worst.min(axis=1).argsort(kind="stable")
    for i in order[:count]:
        sample = int(worst[i].argmin())
        table.add_row(str(evaluation.prompts.prompts[i]), *(row.completions[i][sample] for row in rows))
    console.print(table)


def _title(name: str) -> str:
    if name.isdecimal():
        return f"token {name}"
    first, _, rest = name.partition(" ")
    return f"{first} token {rest}".strip() if first in ("best", "worst") else name


def _print_figures(rows: Sequence[Row | CorpusRow], console: Console) -> None:
    """All figures, in as many tables as the width asks for."""
    names = [name for name in rows[0].figures if name not in _UNPRINTED]
    lead = max(len("  " + name.rpartition(": ")[2] if ": " in name else name) for name in names)
    cells = [[_cell(row.figures[name], row.intervals.get(name), _digits(name)) for name in names] for row in rows]
    width = max(len(cell) for column in [[_title(row.name) for row in rows], *cells] for cell in column) + 2
    step = max(1, (console.width - lead - 2) // width)
    for start in range(0, len(rows), step):
        some = range(start, min(start + step, len(rows)))
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("", min_width=lead, no_wrap=True)
        for i in some:
            table.add_column(_title(rows[i].name), justify="right", no_wrap=True)
        above = ""
        for k, name in enumerate(names):
            judge, _, metric = name.rpartition(": ")
            if judge and judge != above:
                table.add_row(judge)
            above = judge
            table.add_row(f"  {metric}" if judge else metric, *(cells[i][k] for i in some))
        console.print(table)


def _print_curve(rows: Sequence[Row], console: Console) -> None:
    """What was asked for against what came of it: quantiles, where there are three or more, and guidance scales."""
    for label, points in curves(rows):
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(label, no_wrap=True)
        others = [name for name in points[0][1].figures if name.endswith((" probability", " share"))][:1]
        for name in ("reward", "", *others, "perplexity", "dist-2", "diversity"):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        # From the lowest end of an interval to the highest: a bar is not longer than another by chance alone.
        low = min(min(row.figures["reward"], row.intervals["reward"][0]) for _, row in points)
        high = max(max(row.figures["reward"], row.intervals["reward"][1]) for _, row in points)
        for asked, row in points:
            length = round(12 * (row.figures["reward"] - low) / (high - low)) if high > low else 0
            table.add_row(
                f"{asked:g}",
                _cell(row.figures["reward"], row.intervals["reward"], 3),
                f"{'█' * length:<12}",
                *(_cell(row.figures[name], None, _digits(name)) for name in (*others, "perplexity", "dist-2")),
                _cell(row.figures["diversity"], None, 3),
            )
        console.print()
        console.print(table)


def curves(rows: Sequence[Row]) -> list[tuple[str, list[tuple[float, Row]]]]:
    """The curves that rows of one set of prompts make: their names, and points of what was asked for, in order.

    Quantile asked for, where there are three or more, and guidance scale, where there are two or more.
    """
    plain = {row.quantile: row for row in rows if row.quantile is not None and row.guidance_scale == 1}
    guided = [row for row in rows if row.guidance_scale != 1]
    found = []
    if len(plain) > 2:
        found.append(("quantile asked for", [(float(quantile), plain[quantile]) for quantile in sorted(plain)]))
    if guided:
        level = [row for row in plain.values() if row.quantile == guided[0].quantile]
        points = sorted(((row.guidance_scale, row) for row in [*level, *guided]), key=lambda point: point[0])
        found.append(("guidance scale γ", points))
    return found


def _cell(value: float, interval: Interval | None, digits: int) -> str:
    if np.isnan(value):
        return "-"
    half = np.nan if interval is None else (interval[1] - interval[0]) / 2
    return f"{value:.{digits}f}" + ("" if np.isnan(half) else f" ±{half:.{digits}f}")


def _digits(name: str) -> int:
    return 2 if name in ("perplexity", "completion length") else 3


def _left_out(evaluation: Evaluation) -> list[str]:
    """What did not count, a line for each kind of thing."""
    lines = []
    for name, found in evaluation.protocol["prompts"].items():
        if found["left_out"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in found["left_out"].items())
            lines.append(f"prompts left out of {name}: {reasons}")
    for name in evaluation.prompt_sets:
        where = f" ({name})" if len(evaluation.prompt_sets) > 1 else ""
        for reason in dict.fromkeys(reason for row in evaluation.of(name) for reason in row.left_out):
            counts = [(row.name, row.left_out.get(reason, 0)) for row in evaluation.of(name)]
            if any(count for _, count in counts) and reason not in _UNPRINTED:
                shown = ", ".join(f"{row} {count}" for row, count in counts)
                lines.append(f"left out{where}, {reason.replace('_', ' ')}: {shown}")
    return lines
