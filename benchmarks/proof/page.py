"""Make docs/proof.md and its pictures from the files that `run.py` has written.

The table has, for each method, the point with the least of the unwanted within each limit of perplexity.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vl_convert

LIMITS = (0.05, 0.10, 0.25)  # rises of perplexity
NAMES = {"quark": "Quark", "grpo": "GRPO", "rloo": "RLOO", "ppo": "PPO", "dpo": "DPO", "sft": "best-of-8 SFT"}
COLORS = ["#1f6feb", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#6b7280"]
Row = dict[str, Any]


def points(results: Path) -> tuple[Row, list[Row]]:
    """Return the figures of a task's base, and one row for each point of each method, from its directory of files."""
    base: Row = {}
    rows = []
    for file in sorted(results.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        for row in record["rows"]:
            shown = row["figures"] | {"intervals": row["intervals"], "guidance": row["guidance_scale"]}
            shown |= {name: record.get(name, {}) for name in ("method", "settings", "seed", "cost")}
            if record["method"] == "base":
                base = shown
            else:
                rows.append(shown)
    return base, rows


def judge_of(row: Row, figure: str) -> str:
    """Return the name of the independent judge's figure."""
    return next(name for name in row if name.endswith(": " + figure))


def draw(base: Row, rows: list[Row], figure: str, file: Path) -> None:
    """Draw a figure against perplexity, one colour for each method, the base as a cross."""
    methods = [method for method in NAMES if any(row["method"] == method for row in rows)]
    values = [
        {
            "method": NAMES[row["method"]],
            "perplexity": 100 * (row["perplexity"] / base["perplexity"] - 1),
            "value": row[figure],
            "low": row["intervals"][figure][0],
            "high": row["intervals"][figure][1],
        }
        for row in rows
        if row["perplexity"] < 2 * base["perplexity"]
    ]
    color = {
        "field": "method",
        "type": "nominal",
        "title": None,
        "sort": [NAMES[method] for method in methods],
        "scale": {"domain": [NAMES[method] for method in methods], "range": COLORS[: len(methods)]},
    }
    x = {"field": "perplexity", "type": "quantitative", "title": "rise of perplexity, %"}
    y = {"field": "value", "type": "quantitative", "title": figure, "scale": {"zero": True}}
    bars = {
        "mark": {"type": "rule", "opacity": 0.35},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color},
    }
    dots = {"mark": {"type": "point", "filled": True, "size": 55}, "encoding": {"x": x, "y": y, "color": color}}
    start = {
        "data": {"values": [{"perplexity": 0, "value": base[figure]}]},
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


def best_within(base: Row, rows: list[Row], method: str, limit: float, figure: str) -> Row | None:
    """Return a method's point with the lowest figure, among those within a rise of perplexity."""
    allowed = [r for r in rows if r["method"] == method and r["perplexity"] <= (1 + limit) * base["perplexity"]]
    return min(allowed, key=lambda row: (row[figure], row["perplexity"]), default=None)


def table(base: Row, rows: list[Row], figure: str) -> Iterator[str]:
    """Yield the lines of a table: per method and limit of perplexity the lowest figure, and what it is at."""
    judge = judge_of(base, figure)
    yield f"| method | perplexity | {figure} | the same, judge | dist-2 | tokens | settings |"
    yield "|---|---|---|---|---|---|---|"
    yield (
        f"| base | {base['perplexity']:.1f} | {base[figure]:.3f} | {base[judge]:.3f} | {base['dist-2']:.3f} "
        f"| {base['completion length']:.1f} | |"
    )
    for method, name in NAMES.items():
        shown: list[Row] = []
        for limit in LIMITS:
            row = best_within(base, rows, method, limit, figure)
            if row is None or row in shown:
                continue
            shown.append(row)
            low, high = row["intervals"][figure]
            settings = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())
            guided = f", γ {row['guidance']:g}" if row["guidance"] != 1 else ""
            yield (
                f"| {name} | {100 * (row['perplexity'] / base['perplexity'] - 1):+.1f} % "
                f"| {row[figure]:.3f} [{low:.3f}, {high:.3f}] | {row[judge]:.3f} "
                f"| {100 * (row['dist-2'] / base['dist-2'] - 1):+.1f} % | {row['completion length']:.1f} "
                f"| {settings}{guided} |"
            )


def costs(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a table of what a training costs."""
    yield "| method | runs | scored | learned | CPU minutes | peak memory, GB |"
    yield "|---|---|---|---|---|---|"
    for method, name in NAMES.items():
        found = {json.dumps([row["settings"], row["seed"]]): row["cost"] for row in rows if row["method"] == method}
        if not found:
            continue
        first = next(iter(found.values()))
        minutes = sorted(cost["cpu_seconds"] / 60 for cost in found.values())
        peak = max(cost["peak_gb"] for cost in found.values())
        yield (
            f"| {name} | {len(found)} | {first['scored']:,} | {first['learned']:,} "
            f"| {minutes[len(minutes) // 2]:.1f} | {peak:.2f} |"
        )


def section(task: str, facts: dict[str, Any], results: Path, images: Path) -> Iterator[str]:
    """Yield the lines of a task's part of the page, and draw its pictures."""
    base, rows = points(results)
    if not base or not rows:
        return
    figure = f"{facts['unwanted']} probability"
    yield f"## {task}"
    yield ""
    scored, prompts, samples = f"{facts['scored']:,}", facts["test_limit"], facts["samples"]
    yield f"{scored} scored completions of {facts['length']} tokens. Measured on {prompts} held-out prompts with"
    yield f"{samples} samples each. The reward is `{facts['reward']}`. Brackets are 95 % bootstrap intervals."
    yield ""
    for name, shown in {"reward": figure, "judge": judge_of(base, figure)}.items():
        file = images / f"proof-{task}-{name}.svg"
        draw(base, rows, shown, file)
        yield f"![{shown} against perplexity, by method]({images.name}/{file.name})"
        yield ""
    yield from table(base, rows, figure)
    yield ""
    yield from costs(rows)
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
