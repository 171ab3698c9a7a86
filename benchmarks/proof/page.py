"""Make docs/proof.md and its pictures from the files that `run.py` has written.

The table has, for each method, the point with the least of the unwanted within each limit of perplexity. The point is
chosen on the prompts of `select.jsonl`, and its figures are those on `test.jsonl`.
"""

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vl_convert

LIMITS = (0.05, 0.10, 0.25)  # rises of perplexity
NAMES = {
    "quark": "Quark",
    "guided": "Quark, guided",
    "steered": "base, steered by Quark",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "ppo": "PPO",
    "dpo": "DPO",
    "sft": "best-of-8 SFT",
    "rerank": "base, best of n",
    "base": "base, cooler",
}
SHORT = {"learning_rate": "rate", "num_train_epochs": "epochs", "kl_coef": "β", "beta": "β"}  # of TRL's beta, too
COLORS = ["#1f6feb", "#7cb1ff", "#0b7a75", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#6b7280", "#c08552", "#b0b0b0"]
Figures = dict[str, float]


@dataclass(frozen=True)
class Point:
    """A model at a scale of guidance and a temperature, with its figures.

    Attributes:
        method: a key of `NAMES`, or base.
        settings: of the training, and of decoding: γ and T.
        cost: of the training.
        device: where it was trained, cpu or the name of a GPU.
        select: the figures on the prompts by which a setting is chosen.
        test, intervals: the figures on the other prompts, and their intervals.
        other: the figures on prompts of another domain, or none.
    """

    method: str
    settings: dict[str, Any]
    cost: dict[str, float]
    device: str
    select: Figures
    test: Figures
    intervals: dict[str, tuple[float, float]]
    other: Figures


def points(results: Path) -> tuple[Point | None, list[Point]]:
    """Return a task's base, and the points of every method, from its directory of files."""
    found = []
    for file in sorted(results.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        rows = {(row["prompts"], *_decoding(row)): row for row in record["rows"]}
        if len(rows) < len(record["rows"]):
            raise ValueError(f"{file}: two rows have the same prompts and decoding, and one would hide the other")
        for decoding in sorted({key[1:] for key in rows}):
            steers, scale, temperature = decoding
            test = rows[("test", *decoding)]
            select, other = (rows.get((name, *decoding), {}) for name in ("select", "other"))
            both = (select or test)["figures"], test["figures"]
            method = "steered" if steers else record["method"] if scale == 1 else "guided"
            settings = record["settings"] | ({} if scale == 1 else {"γ": scale})
            settings |= {} if temperature == 1 else {"T": temperature}
            trained = record.get("cost", {}), record["device"]
            found.append(Point(method, settings, *trained, *both, test["intervals"], other.get("figures", {})))
    base = next((point for point in found if point.method == "base" and not point.settings), None)
    return base, [point for point in found if point is not base]


def _decoding(row: dict[str, Any]) -> tuple[bool, float, float]:
    return row.get("steers", False), row["guidance_scale"], row["temperature"]


def judge_of(base: Point, figure: str) -> str:
    """Return the name of the same figure by the independent judge, or of the first that it has."""
    judged = [name for name in base.test if ": " in name]
    return next((name for name in judged if name.endswith(": " + figure)), judged[0])


def draw(base: Point, found: list[Point], figure: str, file: Path, names: dict[str, str]) -> None:
    """Draw a figure against perplexity, one colour for each method of `names`, the base as a cross."""
    shown = [name for method, name in names.items() if any(point.method == method for point in found)]
    values = [
        {
            "method": names[point.method],
            "perplexity": 100 * rise(point.test, base.test, "perplexity"),
            "value": point.test[figure],
            "low": point.intervals[figure][0],
            "high": point.intervals[figure][1],
        }
        for point in found
        if rise(point.test, base.test, "perplexity") < 1
    ]
    color = {
        "field": "method",
        "type": "nominal",
        "title": None,
        "scale": {"domain": shown, "range": [COLORS[list(names.values()).index(name)] for name in shown]},
    }
    x = {"field": "perplexity", "type": "quantitative", "title": "rise of perplexity, %"}
    y = {"field": "value", "type": "quantitative", "title": figure, "scale": {"zero": True}}
    bars = {
        "mark": {"type": "rule", "opacity": 0.35},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color},
    }
    dots = {"mark": {"type": "point", "filled": True, "size": 55}, "encoding": {"x": x, "y": y, "color": color}}
    start = {
        "data": {"values": [{"perplexity": 0, "value": base.test[figure]}]},
        "mark": {"type": "point", "shape": "cross", "filled": True, "size": 110, "color": "#222222"},
        "encoding": {"x": x, "y": y},
    }
    spec = {
        "data": {"values": values},
        "width": 560,
        "height": 320,
        "background": "white",
        "layer": [bars, dots, start],
        "config": {
            "font": "sans-serif",
            "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
        },
    }
    file.write_text(vl_convert.vegalite_to_svg(spec, vl_version="5.20") + "\n", encoding="utf-8")


def rise(figures: Figures, base: Figures, name: str) -> float:
    """Return the relative change of a figure from the base."""
    return figures[name] / base[name] - 1


def best_within(base: Point, found: list[Point], method: str, limit: float, figure: str) -> Point | None:
    """Return a method's point with the lowest figure within a rise of perplexity, both on the prompts to choose by."""
    own = [point for point in found if point.method == method]
    allowed = [point for point in own if rise(point.select, base.select, "perplexity") <= limit]
    return min(allowed, key=lambda point: (point.select[figure], point.select["perplexity"]), default=None)


def chosen_points(base: Point, found: list[Point], figure: str) -> Iterator[tuple[str, Point | None]]:
    """Yield, per method, the point with the lowest figure within each limit of perplexity; once, with its first limit.

    A method without a point within the limits has None.
    """
    for method, name in NAMES.items():
        if all(point.method != method for point in found):
            continue
        chosen = [best_within(base, found, method, limit, figure) for limit in LIMITS]
        for number, point in enumerate(chosen):
            if point is not None and point not in chosen[:number]:
                yield f"{name}, within {100 * LIMITS[number]:.0f} %", point
        if chosen[-1] is None:
            yield name, None


def table(base: Point, shown: Iterable[tuple[str, Point | None]], figure: str) -> Iterator[str]:
    """Yield the lines of a table of points with their names, after the base."""
    judge = judge_of(base, figure)
    other = "other domain | " if base.other else ""
    yield f"| method | perplexity | {figure} | by the judge | {other}dist-2 | settings |"
    yield "|---" * (7 if other else 6) + "|"
    figures = [f"{base.test[figure]:.3f}", f"{base.test[judge]:.3f}"]
    figures += [f"{base.other[figure]:.3f}"] if other else []
    yield f"| base | {base.test['perplexity']:.1f} | {' | '.join(figures)} | {base.test['dist-2']:.3f} | |"
    for name, point in shown:
        if point is None:
            yield f"| {name} | above {100 * LIMITS[-1]:+.0f} % | {'| ' if other else ''}| | | |"
        else:
            yield _line(point, base, figure, judge, name)


def _line(point: Point, base: Point, figure: str, judge: str, name: str) -> str:
    low, high = point.intervals[figure]
    settings = ", ".join(f"{SHORT.get(key, key)} {value:g}" for key, value in point.settings.items())
    perplexity, diversity = (
        f"{100 * rise(point.test, base.test, changed):+.1f} %" for changed in ("perplexity", "dist-2")
    )
    other = f"| {point.other[figure]:.3f} " if point.other else ""
    line = (
        f"| {name} | {perplexity} "
        f"| {point.test[figure]:.3f} [{low:.3f}, {high:.3f}] | {point.test[judge]:.3f} {other}"
        f"| {diversity} | {settings} |"
    )
    return line.replace(" -", " −")


def costs(found: list[Point]) -> Iterator[str]:
    """Yield the lines of a table of what a training costs: medians over runs, and the highest peak of memory.

    Time and memory are those of runs on a CPU. On a GPU, runs shared it.
    """
    yield "| method | runs | scored | learned | CPU minutes | peak memory, GB |"
    yield "|---|---|---|---|---|---|"
    for method, name in NAMES.items():
        runs = [p for p in found if p.method == method and p.cost and not p.settings.keys() & {"γ", "T"}]
        if runs:
            on_cpu = [point.cost for point in runs if point.device == "cpu"]
            minutes = f"{statistics.median(cost['cpu_seconds'] / 60 for cost in on_cpu):.1f}" if on_cpu else "–"
            peak = f"{max(cost['peak_gb'] for cost in on_cpu):.2f}" if on_cpu else "–"
            scored, learned = (statistics.median(point.cost[key] for point in runs) for key in ("scored", "learned"))
            yield f"| {name} | {len(runs)} | {scored:,.0f} | {learned:,.0f} | {minutes} | {peak} |"


def section(task: str, facts: dict[str, Any], results: Path, images: Path) -> Iterator[str]:
    """Yield the lines of a task's part of the page, and draw its pictures."""
    base, found = points(results)
    if base is None or not found:
        return
    figure = facts.get("figure", f"{facts['unwanted']} probability")
    yield f"## {task}"
    yield ""
    scored, prompts, samples = f"{facts['scored']:,}", facts["test_limit"], facts["samples"]
    yield f"{scored} scored completions of {facts['length']} tokens. Measured on {prompts} held-out prompts with"
    yield f"{samples} samples each. The reward is `{facts['reward']}`. Brackets are 95 % bootstrap intervals."
    yield f"The judge is {judge_of(base, figure).partition(':')[0]}. Continue with `run.py --only {task}/`."
    yield ""
    for name, shown in {"reward": figure, "judge": judge_of(base, figure)}.items():
        file = images / f"proof-{task}-{name}.svg"
        draw(base, found, shown, file, NAMES)
        yield f"![{shown} against perplexity, by method]({images.name}/{file.name})"
        yield ""
    yield from table(base, chosen_points(base, found, figure), figure)
    yield ""
    yield from costs(found)
    yield ""
    yield "All points, by perplexity:"
    yield ""
    by_perplexity = sorted(found, key=lambda point: point.test["perplexity"])
    yield from table(base, [(NAMES[point.method], point) for point in by_perplexity], figure)
    yield ""


def write(matrix: dict[str, Any], results: Path, docs: Path) -> Path:
    """Write the page and its pictures into `docs`; return its file."""
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = [(Path(__file__).parent / "introduction.md").read_text(encoding="utf-8")]
    for task, facts in matrix["tasks"].items():
        lines += section(task, facts, results / task, images)
    file = docs / "proof.md"
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return file
