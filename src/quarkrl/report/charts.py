"""The charts of a report: Vega-Lite specifications, which vl-convert draws as static SVG.

Colours are CSS variables, so one picture serves the light and the dark page. `--q-0` … are those of the quantiles.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quarkrl.errors import UserError

_VEGA_LITE = "5.20"
_WIDTH, _HEIGHT = 400, 210
_CONFIG = {
    "background": None,
    "aria": False,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "grid": True,
        "gridColor": "var(--grid)",
        "labelColor": "var(--muted)",
        "labelFontSize": 12,
        "labelPadding": 6,
        "titleColor": "var(--muted)",
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "tickCount": 5,
    },
    "axisX": {"grid": False},
    "line": {"strokeWidth": 2, "strokeCap": "round", "strokeJoin": "round"},
    "text": {"color": "var(--ink)", "fontSize": 12},
}
Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A picture with its words.

    Attributes:
        title: what it shows, in some words.
        caption: how to read it, in a sentence.
        svg: the picture; its text alternative is in it.
        keys: the legend: names and CSS colours.
    """

    title: str
    caption: str
    svg: str
    keys: tuple[tuple[str, str], ...] = ()


def check_drawing() -> None:
    """Check that charts can be drawn.

    Raises:
        UserError: vl-convert is not installed.
    """
    try:
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise UserError(f"the report needs vl-convert: pip install vl-convert-python ({error}).") from error


def draw(spec: dict[str, Any], alternative: str, width: int = _WIDTH, height: int = _HEIGHT) -> str:
    """Draw a Vega-Lite specification as SVG that scales with the page.

    Args:
        spec: the specification, without size and configuration.
        alternative: the text for those who do not see it.
        width, height: of the plot without axes, in pixels.
    """
    import vl_convert

    whole = {"width": width, "height": height, "config": _CONFIG, "data": {"values": []}, **spec}
    svg = vl_convert.vegalite_to_svg(whole, vl_version=_VEGA_LITE)
    _, attributes, body = re.split(r"<svg([^>]*)>", svg, maxsplit=1)
    box = re.search(r'viewBox="([^"]*)"', attributes)
    assert box, "vl-convert writes a viewBox"
    label = html.escape(alternative, quote=True)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{label}" style="max-width:{box[1].split()[2]}px">{body}'


def distribution(title: str, values: Mapping[int, np.ndarray], unit: str, held_out: Sequence[Point] = ()) -> Chart:
    """Draw the distribution of a figure by iteration as boxes: 5th to 95th percentile, quartiles, median and mean.

    Args:
        title: of the chart.
        values: iteration → the values of its samples.
        unit: name and unit of the axis.
        held_out: iteration and mean on held-out prompts, if they were evaluated.
    """
    rows = []
    for number, part in values.items():
        cuts = np.percentile(part, (5, 25, 50, 75, 95)).tolist()
        box = dict(zip(("low", "first", "median", "third", "high"), cuts, strict=True))
        rows.append({"x": number, **box, "mean": float(part.mean())})
    size = max(2.0, min(18.0, 0.55 * _WIDTH / len(rows)))
    y = {"type": "quantitative", "title": unit, "scale": {"zero": False, "nice": True}}
    layers = [
        _layer({"type": "rule", "color": "var(--after)", "opacity": 0.55}, y={**y, "field": "low"}, y2="high"),
        _layer(
            {"type": "bar", "color": "var(--after)", "opacity": 0.3, "size": size, "cornerRadius": 2},
            y={**y, "field": "first"},
            y2="third",
        ),
        _layer(
            {"type": "tick", "orient": "horizontal", "color": "var(--after)", "thickness": 2, "size": size},
            y={**y, "field": "median"},
        ),
        _layer({"type": "line", "color": "var(--ink)", "strokeWidth": 1, "opacity": 0.5}, y={**y, "field": "mean"}),
        _layer(
            {"type": "point", "color": "var(--ink)", "filled": True, "size": 30, "opacity": 1}, y={**y, "field": "mean"}
        ),
    ]
    keys = [("middle half, median", "var(--after)"), ("mean", "var(--ink)")]
    if held_out:
        points = [{"x": x, "value": value} for x, value in held_out]
        for mark in ({"type": "line", "strokeDash": [4, 3]}, {"type": "point", "filled": True, "size": 26}):
            layer = _layer({**mark, "color": "var(--accent)", "opacity": 1}, y={**y, "field": "value"})
            layers.append({**layer, "data": {"values": points}})
        keys.append(("mean, held-out prompts", "var(--accent)"))
    x = _iterations([*values, *(math.ceil(x) for x, _ in held_out)])
    spec = {"data": {"values": rows}, "encoding": {"x": x}, "layer": layers}
    first, last = rows[0], rows[-1]
    text = (
        f"{title}: mean {first['mean']:.3g} and median {first['median']:.3g} in iteration {first['x']}, "
        f"mean {last['mean']:.3g} and median {last['median']:.3g} in iteration {last['x']}."
    )
    return Chart(title, "Thin lines reach from the 5th to the 95th percentile.", draw(spec, text), tuple(keys))


def shift(title: str, first: np.ndarray, last: np.ndarray, unit: str, names: tuple[str, str]) -> Chart:
    """Draw two histograms of a figure over each other.

    Args:
        title: of the chart.
        first, last: the values.
        unit: name and unit of the axis.
        names: of the two.
    """
    low, high = float(min(first.min(), last.min())), float(max(first.max(), last.max()))
    high = high if high > low else low + 1
    edges = np.linspace(low, high, 31)
    layers, colors = [], ("var(--before)", "var(--after)")
    for values, color in zip((first, last), colors, strict=True):
        shares = np.histogram(values, edges)[0] / len(values)
        rows = [
            {"from": float(a), "to": float(b), "share": float(share)}
            for a, b, share in zip(edges[:-1], edges[1:], shares, strict=True)
        ]
        layer = _layer(
            {"type": "bar", "color": color, "opacity": 0.55},
            y={
                "field": "share",
                "type": "quantitative",
                "title": "share of completions",
                "axis": {"format": "%"},
                "stack": None,
            },
        )
        x = {"field": "from", "type": "quantitative", "title": unit, "bin": "binned", "scale": {"nice": False}}
        layer["encoding"] |= {"x": x, "x2": {"field": "to"}}
        layers.append({**layer, "data": {"values": rows}})
    text = f"{title}: mean {first.mean():.3g} in {names[0]}, {last.mean():.3g} in {names[1]}."
    caption = "How the completions are spread over the rewards, at the start and at the end."
    return Chart(title, caption, draw({"layer": layers}, text), tuple(zip(names, colors, strict=True)))


@dataclass(frozen=True)
class Axes:
    """The axes of a chart of lines.

    Attributes:
        x, y: names and units.
        iterations: whether x are numbers of iterations.
        percent: whether y are shares.
    """

    x: str
    y: str
    iterations: bool = False
    percent: bool = False


def lines(
    title: str,
    caption: str,
    series: Mapping[str, Sequence[Point]],
    axes: Axes,
    colors: Mapping[str, str] | None = None,
    size: tuple[int, int] = (_WIDTH, _HEIGHT),
    numbered: bool = False,
) -> Chart:
    """Draw lines with points.

    Args:
        title, caption: of the chart.
        series: name → points.
        axes: the axes.
        colors: name → CSS colour.
        size: width and height of the plot.
        numbered: write its number at each point.
    """
    names = list(series)
    colors = colors or {name: f"var(--s-{i % 6})" for i, name in enumerate(names)}
    rows: list[dict[str, Any]] = [
        {"x": x, "y": y, "series": name, "order": i, "label": str(i)}
        for name in names
        for i, (x, y) in enumerate(series[name])
        if math.isfinite(y)
    ]
    x: dict[str, Any] = {"field": "x", "type": "quantitative", "title": axes.x, "scale": {"zero": False, "nice": False}}
    if axes.iterations:
        x = _iterations([int(row["x"]) for row in rows])
    y = {
        "field": "y",
        "type": "quantitative",
        "title": axes.y,
        "scale": {"zero": False},
        "axis": {"format": "~%"} if axes.percent else {},
    }
    color = {
        "field": "series",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": names, "range": [colors[name] for name in names]},
    }
    order = {"field": "order", "type": "quantitative"}
    layers: list[dict[str, Any]] = [{"mark": "line", "encoding": {"order": order}}]
    if len(rows) <= 60 * len(names):
        layers.append({"mark": {"type": "point", "filled": True, "size": 24, "opacity": 1}})
    if numbered:
        mark = {"type": "text", "dy": -10, "fontSize": 11}
        muted = {"value": "var(--muted)"}
        layers.append({"mark": mark, "encoding": {"text": {"field": "label"}, "color": muted}})
    spec = {"data": {"values": rows}, "encoding": {"x": x, "y": y, "color": color}, "layer": layers}
    ends = [f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in series.items() if points]
    keys = tuple((name, colors[name]) for name in names) if len(names) > 1 else ()
    return Chart(title, caption, draw(spec, f"{title}: {'; '.join(ends)}.", *size), keys)


def quantile_shares(numbers: Sequence[int], sizes: np.ndarray) -> Chart:
    """Draw in which quantile of the whole pool the samples of each iteration are, `(I, K)`."""
    shares = sizes / sizes.sum(axis=1, keepdims=True)
    rows = [
        {"x": number, "quantile": k, "share": float(shares[i, k])}
        for i, number in enumerate(numbers)
        for k in range(sizes.shape[1])
    ]
    size = max(2.0, min(26.0, 0.7 * _WIDTH / len(numbers)))
    spec = {
        "data": {"values": rows},
        "mark": {"type": "bar", "size": size},
        "encoding": {
            "x": _iterations(numbers),
            "y": {
                "field": "share",
                "type": "quantitative",
                "title": "share of completions",
                "axis": {"format": "%"},
                "scale": {"domain": [0, 1]},
            },
            "color": {**_quantile_colors(sizes.shape[1]), "field": "quantile"},
            "order": {"field": "quantile", "type": "quantitative"},
        },
    }
    title = "Where each iteration's samples are now"
    best = f"{shares[0, -1]:.0%} of the first and {shares[-1, -1]:.0%} of the last iteration are in the best quantile."
    return Chart(title, "Quantiles of the whole pool, the best one on top.", draw(spec, f"{title}: {best}"))


def quantile_edges(numbers: Sequence[int], edges: np.ndarray) -> Chart:
    """Draw the reward from which each quantile but the worst starts, `(I, K - 1)`, as the pool grows."""
    count = edges.shape[1] + 1
    series = {
        str(k): [(float(number), float(edge)) for number, edge in zip(numbers, edges[:, k - 1], strict=True)]
        for k in range(count - 1, 0, -1)
    }
    colors = {name: f"var(--q-{name})" for name in series}
    caption = "The reward from which each quantile starts, as the pool grows."
    chart = lines("Quantile edges", caption, series, Axes("iteration", "reward", iterations=True), colors)
    return Chart(chart.title, chart.caption, chart.svg)


def control_curve(label: str, points: Sequence[tuple[float, float, float, float]], reference: float | None) -> Chart:
    """Draw a figure over what was requested, with its intervals.

    Args:
        label: what was requested.
        points: requested value, reward, and the ends of its interval.
        reference: the reference's reward; None to leave it out.
    """
    rows = [dict(zip(("x", "y", "low", "high"), point, strict=True)) for point in points]
    y = {"type": "quantitative", "title": "reward", "scale": {"zero": False}}
    layers = [
        _layer({"type": "rule", "color": "var(--after)", "strokeWidth": 1.5}, y={**y, "field": "low"}, y2="high"),
        _layer({"type": "line", "color": "var(--after)"}, y={**y, "field": "y"}),
        _layer(
            {"type": "point", "color": "var(--after)", "filled": True, "size": 40, "opacity": 1}, y={**y, "field": "y"}
        ),
    ]
    keys: tuple[tuple[str, str], ...] = ()
    if reference is not None:
        layers.append(
            {
                "mark": {"type": "rule", "color": "var(--before)", "strokeDash": [4, 3]},
                "encoding": {"x": None, "y": {"datum": reference}},
            }
        )
        keys = (("policy", "var(--after)"), ("reference", "var(--before)"))
    x = {
        "field": "x",
        "type": "quantitative",
        "title": label,
        "scale": {"zero": False, "padding": 12},
        "axis": {"values": [row["x"] for row in rows], "format": "~g"},
    }
    spec = {"data": {"values": rows}, "encoding": {"x": x}, "layer": layers}
    title = f"Control: reward over the {label}"
    text = "; ".join(f"{row['y']:.3g} at {row['x']:g}" for row in rows)
    return Chart(title, "Vertical lines are 95 % intervals.", draw(spec, f"{title}: {text}."), keys)


def _layer(mark: dict[str, Any], y: dict[str, Any], y2: str | None = None) -> dict[str, Any]:
    return {"mark": mark, "encoding": {"y": y, **({"y2": {"field": y2}} if y2 else {})}}


def _iterations(numbers: Iterable[int]) -> dict[str, Any]:
    """The x axis of iterations, with whole numbers only."""
    ordered = sorted(set(numbers)) or [0]
    step = max(1, -(-len(ordered) // 12))
    axis = {"values": ordered[::step], "format": "d"}
    scale = {"zero": False, "nice": False, "domain": [ordered[0] - 0.5, ordered[-1] + 0.5]}
    return {"field": "x", "type": "quantitative", "title": "iteration", "axis": axis, "scale": scale}


def _quantile_colors(count: int) -> dict[str, Any]:
    names = list(range(count))
    return {"type": "nominal", "legend": None, "scale": {"domain": names, "range": [f"var(--q-{k})" for k in names]}}
