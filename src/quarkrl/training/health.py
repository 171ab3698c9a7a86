"""Numbers that go bad, and runs that have nothing left to learn from: found, named, never trained through in silence.

What is not finite (`on_bad_numbers`): the loss or the gradient of a step, before the step is made; the weights, before
they are saved. What has collapsed (`on_collapse`): an exploration whose completions are all empty or all the same, a
pool of one reward, a policy without entropy. All processes come to the same decision.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from quarkrl.errors import UserError

if TYPE_CHECKING:
    from quarkrl.training.trainer import QuarkTrainer

logger = logging.getLogger(__name__)

# Steps in a row that may be left out. A loss scaler of fp16 leaves out some at first until it has found its scale.
MOST_SKIPPED_IN_A_ROW = 20
# Nats per token: the next token has a probability of 0.999 and more. Language has some 3, a well-trained reward 1.
LEAST_ENTROPY = 0.01


def not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of those that hold NaN or infinity; of a sharded one only what is here is looked at."""
    named = {name: _local(tensor) for name, tensor in tensors if tensor is not None and tensor.numel()}
    if not named:
        return []
    # All at once first, which waits for the device once and not for each. Where squares overflow, the second look is
    # what counts; the largest value, which cannot, takes a CPU 19 times as long.
    if torch.nn.utils.get_total_norm(list(named.values())).isfinite():
        return []
    return [name for name, tensor in named.items() if not tensor.isfinite().all()]


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def all_the_same(completions: Sequence[Sequence[int]], texts: Iterable[str]) -> str | None:
    """What completions have in common that they should not: "empty", or "the same, TEXT"; else None.

    Args:
        completions: token ids; a single one has nothing to be the same as.
        texts: what they say, in order; not read further than the first that is not empty.
    """
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        return "empty"
    if len(completions) > 1 and all(list(ids) == list(completions[0]) for ids in completions):
        return f"the same, {first if len(first) <= 60 else first[:59] + '…'!r}"
    return None


def unranked(rewards: np.ndarray, attributes: Sequence[str], ceiling: float | None = None) -> list[str]:
    """The attributes under which all of a pool is worth the same, so that no quantile is better than another.

    Args:
        rewards: `(N, A)`.
        attributes: the A names.
        ceiling: what is above counts as equal to it.
    """
    capped = rewards if ceiling is None else np.minimum(rewards, ceiling)
    return [name for name, column in zip(attributes, capped.T, strict=True) if column.min() == column.max()]


class Health(TrainerCallback):
    """Looks at what a trainer is about to learn from, before each step and at the end of each iteration.

    Attributes:
        skipped: steps left out since the beginning.
    """

    def __init__(self, trainer: "QuarkTrainer"):
        self.trainer = trainer
        self.skipped = self._in_a_row = 0
        self._problem = ""  # of the step under way, if it is left out
        self._entropy = torch.zeros(2, dtype=torch.float64)  # its sum over this iteration's tokens, and their number

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "entropy": self._entropy}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.skipped, self._in_a_row, self._entropy = state["skipped"], state["in_a_row"], state["entropy"]

    def on_epoch_begin(self, args, state, control, **_):
        """After exploring and quantizing."""
        trainer, pool, iteration = self.trainer, self.trainer.pool, state.global_step // args.steps_per_iteration
        if state.global_step % args.steps_per_iteration == 0:  # Else resumed amid the iteration.
            self._entropy = torch.zeros_like(self._entropy)
        rows = np.flatnonzero(pool.iterations == iteration)
        completions = [pool[int(row)].completion_ids.tolist() for row in rows]
        decode = trainer.plain_tokenizer.decode
        if found := all_the_same(completions, (decode(ids, skip_special_tokens=True) for ids in completions)):
            self._collapsed(f"iteration {iteration}: all {len(rows)} completions are {found}", iteration)
        if names := unranked(pool.rewards, trainer.pool.attributes, args.reward_ceiling):
            what = ", ".join(f"{name} {pool.rewards[0, pool.attributes.index(name)]:g}" for name in names)
            if args.reward_ceiling is not None and pool.rewards.min() != pool.rewards.max():
                what = f"{', '.join(names)} at reward_ceiling {args.reward_ceiling:g} or above"
            self._collapsed(f"iteration {iteration}: all {len(pool)} samples of the pool have {what}", None)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        """With the whole step's gradient, while the weights are as they were."""
        trainer, learned = self.trainer, self.trainer.loss_means
        step = learned.step
        found = [f"the {name}" for name in learned.names if not math.isfinite(step[name])]
        scaler = getattr(trainer.accelerator, "scaler", None)
        if not found and scaler is None:  # A scaler leaves out by itself what overflows.
            found = [f"the gradient of {name}" for name in not_finite((n, p.grad) for n, p in model.named_parameters())]
        if not self._anywhere(bool(found)):
            self._entropy += torch.tensor([step["entropy"], step["tokens"]], dtype=torch.float64)
            return
        what = f"step {state.global_step + 1}: {_listed(found) or 'a number of another process'} is not finite"
        if args.on_bad_numbers == "stop":
            raise UserError(
                f"{what}; the weights are as before the step: lower --learning_rate or set --max_grad_norm, or leave "
                "such steps out with --on_bad_numbers skip"
            )
        self._problem = what
        learned.drop_step()
        if scaler is None:
            model.zero_grad(set_to_none=True)  # An optimizer passes over what has no gradient.

    def on_step_end(self, args, state, control, model=None, **_):
        if self.trainer.accelerator.optimizer_step_was_skipped and not self._problem:
            self._problem = f"step {state.global_step}: fp16 overflows at this loss scale"
        should_log = control.should_log
        self._count(self._problem)
        control.should_log = should_log  # What is said of a step left out is not the log of the step.
        self._problem = ""
        if control.should_save:
            self._check_weights(state.global_step, model)

    def on_epoch_end(self, args, state, control, model=None, **_):
        self._check_weights(state.global_step, model)
        entropy, tokens = self._summed(self._entropy).tolist()
        if tokens and entropy / tokens < LEAST_ENTROPY:
            iteration = (state.global_step - 1) // args.steps_per_iteration
            what = f"the policy's entropy is {max(entropy, 0.0) / tokens:.2g} nats per token"
            self._collapsed(f"iteration {iteration}: {what}", iteration)

    def _count(self, what: str) -> None:
        self._in_a_row = self._in_a_row + 1 if what else 0
        if not what:
            return
        self.skipped += 1
        if self._in_a_row > MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{what}, as in the {MOST_SKIPPED_IN_A_ROW} steps before it: go back to an earlier checkpoint, with a "
                "lower --learning_rate"
            )
        self.trainer.log({"skipped_steps": self.skipped})
        if self.trainer.is_world_process_zero():
            logger.warning(f"{what}: left out (skipped_steps {self.skipped})")

    def _check_weights(self, step: int, model: Any) -> None:
        """No checkpoint is written that is beyond use."""
        found = not_finite(model.named_parameters())
        if self._anywhere(bool(found)):
            raise UserError(
                f"step {step}: the weights of {_listed(found) or 'another process'} are not finite; nothing of it is "
                "saved: resume from the last checkpoint with a lower --learning_rate, or set --max_grad_norm"
            )

    def _collapsed(self, what: str, iteration: int | None) -> None:
        """Stop or warn; `iteration` is that of a policy to be blamed, None where it is the reward."""
        remedy = "want a reward that tells samples apart, or more prompts"
        if iteration is not None:
            remedy = "resume from an earlier checkpoint with a lower --learning_rate or a higher --kl_coef"
        if iteration == 0:
            remedy = "look at the model, the prompts and --max_completion_length"
        if self.trainer.args.on_collapse == "stop":
            raise UserError(f"{what}: nothing is left to learn from; {remedy}; --on_collapse warn goes on all the same")
        if self.trainer.is_world_process_zero():
            logger.warning(f"{what}: nothing is left to learn from; {remedy}")

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self._summed(torch.tensor(float(here))))

    def _summed(self, values: Tensor) -> Tensor:
        accelerator = self.trainer.accelerator
        return values if accelerator.num_processes == 1 else accelerator.reduce(values.to(accelerator.device)).cpu()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
