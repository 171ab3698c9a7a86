"""An evaluation as tables to read in a terminal."""

from rich.console import Console
from rich.table import Table

from quarkrl.evaluation import Evaluation


def _title(name: str) -> str:
    return f"token {name}" if name.isdecimal() else f"{name} token" if name in ("best", "worst") else name


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Metrics down, models across."""
    rows = evaluation.rows
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for row in rows:
        table.add_column(_title(row.name), justify="right")
    for metric in rows[0].figures:
        values = [row.figures[metric] for row in rows]
        table.add_row(metric, *(f"{value:.2f}" if metric == "perplexity" else f"{value:.3f}" for value in values))
    console.print(table)
    protocol = evaluation.protocol
    console.print(
        f"{protocol['prompts']['count']} prompts, {protocol['samples_per_prompt']} samples each, "
        f"top-p {protocol['sampling']['top_p']}, {protocol['sampling']['max_new_tokens']} tokens; "
        f"perplexity under {protocol['perplexity_model']}",
        soft_wrap=True,
    )


def print_side_by_side(evaluation: Evaluation, count: int, console: Console) -> None:
    """Completions of the prompts on which the reference is at its worst, models across."""
    table = Table(show_lines=True)
    table.add_column("prompt", ratio=2)
    for row in evaluation.rows:
        table.add_column(_title(row.name), ratio=3)
    # Where the reference is at its worst there is most to see; its worst completion stands beside the same draw of
    # the others.
    worst = evaluation.rows[0].rewards
    order = worst.min(axis=1).argsort(kind="stable")
    for i in order[:count]:
        sample = int(worst[i].argmin())
        table.add_row(str(evaluation.prompts.prompts[i]), *(row.completions[i][sample] for row in evaluation.rows))
    console.print(table)
