"""`QuarkConfig`: every option of a training run, once."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate.utils import get_int_from_env
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from quarkrl.errors import UserError
from quarkrl.sampling.guidance import check_guidance_scale
from quarkrl.sampling.strategy import Sampling
from quarkrl.training.health import MOST_SKIPPED_IN_A_ROW


@dataclass
class QuarkConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus Quark's own options; the defaults are the paper's toxicity settings.

    `num_train_epochs` is not an option here: an iteration is an epoch, so `num_iterations` sets it.

    Raises:
        UserError: a value is impossible; the message names it, its limit and the remedy.
    """

    # What Quark sets otherwise than TrainingArguments does.
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate; decays linearly to 0."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of Adam."})
    warmup_steps: float = field(
        default=0.02,
        metadata={"help": "Warm-up: a number of steps, or below 1 a share of all (paper: 500 of 23,437)."},
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients at this norm; 0 does not clip."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Samples per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Completions sampled at a time (eval)."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save; an epoch is an iteration."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep so many checkpoints."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses from the log."})
    metric_for_best_model: str | None = field(
        default=None,
        metadata={"help": "Held-out figure that load_best_model_at_end goes by; reward if left out."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: Quark makes its own batches."})

    num_train_epochs: float = field(default=3.0, metadata={"help": "Not used: num_iterations sets it."})

    disable_tqdm: bool | None = field(default=False, metadata={"help": "Show no progress."})

    # The pool and its quantiles.
    num_quantiles: int = field(default=5, metadata={"help": "K: quantiles, and reward tokens, per attribute."})
    draw: Literal["uniform", "balanced"] = field(
        default="uniform",
        metadata={"help": "Draw samples uniformly, or quantiles uniformly and a sample within (balanced)."},
    )

    # The objective.
    kl_coef: float = field(default=0.05, metadata={"help": "β: weight of the KL term; 0 turns it off."})
    kl_direction: Literal["policy_ref", "ref_policy"] = field(
        default="policy_ref",
        metadata={"help": "KL(policy || ref) as the official code, or KL(ref || policy) as the paper."},
    )
    entropy_coef: float = field(default=0.06, metadata={"help": "α: weight of the entropy bonus; 0 turns it off."})
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Adapt β to this KL per completion, in nats (official code: 3); None: fixed."},
    )
    entropy_target: float | None = field(
        default=None,
        metadata={"help": "Adapt α to this entropy per completion, in nats (official code: 40)."},
    )
    nll_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divides the logits in the NLL. Where exploring has a temperature below 1, the same here learns "
            "the distribution that was sampled, and keeps the policy from sharpening; KL and entropy are at 1."
        },
    )
    coef_horizon: int = field(default=2500, metadata={"help": "Samples over which β and α adapt (official code)."})
    ref_dtype: Literal["same", "float32", "bfloat16", "float16"] = field(
        default="same", metadata={"help": "Type of the reference's weights, where it is a model of its own."}
    )

    # The iterations.
    num_iterations: int = field(default=47, metadata={"help": "Explorations, each followed by learning."})
    steps_per_iteration: int = field(default=500, metadata={"help": "Optimizer steps after each exploration."})
    prompts_per_iteration: int | None = field(
        default=None, metadata={"help": "Prompts explored in an iteration, taken in turn; None: all of them."}
    )

    # Exploring.
    samples_per_prompt: int = field(default=1, metadata={"help": "Completions sampled for each prompt explored."})
    max_completion_length: int = field(default=20, metadata={"help": "Tokens of a completion, EOS included."})
    min_completion_length: int = field(
        default=3,
        metadata={
            "help": "EOS is not among the first so many tokens (official code: 3); "
            "max_completion_length suppresses it altogether."
        },
    )
    do_sample: bool = field(default=True, metadata={"help": "Explore by chance; False explores greedily."})
    temperature: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "Temperature of exploring. Several are taken in turn, one for each iteration: 1 and 0.2 explore "
            "what the policy may write, and what it comes to when it decodes almost greedily."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of exploring; 1 keeps all."})
    explore_guidance_scale: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "γ: explore with guidance (see docs/guide.md); 1 is without. Several are one for each iteration, "
            "the last for all that follow; iteration 0 samples the reference, unguided."
        },
    )
    guidance_from: str = field(
        default="worst",
        metadata={"help": "What guidance goes away from: worst, another quantile's number, or reference."},
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Completions sampled at a time; None: up to 128, or 512 on a GPU, as they fit."}
    )
    max_unscored_share: float = field(
        default=0.5,
        metadata={"help": "Stop when a larger share of an exploration's rewards are None or not finite."},
    )

    skip_bad_prompts: bool = field(
        default=False, metadata={"help": "Leave out and count prompts that cannot be used, rather than stop."}
    )

    # Rewards.
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward in the sum; None: 1 each."}
    )
    condition_on: Literal["sum", "each"] = field(
        default="sum", metadata={"help": "One reward token for the weighted sum, or one for each reward."}
    )
    reward_ceiling: float | None = field(
        default=None,
        metadata={
            "help": "Rewards above this count as equal to it: what is good enough is not ranked further, "
            "so that the best quantile keeps all of it (see docs/algorithm.md)."
        },
    )
    score_cache: str | None = field(
        default=None, metadata={"help": "A file that keeps scores, so that no text is scored twice, in any run."}
    )

    reward_timeout: float | None = field(
        default=3600.0,
        metadata={"help": "Seconds that the rewards of a batch may take; then the run stops. null in YAML: any time."},
    )

    # When numbers go bad (health.py).
    on_bad_numbers: Literal["stop", "skip"] = field(
        default="stop",
        metadata={
            "help": "A loss or gradient that is not finite stops the run before it does harm, or the step is left out "
            f"and counted (skip; up to {MOST_SKIPPED_IN_A_ROW} in a row)."
        },
    )
    on_collapse: Literal["stop", "warn"] = field(
        default="stop",
        metadata={
            "help": "Completions that are all empty or all the same, a pool of one reward, a policy without entropy: "
            "nothing is left to learn from, so stop, or warn and go on."
        },
    )

    # Evaluating while training.
    eval_do_sample: bool = field(default=True, metadata={"help": "Evaluate by chance; False evaluates greedily."})
    eval_temperature: float = field(default=1.0, metadata={"help": "Temperature of evaluating."})
    eval_top_p: float = field(default=0.9, metadata={"help": "Nucleus of evaluating (paper: 0.9)."})
    eval_guidance_scale: float = field(default=1.0, metadata={"help": "γ: evaluate with guidance; 1 is without."})
    eval_samples_per_prompt: int = field(default=1, metadata={"help": "Completions for each evaluation prompt."})

    def __post_init__(self) -> None:
        if self.max_steps > 0:
            raise UserError(
                f"max_steps {self.max_steps}: not used; set --num_iterations and --steps_per_iteration (their product)"
            )
        if self.num_train_epochs not in (3.0, self.num_iterations):  # 3.0 is the default of TrainingArguments.
            raise UserError(f"num_train_epochs {self.num_train_epochs}: not used; set --num_iterations")
        self.num_train_epochs = self.num_iterations
        for name, low in {
            "num_quantiles": 2,
            "num_iterations": 1,
            "steps_per_iteration": 1,
            "prompts_per_iteration": 1,
            "samples_per_prompt": 1,
            "max_completion_length": 1,
            "min_completion_length": 0,
            "generation_batch_size": 1,
            "eval_samples_per_prompt": 1,
            "coef_horizon": 1,
            "kl_coef": 0,
            "entropy_coef": 0,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0,
            "warmup_steps": 0,
            "max_grad_norm": 0,
            "seed": 0,
        }.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise UserError(f"{name} {value}: want at least {low}{'' if value != math.inf else ', and finite'}")
        if self.seed >= 2**32:
            raise UserError(f"seed {self.seed}: want less than 2**32, which NumPy's generator takes")
        for name in ("temperature", "explore_guidance_scale"):
            given = getattr(self, name)
            setattr(self, name, list(given) if isinstance(given, Sequence) else [float(given)])
            if not getattr(self, name):
                raise UserError(f"{name} is empty: want a number, or several for the iterations")
        temperatures = ("temperature", "nll_temperature", "eval_temperature")
        for name in (*temperatures, "kl_target", "entropy_target", "reward_timeout"):
            given = getattr(self, name)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not (value > 0 and (value < math.inf or name == "reward_timeout")):
                    raise UserError(f"{name} {value}: want more than 0{'' if value != math.inf else ', and finite'}")
        if self.reward_ceiling is not None and not math.isfinite(self.reward_ceiling):
            raise UserError(f"reward_ceiling {self.reward_ceiling}: want a finite number, or none")
        for name in ("top_p", "eval_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}: want more than 0 and at most 1")
        if not 0 <= self.max_unscored_share <= 1:
            raise UserError(f"max_unscored_share {self.max_unscored_share}: want a share from 0 to 1")
        if self.min_completion_length > self.max_completion_length:
            raise UserError(
                f"min_completion_length {self.min_completion_length}: want at most max_completion_length, "
                f"{self.max_completion_length}"
            )
        for greedy, count in (("do_sample", "samples_per_prompt"), ("eval_do_sample", "eval_samples_per_prompt")):
            if not getattr(self, greedy) and getattr(self, count) > 1:
                raise UserError(f"{count} {getattr(self, count)}: with {greedy} False all are the same; want 1")
        self._check_guidance()
        choices = {
            "draw": ("uniform", "balanced"),
            "ref_dtype": ("same", "float32", "bfloat16", "float16"),
            "kl_direction": ("policy_ref", "ref_policy"),
            "condition_on": ("sum", "each"),
            "on_bad_numbers": ("stop", "skip"),
            "on_collapse": ("stop", "warn"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r}: want {' or '.join(allowed)}")
        if self.kl_target is not None and not self.kl_coef:
            raise UserError("kl_target with kl_coef 0: nothing to adapt; set --kl_coef above 0 or drop --kl_target")
        if self.entropy_target is not None and not self.entropy_coef:
            raise UserError("entropy_target with entropy_coef 0: nothing to adapt; set --entropy_coef above 0")
        if self.dataloader_persistent_workers:
            raise UserError("dataloader_persistent_workers: workers that outlive an iteration would keep its old draws")
        checkpoint = self.resume_from_checkpoint
        if isinstance(checkpoint, str) and not os.path.isfile(os.path.join(checkpoint, "trainer_state.json")):
            raise UserError(
                f"resume_from_checkpoint {checkpoint!r}: want a checkpoint's directory, such as run/checkpoint-500"
            )
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"  # TrainingArguments would take the loss, which is not evaluated.
        if self.on_bad_numbers == "skip":
            self.logging_nan_inf_filter = True  # Else the loss of a step left out would make every later mean NaN.
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # There is no device to pin for; torch would warn each iteration.
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # TrainingArguments takes bf16 on a CPU only when told that the CPU is meant.
        if not _is_launched():  # Perhaps a run of several processes that goes on as one, which can have neither.
            self.ddp_backend = self.fsdp = self.fsdp_config = None
        super().__post_init__()
        try:
            get_reporting_integration_callbacks(self.report_to)
        except ValueError as error:
            raise UserError(f"report_to: {error}") from error

    def _check_guidance(self) -> None:
        for scale in self.explore_guidance_scale:
            check_guidance_scale(scale, "explore_guidance_scale")
        check_guidance_scale(self.eval_guidance_scale, "eval_guidance_scale")
        numbers = [str(number) for number in range(self.num_quantiles - 1)]  # Not the best, which is wanted.
        if str(self.guidance_from) not in ("worst", "reference", *numbers):
            raise UserError(f"guidance_from {self.guidance_from!r}: want worst, reference or a number to {numbers[-1]}")
        if self.guidance_from != "worst" and {self.eval_guidance_scale, *self.explore_guidance_scale} == {1}:
            raise UserError(
                f"guidance_from {self.guidance_from!r} without guidance: set explore_guidance_scale or "
                "eval_guidance_scale, or leave it out"
            )

    def explored_per_iteration(self, num_prompts: int) -> int:
        """Return the number of completions that an iteration explores, of so many prompts."""
        return min(self.prompts_per_iteration or num_prompts, num_prompts) * self.samples_per_prompt

    def sampling(self, iteration: int) -> Sampling:
        """Return the sampling options for exploration in an iteration; the temperatures take turns."""
        return Sampling(
            max_new_tokens=self.max_completion_length,
            min_new_tokens=self.min_completion_length,
            temperature=self.temperature[iteration % len(self.temperature)],
            top_p=self.top_p,
            do_sample=self.do_sample,
        )

    def eval_sampling(self) -> Sampling:
        """Return the sampling options for held-out prompts; the completion lengths are those of exploration."""
        return Sampling(
            max_new_tokens=self.max_completion_length,
            min_new_tokens=self.min_completion_length,
            temperature=self.eval_temperature,
            top_p=self.eval_top_p,
            do_sample=self.eval_do_sample,
        )

    @property
    def draws_per_step(self) -> int:
        """Samples learned from in an optimizer step, over all processes and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def draws_per_iteration(self) -> int:
        """Samples learned from in an iteration."""
        return self.steps_per_iteration * self.draws_per_step


def _is_launched() -> bool:
    """Whether torchrun, accelerate or MPI has started this process, as accelerate sees it."""
    sizes = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")
    return int(os.environ.get("LOCAL_RANK", -1)) >= 0 or get_int_from_env(sizes, 1) > 1
