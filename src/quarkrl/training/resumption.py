"""What a resumed run restores of Quark: the state of a process, the pool, and a line that says where it resumes."""

import os
import shutil
import zlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from quarkrl.algorithm.coefficients import Coefficients
from quarkrl.algorithm.pool import DataPool
from quarkrl.errors import UserError
from quarkrl.training.config import QuarkConfig
from quarkrl.training.health import Health
from quarkrl.training.metrics_log import LossMeans


def collect_state(loss_means: LossMeans, coefs: Coefficients, health: Health, metrics_bytes: int) -> dict[str, Any]:
    """Return what a resumed run needs of this process, beside the pool."""
    return {
        "learned": loss_means.state,
        "coefs": (coefs.kl_coef, coefs.entropy_coef),
        "health": health.state,
        "metrics_bytes": metrics_bytes,
    }


def restore_state(
    state: dict[str, Any], loss_means: LossMeans, coefs: Coefficients, health: Health, changed: Collection[str]
) -> Coefficients:
    """Restore the sums of the loss and the counters of its checks; return β and α.

    β and α are restored where they have adapted, except those whose option has changed since.

    Args:
        state: what `collect_state` returned.
        loss_means, health: receive their part.
        coefs: β and α of the options.
        changed: the names of options that differ from those of the run that this one branches off from.
    """
    loss_means.state, health.state = state["learned"], state["health"]
    saved: dict[str, Any] = {}
    if coefs.kl_target is not None and "kl_coef" not in changed:
        saved["kl_coef"] = state["coefs"][0]
    if coefs.entropy_target is not None and "entropy_coef" not in changed:
        saved["entropy_coef"] = state["coefs"][1]
    return replace(coefs, **saved)


def merge_states(states: list[dict[str, Any]], is_first: bool) -> dict[str, Any]:
    """Return a process's state where another number of processes saved it: the first takes over their sums."""
    learned = [sum(values) for values in zip(*(state["learned"] for state in states), strict=True)]
    entropy = sum(state["health"]["entropy"] for state in states)
    if not is_first:
        learned, entropy = [0.0] * len(learned), torch.zeros_like(entropy)
    return {**states[0], "learned": learned, "health": {**states[0]["health"], "entropy": entropy}}


def load_pool(pool: DataPool, directory: Path, iteration_count: int) -> DataPool:
    """Read the samples of the first iterations of a run.

    Args:
        pool: an empty pool of the run's quantiles and attributes.
        directory: the run's `pool/`.
        iteration_count: how many iterations.

    Raises:
        UserError: one of them is missing.
    """
    loaded = pool.load(directory, pool.num_quantiles, pool.attributes, before=iteration_count)
    if missing := set(range(iteration_count)) - set(loaded.iterations.tolist()):
        raise UserError(
            f"{directory}: iteration-{min(missing):06d}.parquet is missing. Restore the run's whole pool to resume."
        )
    return loaded


def count_begun_iterations(step: int, steps_per_iteration: int) -> int:
    """Return the number of iterations whose learning had begun at a step."""
    return -(-step // steps_per_iteration)


def count_iterations(step: int, explores: bool, args: QuarkConfig) -> tuple[int, int]:
    """Return the number of iterations of Quark that had begun at a step, and of those that explored.

    Distillation explores nothing, and neither does a run on scored data alone after its first iteration.
    """
    count = min(count_begun_iterations(step, args.steps_per_iteration), args.num_iterations)
    return count, count if explores else min(count, 1)


def set_aside_later_files(run: Path, step: int, steps_per_iteration: int, aside: Path) -> None:
    """Move what a run has written after a step, beside checkpoints, into the folder `aside`.

    These are the samples of later iterations and `final/`. `metrics.jsonl` is copied, because the run that branches off
    truncates it.
    """
    iteration_count = count_begun_iterations(step, steps_per_iteration)
    for path in (run / "pool").glob("*-[0-9][0-9][0-9][0-9][0-9][0-9]*"):
        if int(path.stem.rpartition("-")[2]) >= iteration_count:
            os.rename(path, aside / path.name)
    if (run / "metrics.jsonl").exists():
        shutil.copy2(run / "metrics.jsonl", aside)
    if (run / "final").exists():
        os.rename(run / "final", aside / "final")


def describe(args: QuarkConfig, step: int, pool: DataPool, directory: Path, cached: int | None) -> str:
    """Return one line that says where a run resumes, and what it finds.

    Args:
        args: the run's options.
        step: optimizer steps so far; 0 if there is no checkpoint.
        pool: the samples as of that step.
        directory: the run's `pool/`.
        cached: the number of scores in the cache; None if there is no cache.
    """
    iteration, total = step // args.steps_per_iteration, args.total_iterations
    where = "the beginning (no checkpoint yet)"
    if step:
        max_steps = args.total_iterations * args.steps_per_iteration
        where = f"iteration {min(iteration + 1, total)}/{total}, step {step}/{max_steps}"
    facts = [f"resumed {args.output_dir} from {where}", f"pool {len(pool):,} samples"]
    explored = len(list(directory.glob("iteration-*")))
    if later := explored - len(set(pool.iterations.tolist())):
        facts.append(f"{later} later {'iteration' if later == 1 else 'iterations'} on disk")
    if count := len(list((directory / f"partial-{explored:06d}").glob("*.parquet"))):
        facts.append(f"{count:,} {'batch' if count == 1 else 'batches'} of the next iteration on disk")
    if cached is not None:
        facts.append(f"{cached:,} scores in cache")
    return ", ".join(facts)


def recall_iteration(pool: DataPool, directory: Path, iteration: int, world_size: int) -> dict[str, Any] | None:
    """Add an iteration's samples from disk to the pool; return its metrics, or None if it is not on disk.

    Raises:
        UserError: the file is damaged, or the processes have read different samples.
    """
    metrics = pool.restore_iteration(directory, iteration)
    if world_size > 1:
        check_same_pool(pool, directory)
    return metrics


def check_same_pool(pool: DataPool, directory: Path) -> None:
    """Check that all processes have read the same samples.

    Raises:
        UserError: they have not; every process raises it.
    """
    contents = gather_object([(len(pool), zlib.crc32(pool.rewards.tobytes()))])
    if len(set(contents)) > 1:
        counts = ", ".join(str(count) for count, _ in contents)
        raise UserError(
            f"output_dir: the processes read different samples from {str(directory)!r} ({counts}). "
            "Use an output_dir that all machines share."
        )
