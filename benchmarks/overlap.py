"""Measure how much of the time of a slow scorer is hidden behind sampling.

    python benchmarks/overlap.py --output benchmarks/results

The scorer waits, like one over HTTP, for a share of the time that sampling a batch takes. With B batches, at most
1 - 1/B of the shorter of the two can be hidden: the first batch is sampled before there is anything to score, and the
last is scored when there is nothing left to sample. The goal is 90 %. Fails if rewards and completions do not match.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

from quarkrl import QuarkConfig, QuarkTrainer


class SlowScorer:
    """`measure.reward` after a wait in seconds. It sums the time of its calls."""

    def __init__(self, wait: float):
        self.wait = wait
        self.seconds = 0.0

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        began = time.perf_counter()
        time.sleep(self.wait)
        rewards = measure.reward(prompts, completions)
        self.seconds += time.perf_counter() - began
        return rewards


def explore(directory: Path, prompts: list[str], batch_size: int, wait: float) -> dict[str, float]:
    """Return the seconds of an exploration and of its scoring."""
    scorer = SlowScorer(wait)
    with tempfile.TemporaryDirectory() as work:
        config = QuarkConfig(
            output_dir=work,
            generation_batch_size=batch_size,
            min_completion_length=20,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = QuarkTrainer(str(directory), scorer, config, prompts)
        began = time.perf_counter()
        trainer.explore(0)
        whole = time.perf_counter() - began
        trainer.quantize(0)
        samples = [trainer.pool[i] for i in range(len(trainer.pool))]
        texts = [trainer.plain_tokenizer.decode(sample.completion_ids) for sample in samples]
        assert trainer.pool.rewards[:, 0].tolist() == measure.reward([], texts), "rewards do not match the completions"
    return {"whole": whole, "scoring": scorer.seconds}


def main() -> None:
    """Explore without waiting, then with slower and slower scorers."""
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=measure.SHAPES, default="quick")
    parser.add_argument("--batches", type=int, help="batches per exploration; default 20, or 5 with --quick")
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    batches = options.batches or (5 if options.quick else 20)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        shape, directory = measure.SHAPES[options.shape], Path(work)
        measure.make_model(directory, shape)
        prompts = measure.make_prompts(batches * options.batch_size, shape)
        explore(directory, prompts[: options.batch_size], options.batch_size, 0.0)  # Warm-up.
        sampling = explore(directory, prompts, options.batch_size, 0.0)["whole"]
        for share in (0.5, 1.0, 2.0):
            print(f"a scorer that takes {share} of the time of sampling", file=sys.stderr, flush=True)
            seconds = explore(directory, prompts, options.batch_size, share * sampling / batches)
            hidden = sampling + seconds["scoring"] - seconds["whole"]
            rows.append(
                {
                    "sampling alone, s": sampling,
                    "scoring, s": seconds["scoring"],
                    "exploring, s": seconds["whole"],
                    "ratio to the longer": seconds["whole"] / max(sampling, seconds["scoring"]),
                    "hidden share of the shorter": hidden / min(sampling, seconds["scoring"]),
                    "at most": 1 - 1 / batches,
                }
            )
    measure.report("overlap", "cpu", {"overlap": rows}, options.output)


if __name__ == "__main__":
    main()
