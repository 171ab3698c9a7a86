"""Progress bars on the console. This module imports no torch, so a command can show them at once."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


def new_bars(console: Console, enabled: bool = True) -> Bars:
    """Return progress bars with elapsed time, remaining time and the text in a task's field `figures`.

    They disappear at the end, and are disabled where the console is not a terminal.
    """
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    # In a file, a bar that disappears leaves empty lines.
    return Bars(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal))
