"""Measure how the time and memory of an iteration grow with batch, length, vocabulary, K, pool and model.

    python benchmarks/scaling.py --output benchmarks/results

One size grows at a time; the others stay at the base: 4 layers of width 256, 16,384 tokens, batch 32, 20 tokens per
completion, K = 5. Each point is measured in its own process, by iteration.py; a point of the pool is a quantization and
a draw. Both axes of the plot are logarithmic: a line of slope 1 means proportional growth. It needs matplotlib.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import iteration
import measure
import numpy as np
from measure import SHAPES, Shape

from quarkrl.algorithm.pool import DataPool

BASE: dict[str, Any] = {"side": "quarkrl", "bf16": False, "device": "cpu", "iterations": 2, "batches": 1}
BASE |= {"batch_size": 32, "length": 20, "num_quantiles": 5, "rates": False}
QUICK = {"batch_size": 8, "length": 5}

AXES: dict[str, list[int]] = {
    "batch": [8, 16, 32, 64, 128],
    "completion length": [10, 20, 40, 80, 160],
    "vocabulary": [4096, 16_384, 65_536, 131_072],
    "K": [2, 5, 10, 30],
    "pool": [10_000, 100_000, 1_000_000],
    "model parameters": [128, 256, 512, 768],
}


def point(base: dict[str, Any], axis: str, size: int) -> tuple[Shape, dict[str, Any]]:
    """Return the model's shape and the task at one size. The size of the model is its width; a head is 64 wide."""
    shape, task = SHAPES["quick"], base
    if axis == "vocabulary":
        shape = replace(shape, vocab=size)
    elif axis == "model parameters":
        shape = replace(shape, width=size, heads=size // 64)
    else:
        task = {**task, {"batch": "batch_size", "completion length": "length", "K": "num_quantiles"}[axis]: size}
    return shape, {**task, "shape": measure.as_json(shape)}


def measure_pool(samples: int) -> dict[str, float]:
    """Measure, in a child process, quantizing a pool of `samples` samples and drawing from it."""
    before, pool = measure.held_bytes("cpu"), DataPool(BASE["num_quantiles"])
    rng = np.random.default_rng(0)
    for start in range(0, samples, 100_000):
        count = min(100_000, samples - start)
        tokens = rng.integers(0, 16_384, (count, 36)).tolist()
        pool.add([row[:16] for row in tokens], [row[16:] for row in tokens], rng.random(count), iteration=start)
        del tokens
    began = time.perf_counter()
    pool.quantize()
    quantizing = time.perf_counter() - began
    drawn = pool.draw(BASE["batches"] * BASE["batch_size"], rng)
    lengths = pool.lengths_of(drawn)
    return {
        "quantize and draw, s": time.perf_counter() - began,
        "quantizing, s": quantizing,
        "beyond_bytes": measure.held_bytes("cpu") - before,
        "tokens": int(lengths.sum()),
    }


def measure_iteration(base: dict[str, Any], axis: str, size: int) -> dict[str, Any]:
    """Measure an iteration at one size. Return a row of the table."""
    shape, task = point(base, axis, size)
    with tempfile.TemporaryDirectory() as directory:
        measure.make_model(Path(directory), shape)
        prompts = measure.make_prompts(task["batches"] * task["batch_size"], shape)
        (Path(directory) / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
        figures = measure.child(iteration.__file__, {**task, "directory": directory})
    if axis == "model parameters":
        size = shape.block_parameters + shape.width * (shape.vocab + shape.positions)
    return {"axis": axis, "size": size, **{name: figures[name] for name in ("sampling", "learning", "quantizing")}} | {
        "memory beyond models, GB": figures["beyond_bytes"] / 1e9
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot, in one panel per axis, the seconds of an iteration's parts and its memory over the size."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(4.2 * min(3, len(axes)), 3.2 * -(-len(axes) // 3)), layout="constrained")
    panels = list(figure.subplots(-(-len(axes) // 3), min(3, len(axes)), squeeze=False).flat)
    for panel, axis in zip(panels, axes, strict=False):
        points = [row for row in rows if row["axis"] == axis]
        sizes = [row["size"] for row in points]
        for name, color in (("quantizing", "C2"),) if axis == "pool" else (("sampling", "C0"), ("learning", "C1")):
            panel.plot(sizes, [row[name] for row in points], f"{color}o-", markersize=3, label=f"{name}, s")
        memory = [row["memory beyond models, GB"] for row in points]
        panel.plot(sizes, memory, "C3s--", markersize=3, label="memory, GB")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(sizes, [EngFormatter(places=0, sep="")(size) for size in sizes])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(axes) :]:
        panel.set_visible(False)
    lines = [line for panel in figure.axes for line in panel.get_lines()]
    by_label = {str(line.get_label()): line for line in lines}
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(path)


def main() -> None:
    """Measure every axis at every size."""
    parser = measure.parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    options = parser.parse_args()
    if options.child:
        return measure.answer(measure_pool(options.child["samples"]))
    rows: list[dict[str, Any]] = []
    base = {**BASE, **(QUICK if options.quick else {})}
    for axis in options.axes:
        for size in AXES[axis][:2] if options.quick else AXES[axis]:
            print(f"{axis} {size}", file=sys.stderr, flush=True)
            if axis == "pool":
                figures = measure.child(__file__, {"samples": size})
                parts = {"sampling": None, "learning": None, "quantizing": figures["quantizing, s"]}
                rows.append(
                    {"axis": axis, "size": size, **parts, "memory beyond models, GB": figures["beyond_bytes"] / 1e9}
                )
            else:
                rows.append(measure_iteration(base, axis, size))
    measure.report("scaling", "cpu", {"an iteration, seconds": rows}, options.output)
    if options.output is not None:
        draw(rows, options.output / "scaling.png")


if __name__ == "__main__":
    main()
