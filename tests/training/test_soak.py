"""A thousand iterations: memory and file handles stay where they are after the first hundreds."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import threading
from pathlib import Path

import psutil
import pytest
from helpers.runs import distinct_rewards, model_of, small_trainer
from transformers import TrainerCallback

ITERATIONS, WARM_UP, WINDOW = 1000, 300, 100
PROMPTS = ["a b", "c", "d e f", "h h"]


class Measure(TrainerCallback):
    """After each iteration: resident memory in bytes, open files, threads, objects that Python tracks."""

    def __init__(self):
        self.rows: list[dict[str, int]] = []
        self.process = psutil.Process()

    def on_epoch_end(self, args, state, control, **_):
        if state.global_step % 10 == 0:
            gc.collect()
            row = {"memory": self.process.memory_info().rss, "files": len(os.listdir("/proc/self/fd"))}
            row |= {"threads": threading.active_count(), "objects": len(gc.get_objects())}
            self.rows.append({"step": state.global_step, **row})


async def distinct_rewards_later(completion_ids, **_):
    return distinct_rewards(completion_ids)


def length(completion_ids):
    return [len(ids) for ids in completion_ids]


def run(directory: str, queue) -> None:
    """Train, in a process of its own whose memory no other test has used; put the measurements into the queue."""
    measure = Measure()
    small_trainer(
        Path(directory),
        [distinct_rewards_later, length],
        model_of(),
        PROMPTS,
        eval_dataset=PROMPTS,
        callbacks=[measure],
        num_quantiles=2,
        num_iterations=ITERATIONS,
        steps_per_iteration=1,
        per_device_train_batch_size=4,
        generation_batch_size=2,
        max_completion_length=4,
        reward_weights=[1.0, 0.5],
        save_strategy="steps",
        save_steps=50,
        eval_strategy="steps",
        eval_steps=50,
        logging_steps=10,
        learning_rate=1e-5,
    ).train()
    queue.put(measure.rows)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_a_thousand_iterations_take_no_more_than_three_hundred(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=run, args=(str(tmp_path), queue))
    process.start()
    rows = queue.get(timeout=400)
    process.join(60)
    assert process.exitcode == 0 and rows[-1]["step"] == ITERATIONS

    def middle(name: str, first: int) -> float:
        return statistics.median(row[name] for row in rows if first < row["step"] <= first + WINDOW)

    early, late = ({n: middle(n, first) for n in rows[0]} for first in (WARM_UP, ITERATIONS - WINDOW))
    assert late["files"] == early["files"] and late["threads"] == early["threads"]
    assert late["memory"] <= 1.05 * early["memory"]
    assert late["objects"] <= early["objects"] + 100  # Of 450,000; one an iteration would be 600 more.
    assert len(list((tmp_path / "pool").glob("iteration-*.parquet"))) == ITERATIONS
