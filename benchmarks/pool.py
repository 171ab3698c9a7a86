"""Measure the pool at 10^7 samples: loading, quantizing and drawing, in seconds and bytes per sample.

    python benchmarks/pool.py --output benchmarks/results

A million samples of 36.5 tokens are added and saved as the file of one iteration; the other iterations are links to it.
Goals on two cores: load at least 10^6 samples per second, quantize in less than 2 s, draw in a time that does not
depend on the size of the pool, need at most 32 bytes per sample without its tokens, and never copy the whole pool. The
script fails if the loaded samples differ from the saved ones.
"""

import ctypes
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quarkrl.algorithm.pool import DataPool

QUANTILES, DRAWS, CHECKED, PER_FILE = 5, 100_000, 1000, 1_000_000
COMPLETION = 20  # tokens


def timed(call: Any, *args: Any, **kwargs: Any) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result."""
    began = time.perf_counter()
    result = call(*args, **kwargs)
    return time.perf_counter() - began, result


def save(directory: Path, per_file: int) -> dict[str, float]:
    """Save an iteration of `per_file` samples. Return the samples added and saved per second."""
    rng = np.random.default_rng(0)
    pool, adding = DataPool(QUANTILES), 0.0
    for start in range(0, per_file, 100_000):
        count = min(100_000, per_file - start)
        prompts = [rng.integers(0, 50_257, n).tolist() for n in np.resize(measure.LENGTHS, count)]
        completions = rng.integers(0, 50_257, (count, COMPLETION)).tolist()
        adding += timed(pool.add, prompts, completions, rng.random(count), iteration=0)[0]
    saving, _ = timed(pool.save, directory)
    return {"adding, samples/s": per_file / adding, "saving, samples/s": per_file / saving}


def use(directory: Path, samples: int) -> dict[str, float | None]:
    """Load a pool, quantize it and draw from it, as an iteration does."""
    with tempfile.TemporaryDirectory() as small:  # The memory of the first call is not the pool's.
        save(Path(small), 1000)
        DataPool.load(small, QUANTILES, ("reward",)).quantize()
    before = measure.held_bytes("cpu")
    loading, pool = timed(DataPool.load, directory, QUANTILES, ("reward",))
    assert len(pool) == samples, f"{len(pool)} samples of {samples}"
    first, quantizing = timed(pool.quantize)[0], timed(pool.quantize)[0]
    peak = measure.peak_bytes("cpu") - before
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # Freed memory is not the pool's.
    held, tokens = measure.held_bytes("cpu") - before, int(pool.lengths_of(np.arange(samples)).sum())
    rng = np.random.default_rng(0)
    drawing, drawn = timed(pool.draw, DRAWS, rng)
    balancing, _ = timed(pool.draw, DRAWS, rng, balanced=True)
    measured, lengths = timed(pool.lengths_of, drawn)
    reading, read = timed(lambda: [pool[int(i)] for i in drawn])
    assert [len(s.prompt_ids) + len(s.completion_ids) for s in read] == lengths.tolist()
    saved = pq.read_table(directory / "iteration-000000.parquet")  # All files are the same.
    for i, sample in zip(drawn[:CHECKED].tolist(), read, strict=False):
        row = saved.slice(i % len(saved), 1).to_pylist()[0]
        loaded = (sample.prompt_ids.tolist(), sample.completion_ids.tolist(), pool.rewards[i, 0])
        assert loaded == (row["prompt_ids"], row["completion_ids"], row["reward"]), (
            f"sample {i} differs from the saved one"
        )
    sizes = np.bincount(pool.quantiles[:, 0], minlength=QUANTILES)
    assert sizes.max() - sizes.min() <= samples // PER_FILE + 1, f"quantiles of {sizes.tolist()}"  # Files' rewards tie.
    return {
        "samples": samples,
        "loading, samples/s": samples / loading,
        "quantizing, s": max(first, quantizing),
        "draw, µs": drawing / DRAWS * 1e6,
        "balanced draws, s": balancing,
        "length of a sample, µs": measured / DRAWS * 1e6,
        "reading a sample, µs": reading / DRAWS * 1e6,
        # For a small pool these would measure the process.
        "bytes per sample without tokens": (held - 4 * tokens) / samples if samples >= PER_FILE else None,
        "peak, ratio to the pool": peak / held if samples >= PER_FILE else None,
    }


def main() -> None:
    """Measure pools of three sizes, each ten times as large as the previous and in its own process."""
    parser = measure.parser(__doc__)
    parser.add_argument("--samples", type=int, help="samples of the largest pool; default 10^7, or 10^5 with --quick")
    options = parser.parse_args()
    if options.child:
        return measure.answer(use(Path(options.child["directory"]), options.child["samples"]))
    largest = options.samples or (100_000 if options.quick else 10_000_000)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for samples in sorted({max(largest // 100, 1), max(largest // 10, 1), largest}):
            directory = Path(work) / str(samples)
            per_file = min(samples, PER_FILE)
            writing = save(directory, per_file)
            for i in range(1, samples // per_file):
                os.link(directory / "iteration-000000.parquet", directory / f"iteration-{i:06d}.parquet")
            print(f"{samples} samples", file=sys.stderr, flush=True)
            task = {"directory": str(directory), "samples": samples // per_file * per_file}
            rows.append({**measure.child(__file__, task), **writing})
    measure.report("pool", "cpu", {"pool": rows}, options.output)


if __name__ == "__main__":
    main()
