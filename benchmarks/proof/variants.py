"""Variants of the method that have no option: `quarkrl` with one of its parts replaced.

    python benchmarks/proof/variants.py best_only train --model builtin …      # then as the command

They show what the parts are worth (docs/ablations.md). What helps becomes an option; what does not stays here.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from quarkrl.algorithm.pool import DataPool, find_edges
from quarkrl.cli.main import main
from quarkrl.models.batching import build_batch
from quarkrl.models.head_access import completion_projection
from quarkrl.training.collation import Collator
from quarkrl.training.distillation import Teacher
from quarkrl.training.trainer import QuarkTrainer

WINDOW = 5  # iterations
MIXED_EVERY = 5  # iterations
EMA_DECAY = 0.95  # per optimizer step
MAX_CREDIT = 3.0  # times the mean


def best_only() -> None:
    """Learn from samples of the best quantile alone, as AlpacaFarm's variant and the paper's ablation do."""

    def draw(pool: DataPool, n: int, rng: np.random.Generator, *, balanced: bool = False) -> np.ndarray:
        return rng.choice(np.flatnonzero(pool.quantiles[:, 0] == pool.num_quantiles - 1), size=n)

    DataPool.draw = draw


def random_tokens() -> None:
    """Mark samples with random quantiles, as the paper's ablation does."""
    quantize = DataPool.quantize

    def shuffled(pool: DataPool, ceiling: float | None = None) -> None:
        quantize(pool, ceiling)
        pool.quantiles[:] = np.random.default_rng(len(pool)).permutation(pool.quantiles)

    DataPool.quantize = shuffled


def window() -> None:
    """Quantize and draw the samples of the last iterations alone."""
    quantize = DataPool.quantize

    def recent(pool: DataPool) -> np.ndarray:
        return np.flatnonzero(pool.iterations > pool.iterations.max() - WINDOW)

    def quantize_recent(pool: DataPool, ceiling: float | None = None) -> None:
        quantize(pool, ceiling)
        edges = find_edges(pool.rewards[recent(pool), 0], pool.num_quantiles, ceiling)
        pool.quantiles[:, 0] = np.searchsorted(edges, pool.rewards[:, 0], side="right")

    def draw(pool: DataPool, n: int, rng: np.random.Generator, *, balanced: bool = False) -> np.ndarray:
        return rng.choice(recent(pool), size=n)

    DataPool.quantize, DataPool.draw = quantize_recent, draw


def per_prompt() -> None:
    """Rank a sample among those of its prompt, as ALT does, and not among all."""
    quantize = DataPool.quantize

    def within_prompts(pool: DataPool, ceiling: float | None = None) -> None:
        quantize(pool, ceiling)
        groups: dict[bytes, list[int]] = {}
        for index in range(len(pool)):
            groups.setdefault(pool[index].prompt_ids.tobytes(), []).append(index)
        for rows in groups.values():
            ranks = rankdata(pool.rewards[rows, 0], method="max")  # Equal rewards share the highest rank.
            pool.quantiles[rows, 0] = np.ceil(ranks / len(rows) * pool.num_quantiles).astype(int) - 1

    DataPool.quantize = within_prompts


def mixed_exploring() -> None:
    """Explore every fifth iteration on a random quantile, and not on the best."""
    sampler = QuarkTrainer.exploring_sampler

    def mixed(trainer: QuarkTrainer, iteration: int) -> AbstractContextManager[Any]:
        if iteration % MIXED_EVERY != MIXED_EVERY - 1:
            return sampler(trainer, iteration)
        rng, conditioning = np.random.default_rng((trainer.args.seed, iteration, 2)), trainer.conditioning
        quantile = rng.integers(conditioning.num_quantiles)
        prefixes = tuple((*row[:-1], row[quantile]) for row in conditioning.prefixes)  # It stands for the best.
        return replace(trainer.engine, conditioning=replace(conditioning, prefixes=prefixes)).policy(1.0)

    QuarkTrainer.exploring_sampler = mixed


def averaged_weights() -> None:
    """Explore with, and save, the exponential moving average of the weights."""
    end_step, sampler, save = QuarkTrainer.end_step, QuarkTrainer.exploring_sampler, QuarkTrainer.save_final

    def average(trainer: QuarkTrainer) -> None:
        end_step(trainer)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if not hasattr(trainer, "average"):
            trainer.average = Teacher.of(policy, None)
        for name, weight in policy.named_parameters():
            if name in trainer.average.weights:
                trainer.average.weights[name].lerp_(weight.detach(), 1 - EMA_DECAY)

    @contextmanager
    def averaged(trainer: QuarkTrainer) -> Iterator[None]:
        if not hasattr(trainer, "average"):
            yield
            return
        with trainer.average.within(trainer.accelerator.unwrap_model(trainer.model)):
            yield

    @contextmanager
    def explore(trainer: QuarkTrainer, iteration: int) -> Iterator[Any]:
        with averaged(trainer), sampler(trainer, iteration) as complete:
            yield complete

    def save_average(trainer: QuarkTrainer, directory: Any = None) -> Any:
        with averaged(trainer):
            return save(trainer, directory)

    QuarkTrainer.end_step, QuarkTrainer.exploring_sampler, QuarkTrainer.save_final = average, explore, save_average


def token_credit() -> None:
    """Weight the NLL of a token by how far its likelihood differs behind the prefix of the opposite quantile."""
    compute_loss, collate = QuarkTrainer.compute_loss, Collator.__call__

    def with_opposite(collator: Collator, numbers: Any) -> dict[str, Tensor]:
        batch, conditioning = collate(collator, numbers), collator.conditioning
        samples = [collator.samples[int(collator.draws[number])] for number in numbers]
        opposite = [conditioning.num_quantiles - 1 - int(sample.quantiles[0]) for sample in samples]
        prompts = [conditioning.prefix(s.prompt_ids.tolist(), [q]) for s, q in zip(samples, opposite, strict=True)]
        others = build_batch(prompts, [sample.completion_ids.tolist() for sample in samples])
        return batch | {f"opposite_{name}": tensor for name, tensor in others.items()}

    def token_nll(trainer: QuarkTrainer, model: Any, inputs: dict[str, Tensor], name: str = "") -> Tensor:
        rows = inputs[f"{name}input_ids"], inputs[f"{name}attention_mask"], inputs[f"{name}labels"]
        projection = completion_projection(model, *rows, trainer.decide_heads()[0])
        targets = rows[2][rows[2] != -100]
        return torch.nn.functional.cross_entropy(projection.logits().float(), targets, reduction="none")

    def weighted(
        trainer: QuarkTrainer, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        total = compute_loss(trainer, model, inputs, num_items_in_batch=num_items_in_batch)
        nll = token_nll(trainer, model, inputs)
        with torch.no_grad():
            credit = (nll - token_nll(trainer, model, inputs, "opposite_")).abs()
            weights = (credit / credit.mean().clamp(min=1e-6)).clamp(max=MAX_CREDIT)
            weights = weights / weights.mean() - 1
        scale = 1 if num_items_in_batch is None else len(nll) / num_items_in_batch
        return total + (weights * nll).mean() * scale

    Collator.__call__, QuarkTrainer.compute_loss = with_opposite, weighted


VARIANTS = (best_only, random_tokens, window, per_prompt, mixed_exploring, averaged_weights, token_credit)

if __name__ == "__main__":
    {variant.__name__: variant for variant in VARIANTS}[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
