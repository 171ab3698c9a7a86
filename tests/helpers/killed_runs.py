"""Small runs in processes of their own, killed by SIGKILL at a chosen function, and comparisons of what they leave."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import eight_letters
from helpers.files import files_of
from helpers.runs import distinct_rewards, model_of, read_metrics, small_trainer

PROMPTS = [*eight_letters.PROMPTS, "c c", "a", "h g", "b b b"]
# Checkpoints within iterations and at their ends, logs between checkpoints, adaptive β and α, and dropout.
RUN = {
    "num_quantiles": 3,
    "num_iterations": 3,
    "steps_per_iteration": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 5,
    "min_completion_length": 1,
    "generation_batch_size": 5,
    "learning_rate": 1e-3,
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "eval_strategy": "epoch",
    "kl_target": 1e-3,
    "entropy_target": 100.0,
    "coef_horizon": 100,
    "disable_tqdm": False,
    "seed": 42,
    "use_cpu": True,
    "report_to": "none",
}
# Overrides RUN: two iterations with a checkpoint after each.
SHORT = {"num_iterations": 2, "steps_per_iteration": 2, "save_strategy": "epoch", "logging_steps": 1}
# Durations in rows of metrics.jsonl, which differ between equal runs.
CLOCKS = (
    *("seconds_sample", "seconds_score", "train_runtime", "train_samples_per_second", "train_steps_per_second"),
    *("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
)


def reward(completion_ids, scored: str | None = None, **_):
    """`distinct_rewards`, but None for completions that begin with "h"; the file `scored` lists what was scored."""
    if scored is not None:
        with open(scored, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(ids) + "\n" for ids in completion_ids))
    rewards = distinct_rewards(completion_ids)
    return [None if ids[0] == 7 else value for ids, value in zip(completion_ids, rewards, strict=True)]


def trainer_of(directory: Path, scorer=None, model=None, **options):
    """A trainer of `RUN` with overrides; `directory.scored` lists the completions that its own reward has scored."""

    def listed(completion_ids):
        return reward(completion_ids, scored=f"{directory}.scored")

    options = {**RUN, **options}
    if options["eval_strategy"] != "no":
        options["eval_dataset"] = PROMPTS[:3]
    prompts = options.pop("prompts", PROMPTS)
    return small_trainer(directory, scorer or listed, model or model_of(), prompts, **options)


# Where to kill.


class Trap:
    """Counts the calls of functions, and sends a signal to the process at one of them.

    Args:
        at: `module:name` or `module:Class.name`, as the caller looks it up; None only counts.
        when: before, after or amid. Amid: the function's file is half written.
        call: the number of the call, from 1.
        number: the signal. After any signal except SIGKILL, the call continues.
    """

    # One or two functions for each phase of a run.
    places = (
        *("quarkrl.sampling.engine:sample", "quarkrl.training.exploration:CompletionScorer.score"),
        *("quarkrl.training.rollout:FinishedBatches.keep", "quarkrl.training.rollout:FinishedBatches.clear"),
        *(
            "quarkrl.storage.parquet:pq.write_table",
            "quarkrl.storage.atomic:os.replace",
            "quarkrl.storage.atomic:os.rename",
        ),
        *(
            "quarkrl.algorithm.pool:DataPool.save",
            "quarkrl.algorithm.pool:DataPool.quantize",
            "quarkrl.algorithm.pool:DataPool.draw",
        ),
        *("quarkrl.training.trainer:QuarkTrainer.compute_loss", "quarkrl.training.trainer:QuarkTrainer.adapt"),
        *("quarkrl.training.trainer:QuarkTrainer.evaluate", "quarkrl.training.metrics_log:MetricsFile.on_log"),
        *("quarkrl.runs.durable_trainer:DurableTrainer._save_checkpoint", "quarkrl.runs.states:save_file"),
        *(
            "quarkrl.runs.checkpoints:seal",
            "quarkrl.runs.checkpoints:remove_directory",
            "quarkrl.runs.durable_trainer:replace_directory",
        ),
        "quarkrl.training.trainer:save_steered",
    )

    def __init__(self, at: str | None = None, when: str = "before", call: int = 1, number: int = signal.SIGKILL):
        self.at, self.when, self.call, self.number = at, when, call, number
        self.calls: Counter[str] = Counter()

    def set(self) -> None:
        for place in self.places:
            module, _, path = place.partition(":")
            *owners, name = path.split(".")
            owner: Any = importlib.import_module(module)
            for step in owners:
                owner = getattr(owner, step)
            setattr(owner, name, self._watched(place, getattr(owner, name)))

    def _watched(self, place: str, function: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls[place] += 1
            due = place == self.at and self.calls[place] == self.call
            if due and self.when == "amid":
                AMID[place](function, *args, **kwargs)
            if due and self.when != "after":
                self._spring()
            result = function(*args, **kwargs)
            if due and self.when == "after":
                self._spring()
            return result

        return watched

    def _spring(self) -> None:
        os.kill(os.getpid(), self.number)
        if self.number == signal.SIGKILL:
            threading.Event().wait()  # The signal arrives during this wait.


def _half_a_table(write, table, file, **kwargs):
    whole = io.BytesIO()
    write(table, whole, **kwargs)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()


def _half_a_state(save, tensors, path, **kwargs):
    save(tensors, path, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)


def _half_a_row(_log, metrics, *_args, **_kwargs):
    with open(metrics.path, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "los')


def _half_a_removal(_remove, directory):
    for path in [path for path in sorted(directory.rglob("*")) if path.is_file()][::2]:
        path.unlink()


AMID = {
    "quarkrl.storage.parquet:pq.write_table": _half_a_table,
    "quarkrl.runs.states:save_file": _half_a_state,
    "quarkrl.training.metrics_log:MetricsFile.on_log": _half_a_row,
}


# Processes. Each is forked from a server that has already done the slow imports.


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["quarkrl.training.trainer", "quarkrl.cli.main", "transformers.models.gpt2.modeling_gpt2"]
    )
    return context


def in_a_process(target: Callable, *args: Any) -> tuple[int | None, str]:
    """Call `target(*args)` in a process; return its exit code (negative for a signal, None if it hung) and output."""
    process = started(target, *args)
    process.join(120)
    if process.is_alive():
        process.kill()
        return None, Path(process.log).read_text(encoding="utf-8")
    return process.exitcode, Path(process.log).read_text(encoding="utf-8")


def started(target: Callable, *args: Any):
    """Start `target(*args)` in a process and return it; the path of its output is `.log`."""
    log = f"{args[0]}.log"
    os.environ["OMP_NUM_THREADS"] = "1"  # The server takes its environment from here, before it imports torch.
    process = _server().Process(target=_begin, args=(log, target, args))
    process.log = log
    process.start()
    return process


def _begin(log: str, target: Callable, args: tuple) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    torch.set_num_threads(1)
    gc.freeze()  # Otherwise each collection walks the imported modules, for a third of a second.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    sys.exit(target(*args) or 0)


def run(directory: Path, resume: bool = False, trap: Trap | None = None, options: dict | None = None) -> None:
    """Do a whole run, and write the number of calls of each place of `Trap` to `directory.calls`."""
    trap = trap or Trap()
    trainer = trainer_of(directory, **{**(options or {}), "disable_tqdm": True})
    trap.set()  # After the trainer, which tries to save its model: only the calls of the run count.
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_final()
    Path(f"{directory}.calls").write_text(json.dumps(trap.calls), encoding="utf-8")


def short_run(directory: Path) -> Path:
    """Do a run of `SHORT` in a process of its own; return its directory."""
    code, said = in_a_process(run, directory, False, None, SHORT)
    assert code == 0, said
    return directory


def command(directory: Path, argv: list[str], trap: Trap | None = None) -> int:
    """Run `quarkrl` with arguments. `directory` only places the log: `directory.log`."""
    from quarkrl.cli.main import main

    (trap or Trap()).set()
    return main(list(map(str, argv)))


def impatient_command(directory: Path, argv: list[str]) -> None:
    """Run `quarkrl` as a process of its own does, but give up threads and child processes of rewards sooner."""
    from quarkrl.cli import main
    from quarkrl.rewards import giving_up

    main._EXIT_SECONDS = giving_up.FROZEN_SECONDS = 0.5
    sys.argv = ["quarkrl", *map(str, argv)]
    main.command()


# Comparisons.


def metrics_of(directory: Path) -> list[dict]:
    """Return the rows of `metrics.jsonl` without durations."""
    return [{name: row[name] for name in row if name not in CLOCKS} for row in read_metrics(directory)]


def assert_same_run(found: Path, expected: Path) -> None:
    """Check equality to the bit: the same files, samples, metrics, weights, and states of optimizer and generators."""
    from quarkrl.storage.parquet import read_table

    assert files_of(found) == files_of(expected)
    for path in sorted(expected.rglob("*.parquet")):
        (table, notes), (other, others) = read_table(path), read_table(found / path.relative_to(expected))
        assert table.equals(other), path
        assert notes == others
    assert metrics_of(found) == metrics_of(expected)
    for name in sorted(files_of(expected)):
        # The state of a process has the length of metrics.jsonl, which depends on the durations in it.
        if name.endswith(".safetensors") and "process-" not in name:
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
        if "process-" in name:
            from quarkrl.runs.states import load_state

            states = [load_state(directory / name) for directory in (found, expected)]
            for state in states:
                del state["run"]["metrics_bytes"]
            assert_same(*states)
    with contextlib.suppress(FileNotFoundError):
        facts = [json.loads((directory / "final/quark.json").read_text()) for directory in (found, expected)]
        assert facts[0].pop("config") is not None and facts[1].pop("config") is not None
        assert facts[0] == facts[1]


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    else:
        assert found == expected
