"""Best-of-n reranking: `quarkrl evaluate`, where each completion is the best by the reward of n that are sampled.

    python benchmarks/proof/rerank.py 4 evaluate MODEL --reward profanity --prompts …

No weight changes. Each completion that is served costs n completions and n scores.
"""

import sys
from collections.abc import Sequence
from typing import Any

from quarkrl.cli.main import main
from quarkrl.rewards.registry import resolve
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.strategy import Sampling


def rerank(n: int, reward: str) -> None:
    """Make generators sample n completions for each one, and return the best."""
    complete, function = QuarkGenerator.complete, resolve(reward)

    def best_of_n(
        generator: QuarkGenerator, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, **options: Any
    ) -> list[list[int]]:
        repeated = [list(ids) for ids in prompt_ids for _ in range(n)]
        completions = complete(generator, repeated, sampling, **options)
        prompts = [generator.tokenizer.decode(ids) for ids in repeated]
        rewards = function(prompts=prompts, completions=generator.decode(repeated, completions))
        groups = (range(first, first + n) for first in range(0, len(completions), n))
        return [completions[max(group, key=lambda row: rewards[row])] for group in groups]

    QuarkGenerator.complete = best_of_n


if __name__ == "__main__":
    rerank(int(sys.argv[1]), sys.argv[sys.argv.index("--reward") + 1])
    sys.exit(main(sys.argv[2:]))
