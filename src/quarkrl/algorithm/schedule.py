"""The order of the data: which prompts an iteration explores, and which draws share a batch. Pure functions."""

from collections.abc import Sequence

import numpy as np

# Batches that are sorted by length together. Only batches within such a window change places.
_BATCHES_PER_WINDOW = 50


def schedule_prompts(
    prompt_ids: Sequence[Sequence[int]], iteration: int, count: int | None, samples_per_prompt: int, seed: int
) -> list[int]:
    """Choose the prompts that an iteration explores.

    Shuffled passes over all prompts form one endless sequence, and each iteration takes the next `count` prompts of
    it. The result depends on the arguments alone, so a resumed run explores the same prompts.

    Args:
        prompt_ids: the token ids of all prompts.
        iteration: the iteration, counted from 0.
        count: prompts per iteration; None, or more than there are, means all prompts.
        samples_per_prompt: how often each prompt is repeated.
        seed: the seed of the shuffled passes.

    Returns:
        Indices into `prompt_ids`, sorted by prompt length so that a batch needs little padding; the repetitions of a
        prompt are adjacent.
    """
    total = len(prompt_ids)
    count = min(count or total, total)
    first, last = iteration * count, (iteration + 1) * count
    passes = range(first // total, (last - 1) // total + 1)
    shuffled = np.concatenate([np.random.default_rng((seed, number)).permutation(total) for number in passes])
    start = first % total
    rows = shuffled[start : start + count]
    lengths = np.array([len(prompt_ids[row]) for row in rows])
    return np.repeat(rows[np.argsort(lengths, kind="stable")], samples_per_prompt).tolist()


def bucket_by_length(draws: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Reorder draws so that each batch holds samples of similar length and needs little padding.

    Draws are sorted by length within windows of 50 batches; the batches of a window are then shuffled.

    Args:
        draws: `(n,)`, pool indices; n is a multiple of `batch_size`.
        lengths: `(n,)`, the number of tokens of each draw.
        batch_size: draws per batch.
        rng: the generator that shuffles the batches.

    Returns:
        `(n,)`, the same draws; each consecutive `batch_size` of them form a batch.
    """
    window_size = _BATCHES_PER_WINDOW * batch_size
    order = []
    for window in np.split(np.arange(len(draws)), range(window_size, len(draws), window_size)):
        by_length = window[np.argsort(lengths[window], kind="stable")]
        batches = by_length.reshape(-1, batch_size)
        order.append(rng.permutation(batches).reshape(-1))
    return draws[np.concatenate(order)]
