"""Pairs: of two completions of a prompt, the policy learns to prefer the one with the higher reward.

A quantile compares a completion with those of all prompts, and the NLL learns every token of it. A pair compares two
completions of one prompt. What they share cancels out, so few samples teach more. The term is that of DPO (Rafailov
et al. 2023, arXiv 2305.18290, equation 7), for the policy that is asked for the best quantile, r_K:

    -log σ(b (Δ(y⁺) - Δ(y⁻))),   Δ(y) = log p_θ(y | x, r_K) - log p_0(y | x)
"""

from collections import defaultdict

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from quarkrl.algorithm.pool import DataPool


def find_pairs(pool: DataPool, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a pair for each of n samples: the sample, and the one of its prompt and iteration that differs most.

    Args:
        pool: quantized; it has one attribute.
        indices: `(n,)`, of the samples.

    Returns:
        The indices of the better and of the worse ones, `(n,)` each. They are equal where all completions of a prompt
        have the same reward.
    """
    groups, keys = defaultdict(list), []
    for index in range(len(pool)):
        keys.append((int(pool.iterations[index]), pool[index].prompt_ids.tobytes()))
        groups[keys[-1]].append(index)
    pairs = np.empty((2, len(indices)), dtype=np.int64)
    for number, index in enumerate(indices.tolist()):
        rows = groups[keys[index]]
        rewards, own = pool.rewards[rows, 0], pool.rewards[index, 0]
        best, worst = rows[rewards.argmax()], rows[rewards.argmin()]
        pairs[:, number] = (index, worst) if 2 * own > rewards.max() + rewards.min() else (best, index)
    is_tie = pool.rewards[pairs[0], 0] == pool.rewards[pairs[1], 0]
    pairs[0, is_tie] = pairs[1, is_tie]
    return pairs[0], pairs[1]


def dpo_loss(better: Tensor, worse: Tensor, beta: float) -> Tensor:
    """Return DPO's loss of n pairs, `(n,)`, in nats.

    Args:
        better, worse: `(n,)`, Δ of each pair's completions: the log-likelihood of the policy less that of p_0.
        beta: b; the smaller, the further the policy may move.
    """
    return -F.logsigmoid(beta * (better - worse))
