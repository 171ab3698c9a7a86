"""`Collator`: from the numbers of draws to batches, in this process or in a worker of the data loader."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quarkrl.algorithm.pool import DataPool, Sample
from quarkrl.models.batching import build_batch
from quarkrl.models.conditioning import Conditioning

PAIR = ("better_", "worse_")  # Prefixes of the names of a pair's tensors.


class Collator:
    """Makes batches of draws: for the policy behind their reward tokens, for the reference without them.

    Workers of a data loader that are spawned, as on macOS and Windows, receive a pickled copy. The copy has the samples
    that were drawn instead of the whole pool.

    Args:
        conditioning: the reward tokens.

    Attributes:
        samples, draws, with_reference, contrast, pairs: of the current iteration, as in `set_iteration`.
    """

    def __init__(self, conditioning: Conditioning):
        self.conditioning = conditioning
        self.set_iteration((), np.zeros(0, dtype=np.int64), with_reference=False, contrast=None)

    def set_iteration(
        self,
        samples: DataPool | Sequence[Sample],
        draws: np.ndarray,
        with_reference: bool,
        contrast: Callable[[list[int]], list[int]] | None,
        pairs: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Set what an iteration learns from.

        Args:
            samples: the pool, quantized, or the samples of a teacher.
            draws: `(n,)`, indices into `samples`.
            with_reference: whether a batch has the inputs of the reference.
            contrast: makes the prompts of the same samples for the contrast of guidance; None for no such inputs.
            pairs: for each draw a better and a worse sample of its prompt, `(n,)` each; None for no such inputs.
        """
        self.samples, self.draws, self.with_reference, self.contrast = samples, draws, with_reference, contrast
        self.pairs = pairs

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Make a batch of the draws of the given numbers.

        Returns:
            `input_ids`, `attention_mask`, `labels`, each `(batch, length)`, right-padded, labels -100 outside the
            completion. With `ref_` before the name: the same for the reference; with `contrast_`: for the contrast, and
            then `is_best`, `(batch, 1)`, whether the sample is in the best quantile; with `better_` and `worse_`: for
            the policy that is asked for the best quantile, and with `ref_better_` and `ref_worse_` for the reference.
        """
        samples = [self.samples[int(self.draws[number])] for number in numbers]
        prompts = [sample.prompt_ids.tolist() for sample in samples]
        completions = [sample.completion_ids.tolist() for sample in samples]
        quantiles = [sample.quantiles.tolist() for sample in samples]
        conditioned = [self.conditioning.prefix(*pair) for pair in zip(prompts, quantiles, strict=True)]
        batch = build_batch(conditioned, completions)
        if self.with_reference:
            batch |= {f"ref_{name}": tensor for name, tensor in build_batch(prompts, completions).items()}
        if self.contrast is not None:
            batch["is_best"] = torch.tensor([[row == list(self.conditioning.best)] for row in quantiles])
            others = list(map(self.contrast, prompts))
            batch |= {f"contrast_{name}": tensor for name, tensor in build_batch(others, completions).items()}
        for name, indices in zip(PAIR, self.pairs or (), strict=False):
            chosen = [self.samples[int(indices[number])] for number in numbers]
            prompts = [sample.prompt_ids.tolist() for sample in chosen]
            completions = [sample.completion_ids.tolist() for sample in chosen]
            best = [self.conditioning.prefix(prompt, self.conditioning.best) for prompt in prompts]
            batch |= {f"{name}{key}": tensor for key, tensor in build_batch(best, completions).items()}
            batch |= {f"ref_{name}{key}": tensor for key, tensor in build_batch(prompts, completions).items()}
        return batch

    def __getstate__(self) -> dict[str, Any]:
        indices = np.stack((self.draws, *(self.pairs or ())))
        drawn, numbers = np.unique(indices, return_inverse=True)
        draws, *pairs = numbers.reshape(indices.shape)
        samples = [self.samples[index] for index in drawn.tolist()]
        return {**vars(self), "samples": samples, "draws": draws, "pairs": tuple(pairs) or None}
