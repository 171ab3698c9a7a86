"""`DurableTrainer`: a `transformers.Trainer` that stops at any time and resumes to the same bits.

`Trainer` restores weights, optimizer, scheduler and random generators. `DurableTrainer` adds:

- a run directory that one process holds, with the run's identity, so that only the same run resumes in it;
- checkpoints that appear complete or not at all, have checksums, and contain no pickle;
- the state of the subclass (`run_state`), the sums between two logs, and what was due when the run stopped;
- SIGTERM and Ctrl-C: the run stops between batches, saves its state and says how to resume;
- sharded weights (FSDP2) with the checkpoints of a single process.

Every private name of `Trainer` that quarkrl overrides or reads stands in this file.
`tests/contract/test_private_names.py` records their signatures and fails by name when transformers changes one.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from quarkrl.errors import UserError
from quarkrl.runs import checkpoints, directory, fsdp
from quarkrl.runs.collectives import call_in_first_process
from quarkrl.runs.gloo_shutdown import register_gloo_shutdown
from quarkrl.runs.interrupts import Interrupts, Stopped
from quarkrl.runs.records import holds_run, resume_call
from quarkrl.runs.states import (
    load_optimizer_state,
    load_state,
    random_states,
    restore_random_states,
    restore_scheduler,
    save_state,
    states_path,
)
from quarkrl.storage.atomic import replace_directory, report_write_errors

# Where checkpoints are written. `Trainer` does not take this name for a checkpoint.
_STAGE = "_saving.tmp"


class EventHooks(TrainerCallback):
    """A callback made of functions. Each is called at the event of its name: `EventHooks(on_step_end=adapt)`."""

    def __init__(self, **hooks: Callable[..., Any]):
        for event, hook in hooks.items():
            if not hasattr(TrainerCallback, event):
                raise TypeError(f"TrainerCallback has no event {event!r}")
            setattr(self, event, hook)


class DurableTrainer(Trainer):
    """A `Trainer` whose runs resume exactly.

    A subclass overrides `run_state`, `restore_run_state` and `merge_run_states` for its own state. For its own files it
    overrides `save_run_files` (beside the weights) and `set_aside_run_files` (in the run directory).

    Args:
        identity: everything that the result of the run depends on.
        steps_per_epoch: optimizer steps in an epoch.
        kwargs: the arguments of `Trainer`.

    Attributes:
        interrupts: the signals that request a stop.
        stopping: whether all processes have agreed to stop.
        changed_options: names of the options that differ from those of the run that this one branches off from.
    """

    def __init__(self, *, identity: directory.RunIdentity, steps_per_epoch: int, **kwargs: Any):
        self.identity, self.steps_per_epoch = identity, steps_per_epoch
        self.interrupts = Interrupts()
        self.stopping = False
        self.changed_options: frozenset[str] = frozenset()
        self._staging = self._has_begun = False
        self._tr_loss: Any
        self._save_is_delayed = False
        self._resumed: dict[str, Any] | None = None  # This process's state in the checkpoint; None in a new run.
        self._resume_notes: list[str] = []
        hooks = EventHooks(
            on_train_begin=self._restore,
            on_epoch_begin=self._begin_epoch,
            on_step_end=self._end_step,
            on_epoch_end=self._save_if_delayed,
            on_save=self._stop_if_agreed,
        )
        super().__init__(callbacks=[hooks, *(kwargs.pop("callbacks", None) or [])], **kwargs)
        fsdp.check_sharding(self.accelerator, has_adapter=hasattr(self.model, "peft_config"))

    # What a subclass overrides.

    def begin_epoch(self, epoch: int) -> None:
        """Prepare the data of an epoch, before its first step. Also called when a run resumes within the epoch."""

    def end_step(self) -> None:
        """React to an optimizer step."""

    def run_state(self) -> dict[str, Any]:
        """Return this process's part of the run's state when a checkpoint is saved (see `states.save_state`)."""
        return {}

    def restore_run_state(self, state: dict[str, Any], notes: list[str]) -> None:
        """Restore what `run_state` returned, when a run resumes and before its first step.

        Args:
            state: empty if the run has no checkpoint yet.
            notes: what the user should know about the resumption.
        """

    def merge_run_states(self, states: list[dict[str, Any]], is_first: bool) -> dict[str, Any]:
        """Return the state of one process when a run resumes with another number of processes.

        Args:
            states: the `run_state` of every process that saved the checkpoint.
            is_first: whether the state is for the first process, which takes over sums over processes.
        """
        return dict(states[0])

    def save_run_files(self, output_dir: Path) -> None:
        """Write the subclass's own files beside saved weights. Only one process calls it."""

    def set_aside_run_files(self, step: int, aside: Path) -> None:
        """Move the subclass's files that were written after a step into a folder. Only one process calls it."""

    def on_models_ready(self) -> None:
        """Prepare models that are not trained, once the trained one is on its device, wrapped and sharded."""

    # Training and stopping.

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, in a run directory that no other process can use meanwhile.

        Args:
            resume_from_checkpoint: True resumes the run in `output_dir` from its last good checkpoint, or from its
                samples if it has no checkpoint yet. A checkpoint's directory resumes from there.

        Raises:
            UserError: the directory holds another run or a damaged one, another process uses it, or the disk does
                not take what is saved. Or the run would start at the beginning with weights that have changed.
            Stopped: a signal requested it, and the run's state is saved.
        """
        run = Path(self.args.output_dir)
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        with ExitStack() as stack:
            checkpoint, self._resume_notes, self.changed_options = self._open(run, resume_from_checkpoint, stack)
            self._resumed = None
            if checkpoint is None and self.state.global_step:
                raise UserError(
                    f"resume_from_checkpoint {resume_from_checkpoint}: must find a checkpoint in {str(run)!r}, because "
                    f"this trainer has already made {self.state.global_step} steps. Create a new trainer."
                )
            if resume_from_checkpoint:
                self._resumed = {} if checkpoint is None else self._load_process_state(checkpoint)
            stack.enter_context(self.interrupts.watched())
            self.stopping = self._has_begun = False
            try:
                with self.errors_say_how_to_resume():
                    return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except Stopped:
                last = run / f"checkpoint-{self.state.global_step}"
                if self.state.global_step and (self.control.should_evaluate or not last.exists()):
                    self._save_checkpoint(self.model, None)
                raise

    @contextmanager
    def errors_say_how_to_resume(self) -> Iterator[None]:
        """Add to a `UserError` of a run that has begun, and has saved something, how the run is resumed."""
        run = Path(self.args.output_dir)
        try:
            yield
        except UserError as error:
            if self._has_begun and holds_run(run):
                end = "" if str(error).endswith((".", "?")) else "."
                saved = f"Finished samples and checkpoints are saved. Resume with: {resume_call(run)}"
                error.args = (f"{error}{end} {saved}",)  # The same exception, with its type and traceback.
            raise

    def _open(self, run: Path, resume: Any, stack: ExitStack) -> directory.OpenedRun:
        """Lock the run directory and choose the checkpoint, in the first process; all get the result or its error."""

        def lock_and_open() -> directory.OpenedRun:
            stack.enter_context(directory.locked(run))
            return directory.open_run(run, self.identity, resume, self.set_aside_run_files)

        return call_in_first_process(lock_and_open, self.args.process_index, self.args.world_size)

    def agree_to_stop(self) -> bool:
        """Return whether any process has received a signal. All processes call this at the same point."""
        requested = torch.tensor(float(self.interrupts.pending()), device=self.args.device)
        self.stopping = bool(self.accelerator.reduce(requested) if self.args.world_size > 1 else requested)
        return self.stopping

    def stop_if_requested(self) -> None:
        """Stop if any process has received a signal. All processes call this at the same point.

        Raises:
            Stopped: a signal requested it.
        """
        if self.agree_to_stop():
            self._stop()

    def _stop(self) -> None:
        number = self.interrupts.signal_number or 15
        step = self.state.global_step
        name = {2: "Ctrl-C", 15: "SIGTERM"}[number]
        raise Stopped(
            f"stopped by {name} in iteration {step // self.steps_per_epoch + 1} after step {step}; everything is "
            f"saved. Resume with: {resume_call(Path(self.args.output_dir))}",
            number,
        )

    # After an epoch's last step come its log and its evaluation. A save that is due waits for both, so that no
    # checkpoint is taken between them.

    def _begin_epoch(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not control.should_training_stop:  # Else a resumed run had stopped early, and only its end is missing.
            self.begin_epoch(state.global_step // self.steps_per_epoch)

    def _end_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end_step()
        if self.agree_to_stop():
            control.should_save = True
        if control.should_save and state.global_step % self.steps_per_epoch == 0:
            control.should_save, self._save_is_delayed = False, True

    def _save_if_delayed(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save |= self._save_is_delayed
        self._save_is_delayed = False

    def _stop_if_agreed(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopping:
            self._stop()

    # Saving a checkpoint.

    def _get_output_dir(self, trial: Any) -> str:
        output_dir = super()._get_output_dir(trial)
        return os.path.join(output_dir, _STAGE) if self._staging else output_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint into a staging directory, and rename it once it is complete and on the disk."""
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        stage = run / _STAGE
        if self.is_world_process_zero():
            shutil.rmtree(stage, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            with report_write_errors(run / name), self._keep_all_checkpoints():  # `_rotate` removes old ones.
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                self._correct_best_checkpoint(staged=name)
                if self.is_world_process_zero():
                    self.state.save_to_json(str(stage / name / "trainer_state.json"))
                    checkpoints.seal(stage / name)
                    replace_directory(stage / name, run / name)
        finally:
            self._staging = False
            if self.is_world_process_zero():
                shutil.rmtree(stage, ignore_errors=True)
        if self.is_world_process_zero():
            self._rotate(name)
        self.accelerator.wait_for_everyone()

    def _rotate(self, name: str) -> None:
        """Keep `save_total_limit` checkpoints, and in any case the named one and the best."""
        run, best = Path(self.args.output_dir), self.state.best_model_checkpoint
        checkpoints.rotate(run, self.args.save_total_limit, {run / name, *([Path(best)] if best else [])})

    @contextmanager
    def _keep_all_checkpoints(self) -> Iterator[None]:
        """Let `Trainer` remove no checkpoint within the context."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _correct_best_checkpoint(self, staged: str | None = None) -> None:
        """Set the path of the best checkpoint: not the staging directory, and right if the run was moved."""
        name = f"checkpoint-{self.state.best_global_step}"
        best = Path(self.args.output_dir) / name
        if self.state.best_global_step and (best.is_dir() or name == staged):
            self.state.best_model_checkpoint = str(best)

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """Return sharded weights, gathered in the first process; None if every process has all weights."""
        return fsdp.gather_weights(self.accelerator, self.model) if self.is_fsdp_enabled else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights as `Trainer.save_model` does; sharded weights are gathered first."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, self.whole_weights())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            output = Path(output_dir or self.args.output_dir)
            # A pickle that nothing reads. config.yaml, run.json and the run's own files have its content.
            (output / "training_args.bin").unlink(missing_ok=True)
            self.save_run_files(output)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # DeepSpeed has its own sharded format.
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled:
            state = fsdp.gather_optimizer_state(self.model, self.optimizer)
        else:
            state = self.optimizer.state_dict()
        if self.args.should_save:
            save_state(states_path(output_dir, "optimizer"), state)
            save_state(states_path(output_dir, "scheduler"), self.lr_scheduler.state_dict())
        return None

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(states_path(output_dir, "scaler"), scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        """Save each process's own state: random generators, sums since the last log, what is due, the subclass's."""
        state = {
            "random": random_states(),
            "loss": (float(self._tr_loss), self._total_loss_scalar, self._globalstep_last_logged),
            "run": self.run_state(),
            "stopped": self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            "due": {"evaluate": self.control.should_evaluate, "save": self.control.should_save},
        }
        for number, process_state in enumerate(gather_object([state])):
            if self.args.should_save:
                save_state(states_path(output_dir, f"process-{number}"), process_state)

    # Resuming from a checkpoint.

    def _load_process_state(self, checkpoint: Path) -> dict[str, Any]:
        """Load this process's state, merged if the checkpoint is of another number of processes."""
        rank, size = self.args.process_index, self.args.world_size
        count = len(list(states_path(checkpoint, "process-0").parent.glob("process-*.safetensors")))
        if count == size:
            return load_state(states_path(checkpoint, f"process-{rank}"))
        states = [load_state(states_path(checkpoint, f"process-{number}")) for number in range(count)]
        run_state = self.merge_run_states([state["run"] for state in states], is_first=rank == 0)
        state = {**states[min(rank, count - 1)], "run": run_state}
        state["random"] = states[rank]["random"] if rank < count else None  # A new process keeps its own seed.
        # Each process logs the mean of all; their sum is kept.
        state["loss"] = (sum(part["loss"][0] for part in states) / count, *states[0]["loss"][1:])
        return state

    def _restore(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore what `Trainer` does not, before the first step."""
        self._save_is_delayed = False
        if (resumed := self._resumed) is not None:
            self.restore_run_state(resumed.get("run", {}), self._resume_notes)
        self._has_begun = True  # An error before this one is of a run that cannot be resumed as it is.
        if resumed is None or not state.global_step:
            return
        self._correct_best_checkpoint()
        if state.is_world_process_zero:  # The run may have stopped before it removed old checkpoints.
            self._rotate(f"checkpoint-{state.global_step}")
        self._load_rng_state(None)
        args.eval_on_start = False  # The run began with it.
        loss, self._total_loss_scalar, self._globalstep_last_logged = resumed["loss"]
        self._tr_loss += loss
        control.should_training_stop = resumed["stopped"]
        if resumed["due"]["evaluate"]:  # The run stopped while it evaluated.
            control.should_evaluate, control.should_save = True, resumed["due"]["save"]
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, state.epoch, None, time.time())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed and self._resumed.get("random"):
            restore_random_states(self._resumed["random"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return None

        def read() -> dict[str, Any]:
            return load_optimizer_state(self.optimizer, checkpoint, keep_options=bool(self.changed_options))

        if "optim" in self.changed_options:
            pass  # The states of one optimizer do not fit another, which starts without any.
        elif self.is_fsdp_enabled:
            fsdp.restore_optimizer_state(self.model, self.optimizer, read, self.is_world_process_zero())
        else:
            self.optimizer.load_state_dict(read())
        restore_scheduler(self.optimizer, self.lr_scheduler, checkpoint, keep_options=bool(self.changed_options))
        return None

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint is not None and states_path(checkpoint, "scaler").exists():
            scaler.load_state_dict(load_state(states_path(checkpoint, "scaler")))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        keys = fsdp.load_weights(self.model, resume_from_checkpoint, self.is_world_process_zero())
        self._issue_warnings_after_load(keys)
        return None

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn as `Trainer` does, but not about tied weights, which a checkpoint stores once."""
        tied = set(getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", ()))
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    # The loop of `Trainer`.

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        self._fsdp_plugin = kwargs["fsdp_plugin"]
        return super()._build_accelerator_args(**kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with FSDP on CPUs too if it was asked for."""
        super().create_accelerator_and_postprocess()
        if fsdp.enable_fsdp_on_cpu(self.accelerator, self._fsdp_plugin):
            self.is_fsdp_enabled = True
        if self.args.world_size > 1:
            register_gloo_shutdown()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.on_models_ready()
        return prepared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log` does. The mean loss in the last row is that of the whole run, resumed parts included."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # A resumed run had stopped early; only its end is missing.
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End training as `Trainer` does, but keep the last checkpoint: the final model is not saved yet."""
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        with self._keep_all_checkpoints():
            output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])  # That of the whole run: see `log`.
