"""Checks that stop a run, or warn, when its numbers break or when nothing is left to learn.

Non-finite numbers (`on_bad_numbers`): the loss or a gradient of a step, checked before the optimizer changes the
weights; the weights, checked before they are saved. Collapse (`on_collapse`): an exploration whose completions are all
empty or all identical, a pool in which all rewards are equal, a policy without entropy. All processes take the same
decision.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from quarkrl.algorithm.pool import DataPool
from quarkrl.errors import UserError, truncate
from quarkrl.training.config import QuarkConfig
from quarkrl.training.metrics_log import LossMeans
from quarkrl.training.options import MAX_SKIPPED_STEPS

logger = logging.getLogger(__name__)

# Nats per token. Below it the next token has a probability above 0.999. Human text has about 3, a well-trained policy
# about 1.
LEAST_ENTROPY = 0.01


def find_non_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity. Of a sharded tensor only the local shard is checked.

    Args:
        tensors: pairs of a name and a tensor; None and empty tensors are ignored.
    """
    # Integers are weights in 4 bits, which do not change.
    floats = [(name, t) for name, t in tensors if t is not None and t.numel() and t.is_floating_point()]
    named = {name: _local_shard(tensor) for name, tensor in floats}
    if not named:
        return []
    # One norm over all tensors synchronises with the device once. Its squares can overflow for finite tensors, so an
    # infinite norm is only a reason to look closer. The largest absolute value cannot overflow, but takes a CPU 19
    # times as long.
    if torch.nn.utils.get_total_norm(list(named.values())).isfinite():
        return []
    return [name for name, tensor in named.items() if not tensor.isfinite().all()]


def _local_shard(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def describe_identical(completions: Sequence[Sequence[int]], texts: Iterable[str]) -> str | None:
    """Return "empty" if all completions are empty, "identical: TEXT" if all are equal, else None.

    Args:
        completions: token ids. A single completion is never reported as identical.
        texts: the decoded completions, in the same order. They are read up to the first that is not empty.
    """
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        return "empty"
    if len(completions) > 1 and all(list(ids) == list(completions[0]) for ids in completions):
        return f"identical: {truncate(first, 60)!r}"
    return None


def constant_attributes(rewards: np.ndarray, attributes: Sequence[str], ceiling: float | None = None) -> list[str]:
    """Return the attributes whose reward is the same for all samples, so that no quantile is better than another.

    Args:
        rewards: `(N, A)`.
        attributes: the A names.
        ceiling: larger rewards count as equal to it.
    """
    capped = rewards if ceiling is None else np.minimum(rewards, ceiling)
    return [name for name, column in zip(attributes, capped.T, strict=True) if column.min() == column.max()]


class Health:
    """Checks what a trainer is about to learn from, each step, and each iteration's policy.

    The trainer calls `check_exploration` after it has explored and quantized; `HealthCallback` makes the other calls.

    Args:
        accelerator: reduces numbers over processes; its gradient scaler is respected.
        loss_means: the parts of the loss, with those of the current step.
        tokenizer: decodes completions for messages.
        log: writes metrics to the trainer's log.
        args: the run's options.

    Attributes:
        skipped: steps that were skipped since the start of the run.
    """

    def __init__(
        self,
        accelerator: Any,
        loss_means: LossMeans,
        tokenizer: PreTrainedTokenizerBase,
        log: Callable[[dict[str, float]], None],
        args: QuarkConfig,
    ):
        self.accelerator, self.loss_means, self.tokenizer, self.log = accelerator, loss_means, tokenizer, log
        self.on_bad_numbers, self.on_collapse = args.on_bad_numbers, args.on_collapse
        self.reward_ceiling, self.max_length = args.reward_ceiling, args.max_completion_length
        self.skipped = self._skipped_in_a_row = 0
        self._problem = ""  # Why the current step is skipped; empty if it is not.
        # The sum of the entropy over the iteration's tokens on this process, and the number of those tokens.
        self._entropy = torch.zeros(2, dtype=torch.float64)

    @property
    def state(self) -> dict[str, Any]:
        """The counters that a checkpoint saves and a resumed run restores."""
        return {"skipped": self.skipped, "in_a_row": self._skipped_in_a_row, "entropy": self._entropy}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.skipped, self._skipped_in_a_row, self._entropy = state["skipped"], state["in_a_row"], state["entropy"]

    def check_exploration(self, pool: DataPool, iteration: int) -> None:
        """Check the iteration's completions, and the rewards of the whole pool.

        Raises:
            UserError: they have collapsed and `on_collapse` is "stop".
        """
        rows = np.flatnonzero(pool.iterations == iteration)
        completions = [pool[int(row)].completion_ids.tolist() for row in rows]
        texts = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions)
        if description := describe_identical(completions, texts):
            self._report_collapse(
                f"iteration {iteration + 1}: all {len(rows)} completions are {description}", iteration
            )
        if names := constant_attributes(pool.rewards, pool.attributes, self.reward_ceiling):
            columns = {name: pool.rewards[:, pool.attributes.index(name)] for name in names}
            values = ", ".join(self._describe_constant(name, column) for name, column in columns.items())
            problem = f"iteration {iteration + 1}: all {len(pool)} samples of the pool have {values}"
            if all(len(ids) == self.max_length for ids in completions):
                problem += (
                    f", and all completions end at max_completion_length {self.max_length}: what a longer one would "
                    "say, or its length, gives no reward. Raise --max_completion_length"
                )
            if len(names) == len(pool.attributes):
                self._report_collapse(problem, None)
            else:  # The other attributes still distinguish samples.
                self._warn(f"{problem}. The model does not learn these reward tokens. Choose a finer reward.")

    def _describe_constant(self, name: str, rewards: np.ndarray) -> str:
        if rewards.min() == rewards.max():
            return f"{name} {rewards[0]:g}"
        return f"{name} at or above reward_ceiling {self.reward_ceiling:g}"

    def start_iteration(self) -> None:
        """Start the mean entropy of a new iteration."""
        self._entropy = torch.zeros_like(self._entropy)

    def check_step(self, model: torch.nn.Module, step: int) -> None:
        """Check the loss and the gradients of the step that the optimizer is about to make; clear them to skip it.

        Args:
            model: has the gradients of the whole step.
            step: its number, from 1.

        Raises:
            UserError: a number is not finite and `on_bad_numbers` is "stop".
        """
        sums = self.loss_means.step
        names = [f"the {name}" for name in self.loss_means.names if not math.isfinite(sums[name])]
        scaler = getattr(self.accelerator, "scaler", None)
        if not names and scaler is None:  # A scaler skips steps with infinite gradients by itself.
            gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
            names = [f"the gradient of {name}" for name in find_non_finite(gradients)]
        if not self._on_any_process(bool(names)):
            self._entropy += torch.tensor([sums["entropy"], sums["tokens"]], dtype=torch.float64)
            return
        problem = f"step {step}: {_first_names(names) or 'a number of another process'} is not finite"
        if self.on_bad_numbers == "stop":
            raise UserError(
                f"{problem}. The weights are as before the step. Lower --learning_rate, set --max_grad_norm, or skip "
                "such steps with --on_bad_numbers skip."
            )
        self._problem = problem
        self.loss_means.drop_step()
        if scaler is None:
            model.zero_grad(set_to_none=True)  # An optimizer ignores parameters without a gradient.

    def end_step(self, step: int) -> None:
        """Count the step as skipped or made.

        Args:
            step: its number, from 1.

        Raises:
            UserError: more than `MAX_SKIPPED_STEPS` consecutive steps were skipped.
        """
        problem, self._problem = self._problem, ""
        if self.accelerator.optimizer_step_was_skipped and not problem:
            problem = f"step {step}: fp16 overflows at this loss scale"
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if problem else 0
        if not problem:
            return
        self.skipped += 1
        if self._skipped_in_a_row > MAX_SKIPPED_STEPS:
            raise UserError(
                f"{problem}, and the {MAX_SKIPPED_STEPS} steps before it were skipped, too. Resume from an earlier "
                "checkpoint with a lower --learning_rate."
            )
        self.log({"skipped_steps": self.skipped})
        self._warn(f"{problem}. The step is skipped (skipped_steps {self.skipped}).")

    def check_weights(self, model: torch.nn.Module, step: int) -> None:
        """Check the weights, so that no unusable checkpoint is written.

        Raises:
            UserError: a weight is not finite.
        """
        names = find_non_finite(model.named_parameters())
        if self._on_any_process(bool(names)):
            raise UserError(
                f"step {step}: the weights of {_first_names(names) or 'another process'} are not finite. They are not "
                "saved. Resume from the last checkpoint with a lower --learning_rate, or set --max_grad_norm."
            )

    def check_entropy(self, iteration: int) -> None:
        """Check the policy's mean entropy over the tokens of an iteration that has ended.

        Raises:
            UserError: it is below `LEAST_ENTROPY` and `on_collapse` is "stop".
        """
        entropy, tokens = self._sum_over_processes(self._entropy).tolist()
        if tokens and entropy / tokens < LEAST_ENTROPY:
            mean = max(entropy, 0.0) / tokens
            self._report_collapse(
                f"iteration {iteration + 1}: the policy's entropy is {mean:.2g} nats per token", iteration
            )

    def _report_collapse(self, problem: str, iteration: int | None) -> None:
        """Stop or warn. `iteration` is that of the policy that collapsed; None where the reward is the cause."""
        remedy = "Choose a reward that distinguishes samples, or explore more prompts."
        if iteration is not None:
            remedy = "Resume from an earlier checkpoint with a lower --learning_rate or a higher --kl_coef."
        if iteration == 0:
            remedy = "Check the model, the prompts and --max_completion_length."
        message = f"{problem}. Nothing is left to learn. {remedy}"
        if self.on_collapse == "stop":
            raise UserError(f"{message} Set --on_collapse warn to continue all the same.")
        self._warn(message)

    def _warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(message)

    def _on_any_process(self, here: bool) -> bool:
        """Return whether the condition holds on at least one process."""
        return bool(self._sum_over_processes(torch.tensor(float(here))))

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device)).cpu()


class HealthCallback(TrainerCallback):
    """Calls the checks of `Health` for which `Trainer` offers only callback events.

    It is the last callback, so that it sees gradients and weights as the callbacks before it leave them.
    """

    def __init__(self, health: Health):
        self.health = health

    def on_epoch_begin(self, args, state, control, **_):
        """Start the iteration's mean entropy."""
        if state.global_step % args.steps_per_iteration == 0:  # Otherwise the run resumes within the iteration.
            self.health.start_iteration()

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        """Check the loss and the gradients of the step."""
        self.health.check_step(model, state.global_step + 1)

    def on_step_end(self, args, state, control, model=None, **_):
        """Count a skipped step, and check weights that are about to be saved."""
        should_log = control.should_log
        self.health.end_step(state.global_step)
        control.should_log = should_log  # Logging a skipped step resets it, but the step's own log is still due.
        if control.should_save:
            self.health.check_weights(model, state.global_step)

    def on_epoch_end(self, args, state, control, model=None, **_):
        """Check the weights and the entropy of the iteration."""
        self.health.check_weights(model, state.global_step)
        self.health.check_entropy((state.global_step - 1) // args.steps_per_iteration)


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
