"""The first look at a run: a few completions before it starts, for its speed and for the spread of their rewards."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from quarkrl.algorithm.pool import find_edges
from quarkrl.data.encoding import for_encoder
from quarkrl.data.prompts import Prompts
from quarkrl.models.batching import build_batch
from quarkrl.models.completion_logits import completion_logits
from quarkrl.models.encoder_decoder import is_encoder_decoder
from quarkrl.models.eval_mode import eval_mode
from quarkrl.models.loading import eos_ids, longest_prompt
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.sampler import complete
from quarkrl.training.config import QuarkConfig
from quarkrl.training.exploration import CompletionScorer
from quarkrl.training.runtime_tuning import limit_onednn_caches
from quarkrl.training.sizing import RewardSpread, Speed

_WARM_UP = 8  # Completions before those that count: the first products of a process are slow.
# Completions, and their tokens. Few would make a model look slow, because a run samples in large batches.
_SMALL_MODEL, _OF_SMALL, _OF_LARGE = 50e6, 256, 64
_TOKENS = 20
_LEAST = 16
_ON_GPU = 512  # A GPU takes about as long for one completion as for hundreds.
_BATCH = 128
_FEW_ROWS = 16  # Texts that are read at a time: their logits take memory.
_MOST_SCORED = 256
# A backward pass takes twice as long as a forward pass. With a KL term, the reference adds one.
_PASSES_OF_LEARNING = 3


@dataclass(frozen=True)
class FirstLook:
    """Completions of the model before training.

    Attributes:
        speed: of sampling and learning.
        prompts: of the completions, encoded.
        rows: the row of the prompt of each completion.
        completions: token ids.
        end_ids: EOS ids.
        tokenizer: has encoded the prompts, and decodes the completions.
    """

    speed: Speed
    prompts: Prompts
    rows: list[int]
    completions: list[list[int]]
    end_ids: list[int]
    tokenizer: PreTrainedTokenizerBase

    def spread(self, scorer: Scorer, args: QuarkConfig) -> RewardSpread | None:
        """Score the completions, and return the spread of their rewards; None if all are missing.

        Raises:
            UserError: a reward failed.
        """
        rows, completions = self.rows[:_MOST_SCORED], self.completions[:_MOST_SCORED]
        called = CompletionScorer(scorer, self.tokenizer, self.end_ids, keep_special_tokens=args.keep_special_tokens)
        rewards = called.score(self.prompts, rows, completions).rewards
        return spread_of(rewards, scorer.attributes, args.reward_ceiling)


def take_first_look(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, args: QuarkConfig
) -> FirstLook | None:
    """Sample some completions and read them again; no weight, file or random state changes.

    How many depends on the model and the options, not on the machine, so that what follows from them does not either.

    Args:
        model: the model before training. It is moved to the device of the run.
        tokenizer: encodes the prompts.
        prompts: of the run.
        args: its options.

    Returns:
        None if no prompt can be encoded.
    """
    limit_onednn_caches()  # Before the first product of the process.
    tokenizer = for_encoder(tokenizer) if is_encoder_decoder(model) else tokenizer
    limit, on_gpu = longest_prompt(model, args.max_completion_length), args.device.type == "cuda"
    count = _count_completions(model.num_parameters(), args.max_completion_length, on_gpu)
    encoded = prompts.first(count).encode(
        tokenizer, max_length=limit, skip_bad=True, allow_none=True, in_template=args.raw is False
    )
    if not len(encoded):
        return None
    model.to(args.device)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    end_ids = eos_ids(model, tokenizer, vocab_size)

    def sample(rows: Sequence[int], seed: int) -> list[list[int]]:
        ids = [encoded.ids[row] for row in rows]
        return complete(model, ids, args.sampling(0), end_ids=end_ids, vocab_size=vocab_size, seed=seed)

    rows, completions = [i % len(encoded) for i in range(count)], []
    batch = _ON_GPU if on_gpu else _BATCH
    with eval_mode(model), torch.no_grad(), _autocast(args):
        warm_up = rows[:_WARM_UP]
        _read(model, encoded, warm_up, sample(warm_up, args.seed), args)
        start = time.perf_counter()
        for first in range(0, count, batch):
            completions += sample(rows[first : first + batch], args.seed + first)
        sampled = time.perf_counter()
        few = _read(model, encoded, rows, completions, args)
        read = time.perf_counter() - sampled
    passes = _PASSES_OF_LEARNING + bool(args.kl_coef) + (2 * (_PASSES_OF_LEARNING + 1) if args.dpo_coef else 0)
    speed = Speed((sampled - start) / count, passes * read / few)
    return FirstLook(speed, encoded, rows, completions, list(end_ids), tokenizer)


def spread_of(rewards: np.ndarray, attributes: Sequence[str], ceiling: float | None = None) -> RewardSpread | None:
    """Return how many quantiles the rewards fill; None without a reward.

    Args:
        rewards: `(n, A)`, NaN where a reward is missing.
        attributes: the A names.
        ceiling: larger rewards count as equal to it.
    """
    rewards = rewards[np.isfinite(rewards).all(axis=1)]
    if not len(rewards):
        return None
    spreads = [
        _spread_of_one(column, name, ceiling) for column, name in zip(rewards.T, attributes, strict=True)
    ]  # The attributes have as many quantiles as the coarsest fills.
    return min(spreads, key=lambda spread: (spread.num_quantiles, spread.least_share))


def spread_of_columns(scored: Prompts, args: QuarkConfig) -> RewardSpread | None:
    """Return the spread of the rewards of scored samples; None if a column holds other values, which raises later."""
    names = args.reward_columns or ["reward"]
    try:
        rewards = np.array([scored.columns[name] for name in names], dtype=float).T
    except (KeyError, TypeError, ValueError):
        return None
    if args.condition_on == "sum":
        rewards, names = rewards @ np.array(args.reward_weights or [1.0] * len(names))[:, None], ["reward"]
    return spread_of(rewards, names, args.reward_ceiling)


def _spread_of_one(rewards: np.ndarray, name: str, ceiling: float | None) -> RewardSpread:
    capped = rewards if ceiling is None else np.minimum(rewards, ceiling)
    values, times = np.unique(capped, return_counts=True)
    common, n = times.argmax(), len(rewards)
    seen = f"{times[common] / n:.0%} of {n} first samples share the {name} {values[common]:g}"
    if len(values) == 1:
        return RewardSpread(2, 1 / (n + 2), f"all {n} first samples have the {name} {values[0]:g}", is_constant=True)
    for count in range(RewardSpread.MOST, 1, -1):
        edges = find_edges(rewards, count, ceiling)
        sizes = np.bincount(np.searchsorted(edges, rewards, side="right"), minlength=count)
        if sizes.min() > 0:
            break
    return RewardSpread(count, (sizes.min() + 1) / (n + 2), seen)


def _count_completions(parameters: float, length: int, on_gpu: bool) -> int:
    """Return how many completions to sample: fewer of a large model, and of long ones."""
    if on_gpu:
        return _ON_GPU
    most = _OF_SMALL if parameters < _SMALL_MODEL else _OF_LARGE
    return max(min(most, most * _TOKENS // length), _LEAST)


def _read(
    model: Any, prompts: Prompts, rows: Sequence[int], completions: Sequence[Sequence[int]], args: QuarkConfig
) -> int:
    """Read a few completions behind their prompts, and return their number."""
    batch = build_batch([prompts.ids[row] for row in rows[:_FEW_ROWS]], completions[:_FEW_ROWS])
    completion_logits(model, **{name: tensor.to(args.device) for name, tensor in batch.items()})
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return len(batch["labels"])


def _autocast(args: QuarkConfig) -> Any:
    return torch.autocast(args.device.type, torch.bfloat16) if args.bf16 else nullcontext()
