"""A `transformers.Trainer` that stops anywhere and goes on to the same bits.

`Trainer` resumes weights, optimizer, schedule and random generators. Added here: a checkpoint appears whole or not at
all and holds no pickle; sums between two logs, the control flags and β, α are part of it; `metrics.jsonl` goes back to
where it was; SIGTERM and Ctrl-C are granted between batches. What is Quark's own, pool and explorations, is in
`trainer.py` and `rollout.py`.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from quarkrl.algorithm.coefficients import Coefficients
from quarkrl.algorithm.pool import DataPool
from quarkrl.errors import UserError
from quarkrl.rewards.scorer import Scorer, Scores
from quarkrl.runs import checkpoints
from quarkrl.runs import directory as rundir
from quarkrl.runs.checkpoints import load_state, save_state, states_path
from quarkrl.runs.fsdp import ShardedTrainer
from quarkrl.runs.interrupts import Interrupts, Stopped
from quarkrl.storage.atomic import replace_directory, report_write_errors
from quarkrl.training import overlap as processes
from quarkrl.training.exploration import FinishedBatches, Rollout, ask_again, batches_left, side_by_side
from quarkrl.training.health import Health
from quarkrl.training.metrics_log import LossMeans, MetricsFile
from quarkrl.training.progress import Progress

# Where checkpoints are made; no name that `Trainer` takes for a checkpoint.
_STAGE = "_saving.tmp"


class ResumableTrainer(ShardedTrainer):
    """What `QuarkTrainer` is to `Trainer` when it comes to stopping and going on.

    Attributes:
        interrupts: the signals that ask for a stop.
        stopping: all processes have agreed to stop.
    """

    identity: rundir.RunIdentity
    pool: DataPool
    coefs: Coefficients
    health: Health
    progress: Progress
    scorer: Scorer
    metrics_file: MetricsFile
    _learned: LossMeans

    def __init__(self, *args: Any, **kwargs: Any):
        self.interrupts = Interrupts()
        self.stopping = False
        self._staging = False
        self._resumed: dict[str, Any] = {}  # The process's own state, as the checkpoint has it.
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, in a run directory of its own.

        Args:
            resume_from_checkpoint: True goes on with the run in `output_dir`, from its last good checkpoint or, where
                there is none yet, from the samples it has; a checkpoint's directory, from there.

        Raises:
            UserError: the directory holds another run, or one that cannot be gone on with; another process holds it;
                the disk does not take what is to be saved.
            Stopped: a signal asked for it, and all is saved.
        """
        directory = Path(self.args.output_dir)
        with ExitStack() as stack:
            opened: Any = None
            if self.is_world_process_zero():
                try:
                    stack.enter_context(rundir.locked(directory))
                    opened = rundir.opened(directory, self.identity, resume_from_checkpoint)
                except UserError as error:
                    opened = error  # To be raised by all.
            opened = self.agreed(opened)
            if isinstance(opened, UserError):
                raise opened
            checkpoint, notes, self._branches = opened
            self._resumed = {} if checkpoint is None else processes.own_state(checkpoint, *self._process)
            self._notes = notes if resume_from_checkpoint else None
            stack.enter_context(self.interrupts.watched())
            self.stopping = False
            try:
                return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except Stopped:
                here = directory / f"checkpoint-{self.state.global_step}"
                if self.state.global_step and (self.control.should_evaluate or not here.exists()):
                    self._save_checkpoint(self.model, None)
                raise

    # Stopping.

    def agree_to_stop(self) -> bool:
        """Whether any process has been asked to stop; all of them must ask at the same point."""
        asked = torch.tensor(float(self.interrupts.pending()), device=self.args.device)
        self.stopping = bool(self.accelerator.reduce(asked) if self.args.world_size > 1 else asked)
        return self.stopping

    def stop(self) -> None:
        """End the run.

        Raises:
            Stopped: always.
        """
        number = self.interrupts.asked or 15
        step, each = self.state.global_step, self.args.steps_per_iteration
        name = {2: "Ctrl-C", 15: "SIGTERM"}[number]
        raise Stopped(
            f"stopped by {name} in iteration {step // each} after step {step}, all saved; go on with: "
            f"quarkrl train --resume --output_dir {self.args.output_dir}",
            number,
        )

    @property
    def _process(self) -> tuple[int, int]:
        """Which process this is, and of how many."""
        return self.args.process_index, self.args.world_size

    def agreed(self, value: Any) -> Any:
        """The first process's value, in all processes."""
        if self.args.world_size == 1:
            return value
        return broadcast_object_list([value])[0]

    # Exploring.

    def in_batches(
        self,
        sample: Callable[[slice], list[list[int]]],
        score: Callable[[list[int], list[list[int]]], Scores],
        rows: list[int],
        batch_size: int,
        finished: FinishedBatches | None,
    ) -> Rollout:
        """Sample and score what is not finished yet; each process takes its share of the batches, all get the whole.

        Args:
            sample: completes the rows of a slice.
            score: scores completions of the prompts in the given rows.
            rows: of the prompts, for the whole rollout.
            batch_size: completions at a time.
            finished: where finished batches are kept; None keeps none.

        Raises:
            Stopped: a signal asked for it; the batches that had begun are finished.
        """
        done = finished.load(rows) if finished and self.is_world_process_zero() else []
        left = batches_left(len(rows), batch_size, done)
        for part in done:
            self.progress.sampled(len(part.rows))
            self.progress.scored(part.rewards)
        if finished and not left:
            ask_again(done, score, self.args.max_unscored_share, finished.keep)
        keep = finished.keep if finished and self.is_world_process_zero() else None
        asked = self.interrupts.pending

        def scored(batch: slice, completions: list[list[int]]) -> Scores:
            return score(rows[batch], completions)

        if self.args.world_size == 1:
            done += side_by_side(sample, scored, rows, left, self.scorer.stop, keep, asked)
        else:
            done, left = self.agreed((done, left))
            along = sample if self.is_fsdp_enabled else None
            rounds = processes.Rounds(left, *self._process, scored, keep, asked, along)
            done += rounds.side_by_side(sample, rows, self.scorer.stop)
        if self.agree_to_stop():
            self.stop()
        return Rollout.join(done)

    def recalled(self, directory: Path, iteration: int) -> dict[str, Any] | None:
        """`DataPool.restore_iteration` in all processes.

        Raises:
            UserError: they have not all read the same.
        """
        figures = self.pool.restore_iteration(directory, iteration)
        if self.args.world_size > 1:
            processes.same_pool(self.pool, directory)
        return figures

    # Saving.

    def _get_output_dir(self, trial: Any) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, _STAGE) if self._staging else directory

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As `Trainer`'s, in a directory beside, which takes its name when it is whole and on the disk."""
        directory, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        stage = directory / _STAGE
        if self.is_world_process_zero():
            shutil.rmtree(stage, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._staging = True
        try:
            with report_write_errors(directory / name):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                self._point_at_best(staged=name)
                if self.is_world_process_zero():
                    self.state.save_to_json(str(stage / name / "trainer_state.json"))
                    self.metrics_file.sync()
                    checkpoints.seal(stage / name)
                    replace_directory(stage / name, directory / name)
        finally:
            self._staging = False
            self.args.save_total_limit = limit
            if self.is_world_process_zero():
                shutil.rmtree(stage, ignore_errors=True)
        if self.is_world_process_zero():
            self._rotate(name)
        self.accelerator.wait_for_everyone()

    def _rotate(self, name: str) -> None:
        """Keep `save_total_limit` checkpoints, the given one and the best among them in any case."""
        directory, best = Path(self.args.output_dir), self.state.best_model_checkpoint
        checkpoints.rotate(directory, self.args.save_total_limit, {directory / name, Path(best or name)})

    def _point_at_best(self, staged: str | None = None) -> None:
        """The best checkpoint is in the run's directory, wherever that was when it was saved."""
        name = f"checkpoint-{self.state.best_global_step}"
        best = Path(self.args.output_dir) / name
        if self.state.best_global_step and (best.is_dir() or name == staged):
            self.state.best_model_checkpoint = str(best)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # A pickle, which nothing reads; config.yaml, run.json and quark.json say what is in it.
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # It has formats of its own, sharded.
            return super()._save_optimizer_and_scheduler(output_dir)
        state = self.optimizer_state()
        if self.args.should_save:
            save_state(states_path(output_dir, "optimizer"), state)
            save_state(states_path(output_dir, "scheduler"), self.lr_scheduler.state_dict())
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            self.load_optimizer_state(lambda: checkpoints.read_optimizer(self.optimizer, checkpoint, self._branches))
            checkpoints.load_schedule(self.optimizer, self.lr_scheduler, checkpoint, self._branches)

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(states_path(output_dir, "scaler"), scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint is not None and states_path(checkpoint, "scaler").exists():
            scaler.load_state_dict(load_state(states_path(checkpoint, "scaler")))

    def _save_rng_state(self, output_dir: str) -> None:
        """What this process has for itself: its random generators, its sums since the last log, what is due."""
        early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        state = {
            "random": checkpoints.random_states(),
            "loss": (float(self._tr_loss), self._total_loss_scalar, self._globalstep_last_logged),
            "learned": self._learned.state,
            "coefs": (self.coefs.kl_coef, self.coefs.entropy_coef),
            "health": self.health.state,
            "stopped": early,
            "due": {"evaluate": self.control.should_evaluate, "save": self.control.should_save},
            "metrics_bytes": self.metrics_file.size,
        }
        for number, each in enumerate(gather_object([state])):
            if self.args.should_save:
                save_state(states_path(output_dir, f"process-{number}"), each)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if "random" in self._resumed:
            checkpoints.set_random_states(self._resumed["random"])

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As `Trainer`'s; that tied weights are in a file once is no news."""
        tied = set(getattr(self.accelerator.unwrap_model(self.model), "_tied_weights_keys", None) or ())
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    # The loop.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; the last row's mean loss is that of the whole run, not of what was resumed of it."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # It has stopped early before, and only the end is missing.
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s, without removing the last checkpoint: final/ is not yet on the disk.

        The losses since the last log are those of all processes, as they are in every log.
        """
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")  # type: ignore[has-type]
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit


def _read_pool(trainer: Any, step: int) -> None:
    """Read the samples that a run had at a step, and cut them as they were cut."""
    begun = -(-step // trainer.args.steps_per_iteration)  # Iterations whose learning had begun.
    pool, directory = trainer.pool, trainer.pool_directory
    trainer.pool = pool.load(directory, pool.num_quantiles, pool.attributes, before=begun)
    if missing := set(range(begun)) - set(trainer.pool.iterations.tolist()):
        raise UserError(f"{directory} lacks iteration {min(missing)}: to resume, want the run's whole pool")
    if begun:
        trainer.quantize(begun - 1)


def _restored(trainer: Any) -> str:
    """What a resumed run goes on from, in one line."""
    args, step, last = trainer.args, trainer.state.global_step, trainer.args.num_iterations - 1
    each = args.steps_per_iteration
    where = f"iteration {min(step // each, last)}/{last}, step {step}/{trainer.state.max_steps}"
    where = where if step else "the beginning (no checkpoint yet)"
    found = [f"resumed {args.output_dir} from {where}", f"pool {len(trainer.pool):,} samples"]
    if later := len(list(trainer.pool_directory.glob("iteration-*"))) - len(set(trainer.pool.iterations.tolist())):
        found.append(f"{later} explored after that")
    partial = trainer.pool_directory / f"partial-{step // each:06d}"
    if count := len(list(partial.glob("*.parquet"))):
        found.append(f"{count:,} batches of the exploration at hand")
    if (cached := trainer.scorer.cache_size) is not None:
        found.append(f"{cached:,} scores in cache")
    return ", ".join(found)


class Resumption(TrainerCallback):
    """Puts back what `Trainer` does not, and sees that a checkpoint is never amid an iteration's end."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._due = False

    def on_train_begin(self, args, state, control, **_):
        trainer = self.trainer
        self._due = False
        if trainer._notes is None:
            return
        found = trainer._resumed
        if state.is_world_process_zero:
            trainer.metrics_file.cut(found.get("metrics_bytes", 0), state.log_history)
        _read_pool(trainer, state.global_step)
        if state.is_world_process_zero:
            trainer.progress.note("; ".join([_restored(trainer), *trainer._notes]))
        if not state.global_step:
            return
        trainer._point_at_best()
        if state.is_world_process_zero:  # Stopped, perhaps, before it had rotated.
            trainer._rotate(f"checkpoint-{state.global_step}")
        trainer._load_rng_state(None)
        args.eval_on_start = False  # It has been.
        loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = found["loss"]
        trainer._tr_loss += loss
        trainer._learned.state = found["learned"]
        trainer.coefs = replace(trainer.coefs, kl_coef=found["coefs"][0], entropy_coef=found["coefs"][1])
        trainer.health.state = found["health"]
        control.should_training_stop = found["stopped"]
        if found["due"]["evaluate"]:  # Stopped while evaluating.
            control.should_evaluate, control.should_save = True, found["due"]["save"]
            loss, model = trainer._tr_loss, trainer.model
            trainer._maybe_log_save_evaluate(loss, None, model, None, state.epoch, None, time.time())

    # After an iteration's last step come its log and its evaluation: a save that is due waits for them.

    def on_step_end(self, args, state, control, **_):
        if self.trainer.agree_to_stop():
            control.should_save = True
        if control.should_save and state.global_step % args.steps_per_iteration == 0:
            control.should_save, self._due = False, True

    def on_epoch_end(self, args, state, control, **_):
        control.should_save |= self._due
        self._due = False

    def on_save(self, args, state, control, **_):
        if self.trainer.stopping:
            self.trainer.stop()
