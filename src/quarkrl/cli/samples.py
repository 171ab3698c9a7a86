"""`quarkrl samples`: read what a run has sampled, with rewards and quantiles."""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quarkrl.cli.common import console, note
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.cli.streams import print_json
from quarkrl.errors import UserError
from quarkrl.options import check_options, option
from quarkrl.runs.records import OPTIONS_FILE, continues_prompts, near_run, recorded_fact

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NAME = "samples"
HELP = "read what a run has sampled, with rewards and quantiles"

_TEXT_TITLE = "prompt and completion"


@dataclasses.dataclass(frozen=True)
class SamplesOptions:
    """Which samples are printed, in which order."""

    iteration: int | None = option(None, "Samples of one iteration, from 1; -1 is the last.")
    quantile: str | None = option(None, "Samples of one quantile: best, worst, or 0 (worst) to K-1.", metavar="Q")
    grep: str | None = option(None, "Samples whose text matches a regular expression, in any case.", metavar="TEXT")
    sort: Literal["spread", "reward", "length", "iteration"] = option(
        "spread",
        "Order: reward (best first), length, iteration, or spread: from worst to best, evenly spaced.",
        metavar="ORDER",
    )
    reverse: bool = option(False, "Reverse the order: worst, shortest or oldest first.")
    limit: int = option(10, "Samples to print; 0 is all.", at_least=0)
    json: bool = option(False, "Print one JSON object per line, with every column.")

    def __post_init__(self) -> None:
        check_options(self)
        try:
            re.compile(self.grep or "")
        except re.error as error:
            raise UserError(f"grep {self.grep!r}: must be a regular expression ({error}). Correct it.") from error


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl samples`."""
    parser.add_argument("run", help="directory of a run, which may still be going on")
    add_flags(parser, SamplesOptions)


def run(arguments: argparse.Namespace) -> None:
    """Print samples of a run, one per row."""
    options, directory = options_from(arguments, SamplesOptions), Path(arguments.run)
    table = read_samples(directory)
    total = len(table)
    table = table.filter(_matches(table, options))
    rows = _order(table, options)
    matching = len(table)
    table = table.take(rows[: options.limit] if options.limit and options.sort != "spread" else rows)
    if options.json:
        for row in table.to_pylist():
            print_json(row)
    else:
        print_samples(table, continues_prompts(directory))
    more = ". --limit 0 prints all" if len(table) < matching else ""
    note(f"{len(table):,} of {matching:,} matching samples; the pool has {total:,}{more}")


def read_samples(run: Path) -> "pa.Table":
    """Read the samples of a run as a table (`algorithm.pool_table`).

    Raises:
        UserError: the directory is no run, or has no samples yet.
    """
    from quarkrl.algorithm.pool_table import read_pool_table

    facts = recorded_fact(run, "options")
    if not isinstance(facts, dict) or "num_quantiles" not in facts:
        hint = near_run(run) or " Name its output_dir."
        raise UserError(f"run {str(run)!r}: must be the directory of a run, with run.json.{hint}")

    def decode(prompts: list[list[int]], completions: list[list[int]]) -> tuple[list[str], list[str]]:
        from quarkrl.data.encoding import decode_completions

        tokenizer = _tokenizer_of(run)
        texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        return texts, decode_completions(tokenizer, prompts, completions)

    return read_pool_table(run / "pool", facts["num_quantiles"], facts.get("reward_ceiling"), decode)


def print_samples(table: "pa.Table", is_continued: bool) -> None:
    """Print samples: rewards, quantile, iteration and text; in columns on a terminal, else separated by tabs.

    Args:
        table: the samples.
        is_continued: whether completions continue prompts that are texts.
    """
    from rich.table import Table
    from rich.text import Text

    from quarkrl.algorithm.pool_table import attributes_of
    from quarkrl.data.chats import displayed

    names = attributes_of(table)
    quantiles = ["quantile"] if len(names) == 1 else [f"quantile.{name}" for name in names]
    out = console(stderr=False)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    titles = (*names, "Q", "iteration")
    for name in titles:
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column(_TEXT_TITLE, overflow="fold")
    if not out.is_terminal:
        print("\t".join([*titles, _TEXT_TITLE]))
    for row in table.to_pylist():
        figures = [f"{row[name]:.3f}" for name in names]
        figures += ["/".join(str(row[name]) for name in quantiles), str(row["iteration"] + 1)]
        prompt, completion = map(_on_one_line, displayed(row["prompt"], row["completion"], is_continued))
        if out.is_terminal:
            shown.add_row(*figures, Text.assemble((prompt, "dim"), completion))
        else:
            print("\t".join([*figures, prompt + completion]))
    if out.is_terminal:
        out.print(shown)


def _matches(table: "pa.Table", options: SamplesOptions) -> Any:
    """A mask of the samples that the options name."""
    import numpy as np
    import pyarrow.compute as pc

    mask = np.ones(len(table), dtype=bool)
    if options.iteration is not None:
        iterations = table["iteration"].to_numpy()
        count = int(iterations.max()) + 1
        number = count + options.iteration if options.iteration < 0 else options.iteration - 1  # Files count from 0.
        if not (iterations == number).any():
            raise UserError(f"iteration {options.iteration}: must be from 1 to {count}, or -1 for the last.")
        mask &= iterations == number
    if options.quantile is not None:
        for name in (name for name in table.column_names if name.partition(".")[0] == "quantile"):
            mask &= _in_quantile(table[name].to_numpy(), options.quantile)
    if options.grep is not None:
        texts = pc.binary_join_element_wise(table["prompt"], table["completion"], "")
        try:
            mask &= pc.match_substring_regex(texts, options.grep, ignore_case=True).to_numpy(zero_copy_only=False)
        except ValueError:  # Python's expressions can do more than those of RE2, which is faster.
            pattern = re.compile(options.grep, re.IGNORECASE)
            mask &= np.array([pattern.search(text) is not None for text in texts.to_pylist()], dtype=bool)
    return mask


def _in_quantile(values: "np.ndarray", quantile: str) -> "np.ndarray":
    """A mask of the samples in a quantile; those with equal rewards share one, so that others may be empty."""
    import numpy as np

    numbers = [str(number) for number in np.unique(values)]
    names = {"worst": numbers[0], "best": numbers[-1]}
    if (number := names.get(quantile, quantile)) not in numbers:
        raise UserError(f"quantile {quantile!r}: must be best, worst, or one with samples: {', '.join(numbers)}.")
    return values == int(number)


def _order(table: "pa.Table", options: SamplesOptions) -> Any:
    """The indices of the samples in the order that the options name."""
    import numpy as np
    import pyarrow.compute as pc

    from quarkrl.algorithm.pool_table import attributes_of

    rewards = np.mean([table[name].to_numpy() for name in attributes_of(table)], axis=0)
    keys = {
        "reward": lambda: -rewards,
        "spread": lambda: rewards,
        "length": lambda: -pc.utf8_length(table["completion"]).to_numpy(),
        "iteration": lambda: -table["iteration"].to_numpy(),
    }
    order = np.argsort(keys[options.sort](), kind="stable")
    if options.reverse:
        order = order[::-1]
    if options.sort == "spread" and options.limit and len(order) > options.limit:
        order = order[np.linspace(0, len(order) - 1, options.limit).round().astype(int)]
    return order


def _on_one_line(text: str) -> str:
    return text.replace("\n", "↵").replace("\r", "").replace("\t", " ")


def _tokenizer_of(run: Path) -> Any:
    """The tokenizer of a run whose pool has no texts."""
    import yaml

    from quarkrl.cli.common import model_path
    from quarkrl.models.loading import load_tokenizer

    if (path := model_path(str(run))) != str(run):
        return load_tokenizer(path)
    try:
        model = yaml.safe_load((run / OPTIONS_FILE).read_text(encoding="utf-8"))["model"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"run {str(run)!r}: must hold final/ or a checkpoint, whose tokenizer decodes.") from error
    return load_tokenizer(model_path(model))
