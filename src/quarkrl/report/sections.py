"""What the report of a run says: figures, charts and tables, in the order of the page."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from quarkrl.errors import UserError
from quarkrl.evaluation.results import curves
from quarkrl.report import charts
from quarkrl.report.charts import Axes, Chart, Point
from quarkrl.report.facts import facts_of_run, model_name
from quarkrl.report.pool_history import PoolHistory
from quarkrl.report.run_files import RunFiles
from quarkrl.report.samples import choose_rows, choose_side_by_side
from quarkrl.report.saved_results import SavedResults, SavedRow

# In the table of figures, but not among the large ones; the factors of diversity are left out, as in the terminal.
_LEFT_OUT = ("rep-2", "rep-3", "rep-4")
_LOSS_PARTS = {"nll": "Negative log-likelihood", "kl": "KL to the reference", "entropy": "Entropy"}


@dataclass(frozen=True)
class Headline:
    """One large figure: before and after, each with half of its confidence interval.

    Attributes:
        label: the metric.
        before, after: values; None if there is only one.
        margins: half of the interval of each; NaN without one.
        good: whether the change is clearly wanted (True), clearly not (False), or neither (None).
    """

    label: str
    before: float | None
    after: float | None
    margins: tuple[float, float]
    good: bool | None = None
    digits: int = 3


def run_sections(run: RunFiles) -> dict[str, Any]:
    """Return the values of the template `run.html.jinja`."""
    history, results = run.history, run.results
    row_names, prompts = choose_side_by_side(results) if results else ([], [])
    large = headlines(results) if results else _explored_headlines(history)
    return {
        "title": f"{', '.join(run.rewards) or 'Quark'} – {run.name}",
        "run": run,
        "model": model_name(run),
        "status": _status(run),
        "verdict": _verdict(results),
        "headlines": large,
        "extent": results.extent if results else None,
        "has_probability": any(headline.label.endswith(" probability") for headline in large),
        "figures": _figures(results) if results else ([], []),
        "side_by_side": {"names": row_names, "prompts": prompts},
        "reward_charts": _reward_charts(run, history) if history else [],
        "quantile_charts": _quantile_charts(history) if history else [],
        "quantiles": _quantile_rows(history) if history else [],
        "trade_off_charts": _trade_off_charts(run),
        "loss_charts": _loss_charts(run),
        "text_charts": _text_charts(run, history) if history else [],
        "rows": choose_rows(history, partial(_tokenizer, run)) if history else [],
        "history": history,
        "reward_ceiling": run.recorded_options.get("reward_ceiling"),
        "facts": facts_of_run(run),
    }


def _status(run: RunFiles) -> str:
    count, total = len(run.history.numbers) if run.history else 0, run.num_iterations
    if run.is_finished:
        return f"finished, {count} iterations"
    return f"not finished, iteration {count} of {total}" if total else f"not finished, {count} iterations"


# Before and after


def _verdict(results: SavedResults | None) -> str | None:
    """One sentence: that of the run, or else whether the intervals of the rewards overlap."""
    if results is None:
        return None
    if isinstance(sentence := results.protocol.get("verdict"), str):
        return sentence[:1].upper() + sentence[1:]
    if not (results.before and results.after):
        return None
    before, after = results.before, results.after
    move = f"the reward went from {before.figures['reward']:.3f} to {after.figures['reward']:.3f}"
    change = _change(before, after, "reward")
    return f"{ {True: 'Better', False: 'Worse', None: 'No clear change'}[change] }: {move} on held-out prompts."


def headlines(results: SavedResults) -> list[Headline]:
    """Return the large figures of an evaluation: the reward, what is unwanted, perplexity, and diversity."""
    before, after = results.before, results.after or results.before
    if after is None:
        return []
    unwanted = [name for name in after.figures if name.endswith(" probability") and ":" not in name][:1]
    names = [name for name in ("reward", *unwanted, "perplexity", "dist-2") if name in after.figures]
    return [
        Headline(
            label=name,
            before=before.figures.get(name) if before else None,
            after=after.figures[name] if after is not before else None,
            margins=(before.half_width(name) if before else math.nan, after.half_width(name)),
            good=_change(before, after, name) if before and after is not before else None,
            digits=2 if name == "perplexity" else 3,
        )
        for name in names
    ]


def _change(before: SavedRow, after: SavedRow, metric: str) -> bool | None:
    """Whether a figure is clearly better, clearly worse, or neither: whether its intervals are apart."""
    nan = (math.nan, math.nan)
    (low, high), (new_low, new_high) = before.intervals.get(metric, nan), after.intervals.get(metric, nan)
    if not (new_low > high or new_high < low):
        return None
    rose = new_low > high
    return rose if metric.startswith(("reward", "dist")) else not rose


def _explored_headlines(history: PoolHistory | None) -> list[Headline]:
    """The mean rewards of the first and the last iteration, for a run without an evaluation."""
    if history is None:
        return []
    result = []
    for a, name in enumerate(history.attributes):
        parts = history.by_iteration(history.rewards[:, a])
        first, last = parts[0], parts[-1]
        margins = [1.96 * float(part.std()) / math.sqrt(len(part)) for part in (first, last)]
        after = float(last.mean()) if len(parts) > 1 else None
        result.append(Headline(name, float(first.mean()), after, (margins[0], margins[1])))
    return result


def _figures(results: SavedResults) -> tuple[list[str], list[tuple[str, list[tuple[float, float, int]]]]]:
    """The columns and lines of the table of figures: value, half of the interval, decimals."""
    rows = results.first_rows
    names = [name for name in rows[0].figures if name not in _LEFT_OUT]
    lines = []
    for name in names:
        digits = 2 if name in ("perplexity", "completion length") else 3
        lines.append((name, [(row.figures.get(name, math.nan), row.half_width(name), digits) for row in rows]))
    return [_title(row.name) for row in rows], lines


def _title(name: str) -> str:
    if name.isdecimal():
        return f"quantile {name}"
    return {"reference": "before", "best": "best quantile", "worst": "worst quantile"}.get(name, name)


# Charts


def _reward_charts(run: RunFiles, history: PoolHistory) -> list[Chart]:
    steps = run.recorded_options.get("steps_per_iteration")
    held_out = [(step / steps + 1, value) for step, value in run.logged("eval_reward")] if steps else []
    result = []
    for a, name in enumerate(history.attributes):
        parts = history.by_iteration(history.rewards[:, a])
        unit = "reward" if len(history.attributes) == 1 else name
        by_number = dict(zip(history.numbers, parts, strict=True))
        # Held-out prompts are evaluated after an iteration, so with the policy that explores the next one.
        result.append(charts.distribution(f"{unit.capitalize()} by iteration", by_number, unit, held_out))
        if len(parts) > 1:
            names = (f"iteration {history.numbers[0]}", f"iteration {history.numbers[-1]}")
            result.append(charts.shift(f"{unit.capitalize()}, first and last", parts[0], parts[-1], unit, names))
    return result


def _quantile_charts(history: PoolHistory) -> list[Chart]:
    result = []
    for a in range(len(history.attributes)):
        result.append(charts.quantile_shares(history.numbers, history.sizes(a)))
        if len(history.numbers) > 1:
            result.append(charts.quantile_edges(history.numbers, history.edges[:, a]))
    return result


@dataclass(frozen=True)
class QuantileRow:
    """A line of the table of quantiles: its number, its range of rewards, and its samples."""

    attribute: str
    number: int
    low: float
    high: float
    size: int
    share: float


def _quantile_rows(history: PoolHistory) -> list[QuantileRow]:
    """The quantiles of the whole pool, the best first."""
    rows = []
    for a, name in enumerate(history.attributes):
        for k in reversed(range(history.num_quantiles)):
            rewards = history.rewards[history.quantiles[:, a] == k, a]
            low, high = (float(rewards.min()), float(rewards.max())) if len(rewards) else (math.nan, math.nan)
            rows.append(QuantileRow(name, k, low, high, len(rewards), len(rewards) / len(history)))
    return rows


def frontier(run: RunFiles) -> list[Point]:
    """Return KL and mean reward of the policy that explored each iteration; KL as of the last log entry before it."""
    points, kl = [], 0.0
    for row in run.logs:
        if isinstance(value := row.get("kl"), int | float):
            kl = float(value)
        if "iteration" in row and isinstance(reward := row.get("reward"), int | float):
            points.append((kl, float(reward)))
    return points


def _trade_off_charts(run: RunFiles) -> list[Chart]:
    result = []
    if len(points := frontier(run)) > 1:
        caption = "A point per iteration, with its number: higher reward at lower KL is better."
        axes = Axes("KL to the reference, nats per token", "mean reward while exploring")
        colors = {"reward": "var(--after)"}
        series = {"reward": points}
        result.append(charts.lines("Reward against KL", caption, series, axes, colors, numbered=len(points) <= 40))
    if run.results:
        before = run.results.before
        for label, line in curves(run.results.first_rows):
            points4 = [(x, row.figures["reward"], *row.intervals["reward"]) for x, row in line]
            result.append(charts.control_curve(label, points4, before.figures["reward"] if before else None))
    return result


def _loss_charts(run: RunFiles) -> list[Chart]:
    result = []
    for name, title in _LOSS_PARTS.items():
        points: list[Point] = [(float(step), value) for step, value in run.logged(name)]
        if len(points) > 1:
            axes, colors = Axes("step", "nats per token"), {title: "var(--after)"}
            result.append(charts.lines(title, "", {title: points}, axes, colors, size=(250, 150)))
    return result


def _text_charts(run: RunFiles, history: PoolHistory) -> list[Chart]:
    lengths = dict(zip(history.numbers, history.by_iteration(history.lengths.astype(float)), strict=True))
    result = [charts.distribution("Completion length by iteration", lengths, "tokens")]
    if len(history.numbers) > 1:
        series = {
            f"{n}-grams" if n > 1 else "tokens": list(zip(map(float, history.numbers), shares.tolist(), strict=True))
            for n, shares in history.distinct.items()
        }
        caption = (
            f"Distinct token n-grams as a share of all, in {history.diversity_samples} completions of each iteration."
        )
        axes = Axes("iteration", "distinct share", iterations=True, percent=True)
        result.append(charts.lines("Diversity by iteration", caption, series, axes))
    ends: list[Point] = run.logged_by_iteration("eos_share")
    if len(ends) > 1:
        caption = "Completions that end by themselves, below the length limit."
        axes, colors = Axes("iteration", "share", iterations=True, percent=True), {"ended": "var(--after)"}
        result.append(charts.lines("Completions that end", caption, {"ended": ends}, axes, colors))
    return result


def _tokenizer(run: RunFiles) -> Any | None:
    """The tokenizer of the run; None if it cannot be loaded, and the table shows token ids."""
    from quarkrl.builtin import model_path
    from quarkrl.models.loading import load_tokenizer

    if (source := run.tokenizer_source) is None:
        return None
    try:
        trusted = bool(run.options.get("trust_remote_code"))
        return load_tokenizer(str(model_path()) if source == "builtin" else source, trusted)
    except UserError:
        return None
