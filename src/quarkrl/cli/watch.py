"""`quarkrl watch`: a view of a run in the terminal, from the files that the run writes. It starts without torch."""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkrl.cli.common import console
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.errors import UserError, format_seconds, truncate
from quarkrl.options import check_options, option
from quarkrl.runs.records import (
    METRICS_FILE,
    RUN_FILE,
    continues_prompts,
    is_in_use,
    near_run,
    recorded_fact,
    resume_call,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

NAME = "watch"
HELP = "watch a run in the terminal, from its files"

_BLOCKS = "▁▂▃▄▅▆▇█"
_TEXT_WIDTH = 160  # Characters of a sample.


@dataclasses.dataclass(frozen=True)
class WatchOptions:
    """How often the view is updated, and how much it shows."""

    every: float = option(2.0, "Seconds between two readings of the files.", above=0, metavar="SECONDS")
    samples: int = option(2, "Best and worst of the latest samples, so many of each.", at_least=0)
    once: bool = option(False, "Print the view once, as in a pipe.")

    def __post_init__(self) -> None:
        check_options(self)


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl watch`."""
    parser.add_argument("run", help="directory of a run, which may have ended")
    add_flags(parser, WatchOptions)


def run(arguments: argparse.Namespace) -> None:
    """Show the run until it ends; on Ctrl-C, leave the latest view on the terminal."""
    from rich.live import Live

    options, directory = options_from(arguments, WatchOptions), Path(arguments.run)
    state, out = read_state(directory), console(stderr=False)
    if options.once or state.is_over or not out.is_terminal:
        out.print(view(state, options.samples))
        return
    with Live(view(state, options.samples), console=out, auto_refresh=False) as live:
        try:
            while not state.is_over:
                time.sleep(options.every)
                state = read_state(directory)
                live.update(view(state, options.samples), refresh=True)
        except KeyboardInterrupt:
            pass


@dataclasses.dataclass(frozen=True)
class RunState:
    """What the files of a run say.

    Attributes:
        directory: of the run.
        total: iterations, those of distillation included.
        steps_per_iteration: optimizer steps of an iteration.
        samples_per_iteration: completions of an exploration; None if no exploration has ended.
        rows: of `metrics.jsonl`.
        partial: scored completions of the current exploration; None if none is going on.
        explored_at: when each exploration ended, in seconds since the epoch.
        latest_write: when the run last wrote a file.
        in_use: whether a process runs it.
    """

    directory: Path
    total: int
    steps_per_iteration: int
    samples_per_iteration: int | None
    rows: list[dict[str, Any]]
    partial: int | None
    explored_at: list[float]
    latest_write: float
    in_use: bool

    @property
    def has_ended(self) -> bool:
        """Whether training has ended; the final model may still be written."""
        return bool(self.rows) and "train_runtime" in self.rows[-1]

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come: the run has ended, or its process has."""
        return self.has_ended or not self.in_use

    @property
    def step(self) -> int:
        """Optimizer steps so far, as of the latest row."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def iterations(self) -> list[dict[str, Any]]:
        """The figures of each iteration: those of its exploration, and the latest ones of learning and evaluation."""
        merged: list[dict[str, Any]] = []
        for row in self.rows:
            if "iteration" in row:
                merged.append(dict(row))
            elif merged and "train_runtime" not in row:
                merged[-1] |= {name: value for name, value in row.items() if name != "step"}
        return merged

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end if all iterations take as long as those so far; None before two explorations."""
        if self.is_over or len(self.explored_at) < 2:
            return None
        period = (self.explored_at[-1] - self.explored_at[0]) / (len(self.explored_at) - 1)
        return max(0.0, period * (self.total - len(self.explored_at) + 1) - (time.time() - self.explored_at[-1]))


def read_state(directory: Path) -> RunState:
    """Read the files of a run.

    Raises:
        UserError: the directory is no run.
    """
    options, count = recorded_fact(directory, "options"), recorded_fact(directory, "num_iterations")
    if not isinstance(options, dict) or not isinstance(count, int):
        raise UserError(
            f"run {str(directory)!r}: must be the directory of a run, with {RUN_FILE}."
            f"{near_run(directory) or ' Name its output_dir.'}"
        )
    scales = options.get("distill_guidance_scale") or [1]
    stages = len(scales) if set(scales) != {1} else 0
    files = sorted((directory / "pool").glob("iteration-*.parquet"))
    rows = _read_rows(directory / METRICS_FILE)
    explored = [row for row in rows if "pool_size" in row]
    times = [_modified(path) for path in files]
    watched = [directory / METRICS_FILE, directory / RUN_FILE, *(directory / "pool").glob("partial-*/*.parquet")]
    return RunState(
        directory=directory,
        total=count + stages * options.get("distill_iterations", 0),
        steps_per_iteration=options["steps_per_iteration"],
        samples_per_iteration=explored[0]["pool_size"] + explored[0].get("unscored", 0) if explored else None,
        rows=rows,
        partial=_count_partial(directory / "pool"),
        explored_at=times,
        latest_write=max([*times, *map(_modified, watched)]),
        in_use=is_in_use(directory),
    )


def view(state: RunState, samples: int) -> "RenderableType":
    """Return what the terminal shows of a run."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(_headline(state), style="bold"), Text(_activity(state))]
    if iterations := state.iterations:
        rewards = [row["reward"] for row in iterations if isinstance(row.get("reward"), float)]
        if len(rewards) > 1:
            parts.append(Text(f"reward {min(rewards):.3f} {sparkline(rewards)} {max(rewards):.3f}"))
        parts += ["", _figures(iterations)]
    if samples and state.explored_at:
        parts += ["", *_latest_samples(state, samples)]
    return Group(*parts)


def sparkline(values: list[float], width: int = 50) -> str:
    """Return the latest values as blocks, the highest for the largest of them."""
    values = values[-width:]
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def _headline(state: RunState) -> str:
    done = min(math.ceil((state.step + 1) / state.steps_per_iteration), state.total)
    position = f"{state.directory}   iteration {done} of {state.total}"
    if state.has_ended:
        return f"{position}   ended after {format_seconds(state.rows[-1]['train_runtime'])}"
    if state.is_over:
        return f"{position}   stopped"
    left = state.seconds_left
    return position + ("" if left is None else f"   about {format_seconds(left)} left")


def _activity(state: RunState) -> str:
    if state.has_ended:
        return f"its samples: quarkrl samples {state.directory}"
    if state.is_over:
        return f"no process runs it. Resume with: {resume_call(state.directory)}"
    if state.partial is not None:
        total = state.samples_per_iteration
        text = f"exploring: {state.partial:,}" + (f" of {total:,}" if total else "") + " completions scored"
    elif state.rows:
        within = state.step % state.steps_per_iteration
        text = f"learning: step {within} of {state.steps_per_iteration}, as of the latest log line"
    else:
        text = "exploring: no batch is finished yet"
    silence = time.time() - state.latest_write
    return text + (f"; nothing written for {format_seconds(silence)}" if silence > 60 else "")


def _figures(iterations: list[dict[str, Any]]) -> "RenderableType":
    """A table with a line per iteration: the columns for which the run has figures."""
    from rich.table import Table

    columns = {
        "reward": "reward",
        "reward_std": "±",
        "eval_reward": "held out",
        "kl": "KL",
        "nll": "NLL",
        "loss": "loss",
        "completion_length": "tokens",
        "pool_size": "pool",
    }
    shown = [name for name in columns if any(name in row for row in iterations)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("iteration", justify="right")
    for name in shown:
        table.add_column(columns[name], justify="right", no_wrap=True)
    for row in iterations[-10:]:
        table.add_row(str(row["iteration"] + 1), *(_cell(row.get(name)) for name in shown))
    return table


def _latest_samples(state: RunState, count: int) -> list[Any]:
    """The best and the worst samples of the latest exploration, a line each."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from rich.text import Text

    from quarkrl.algorithm.pool_table import attributes_of, choose_extremes
    from quarkrl.data.chats import displayed

    path = max((state.directory / "pool").glob("iteration-*.parquet"))
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError):
        return []  # It is being replaced; the next reading has it.
    if "completion" not in table.column_names:
        return []
    lines = []
    for row in choose_extremes(table, count):
        prompt, completion = displayed(row["prompt"], row["completion"], continues_prompts(state.directory))
        figures = " ".join(f"{row[name]:.3f}" for name in attributes_of(table))
        text = truncate(" ".join(completion.split()), _TEXT_WIDTH)
        gap = " " if prompt[-1:].isspace() or completion[:1].isspace() else ""
        lines.append(Text.assemble(f"{row['rank']:<5} {figures}  ", (" ".join(prompt.split()) + gap, "dim"), text))
    return lines


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file to which a run appends; a last line that is incomplete is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _count_partial(pool: Path) -> int | None:
    """The number of completions in the finished batches of the current exploration."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = None
    for path in pool.glob("partial-*/*.parquet"):
        try:
            count = (count or 0) + pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError):  # The exploration has just ended.
            continue
    return count


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
