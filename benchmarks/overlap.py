"""How much of scoring is hidden behind sampling: an exploration with a slow scorer costs the longer of the two.

    python benchmarks/overlap.py --output benchmarks/results

The scorer waits, as one over HTTP does, for a given share of the time that sampling a batch takes. With B batches at
most 1 - 1/B of the shorter can be hidden: nothing is there to score before the first batch is sampled, and nothing to
sample while the last is scored. Goal: 90 % hidden. Fails if rewards and completions do not belong together.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

from quarkrl import QuarkConfig, QuarkTrainer


class SlowScorer:
    """`measure.reward`, after a wait of so many seconds; adds up how long it took."""

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
    """Seconds of an exploration: the whole of it, and what scoring took of it."""
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
        assert trainer.pool.rewards[:, 0].tolist() == measure.reward([], texts), "rewards of other completions"
    return {"whole": whole, "scoring": scorer.seconds}


def main() -> None:
    """Explore without waiting, then with scorers slower and slower."""
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=measure.SHAPES, default="quick")
    parser.add_argument("--batches", type=int, help="20, or 5 with --quick")
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    batches = options.batches or (5 if options.quick else 20)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        shape, directory = measure.SHAPES[options.shape], Path(made)
        measure.make_model(directory, shape)
        prompts = measure.make_prompts(batches * options.batch_size, shape)
        explore(directory, prompts[: options.batch_size], options.batch_size, 0.0)  # Warms up.
        sampling = explore(directory, prompts, options.batch_size, 0.0)["whole"]
        for share in (0.5, 1.0, 2.0):
            print(f"a scorer that takes {share} of sampling", file=sys.stderr, flush=True)
            found = explore(directory, prompts, options.batch_size, share * sampling / batches)
            hidden = sampling + found["scoring"] - found["whole"]
            rows.append(
                {
                    "sampling alone, s": sampling,
                    "scoring, s": found["scoring"],
                    "exploring, s": found["whole"],
                    "times the longer": found["whole"] / max(sampling, found["scoring"]),
                    "hidden of the shorter": hidden / min(sampling, found["scoring"]),
                    "at most": 1 - 1 / batches,
                }
            )
    measure.report("overlap", "cpu", {"overlap": rows}, options.output)


if __name__ == "__main__":
    main()
