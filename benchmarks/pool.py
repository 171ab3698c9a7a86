"""The pool at 10^7 samples: loaded from Parquet, cut into quantiles, drawn from; seconds and bytes a sample.

    python benchmarks/pool.py --output benchmarks/results

A million samples of 36.5 tokens are added and saved as one iteration's file; links give the same file to the other
iterations. Goals, on two cores: loading at least 10^6 samples a second, quantizing in less than 2 s, a draw as quick
from many samples as from few, at most 32 bytes a sample beside its tokens, and the pool never copied whole: the peak of
it all is what the pool holds, and what passes by. Fails if what is loaded is not what was saved.
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
    """Seconds that a call took, and what it gave."""
    began = time.perf_counter()
    given = call(*args, **kwargs)
    return time.perf_counter() - began, given


def save(directory: Path, per_file: int) -> dict[str, float]:
    """Write an iteration of so many samples; how many were added, and saved, in a second."""
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
    """Load a pool and do with it what an iteration does."""
    with tempfile.TemporaryDirectory() as small:  # What reading takes at all is not the pool's.
        save(Path(small), 1000)
        DataPool.load(small, QUANTILES, ("reward",)).quantize()
    before = measure.held_bytes("cpu")
    loading, pool = timed(DataPool.load, directory, QUANTILES, ("reward",))
    assert len(pool) == samples, f"{len(pool)} samples of {samples}"
    first, quantizing = timed(pool.quantize)[0], timed(pool.quantize)[0]
    peak = measure.peak_bytes("cpu") - before
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # What is free, but kept for later, is not the pool's.
    held, tokens = measure.held_bytes("cpu") - before, int(pool.lengths.sum())
    rng = np.random.default_rng(0)
    drawing, drawn = timed(pool.draw, DRAWS, rng)
    balancing, _ = timed(pool.draw, DRAWS, rng, balanced=True)
    measured, lengths = timed(pool.lengths_of, drawn)
    reading, read = timed(lambda: [pool[int(i)] for i in drawn])
    assert [len(s.prompt_ids) + len(s.completion_ids) for s in read] == lengths.tolist()
    saved = pq.read_table(directory / "iteration-000000.parquet")  # all files are this one
    for i, sample in zip(drawn[:CHECKED].tolist(), read, strict=False):
        row = saved.slice(i % len(saved), 1).to_pylist()[0]
        found = (sample.prompt_ids.tolist(), sample.completion_ids.tolist(), pool.rewards[i, 0])
        assert found == (row["prompt_ids"], row["completion_ids"], row["reward"]), f"sample {i} is not what was saved"
    sizes = np.bincount(pool.quantiles[:, 0], minlength=QUANTILES)
    assert sizes.max() - sizes.min() <= samples // PER_FILE + 1, f"quantiles of {sizes.tolist()}"  # Files' rewards tie.
    return {
        "samples": samples,
        "loading, samples/s": samples / loading,
        "quantizing, s": max(first, quantizing),
        "a draw, µs": drawing / DRAWS * 1e6,
        "balanced draws, s": balancing,
        "its length, µs": measured / DRAWS * 1e6,
        "reading it, µs": reading / DRAWS * 1e6,
        # Of a small pool these would tell what the process takes at all.
        "bytes a sample beside tokens": (held - 4 * tokens) / samples if samples >= PER_FILE else None,
        "peak, times what is held": peak / held if samples >= PER_FILE else None,
    }


def main() -> None:
    """Measure pools of three sizes, each ten times the one before and in a process of its own."""
    parser = measure.parser(__doc__)
    parser.add_argument("--samples", type=int, help="of the largest pool: 10^7, or 10^5 with --quick")
    options = parser.parse_args()
    if options.child:
        return measure.answer(use(Path(options.child["directory"]), options.child["samples"]))
    most = options.samples or (100_000 if options.quick else 10_000_000)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for samples in sorted({max(most // 100, 1), max(most // 10, 1), most}):
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
