"""`QuarkConfig`: every option of a training run, Quark's own (options.py) and those of `TrainingArguments`."""

import logging
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy

from quarkrl.algorithm.coefficients import MAX_CHANGE
from quarkrl.data.chat_defaults import read_template_kwargs
from quarkrl.errors import UserError, did_you_mean
from quarkrl.models.precision import bf16_is_fast
from quarkrl.options import check_options, join_words
from quarkrl.sampling.options import GuidanceScale, count_passes, read_scale
from quarkrl.sampling.strategy import Sampling
from quarkrl.training.options import INHERITED, QuarkOptions

logger = logging.getLogger(__name__)

# Options that are one number or several, and what several apply to.
LISTS = {
    "temperature": "iterations",
    "explore_guidance_scale": "iterations",
    "kl_guidance_scale": "iterations",
    "distill_guidance_scale": "stages",
    "distill_temperature": "stages",
}
LEAST_VLLM_TEMPERATURE = 0.01  # vLLM raises a smaller one to this.


@dataclass
class QuarkConfig(QuarkOptions, TrainingArguments):
    """`transformers.TrainingArguments` plus Quark's own options; the defaults are the paper's toxicity settings.

    `num_train_epochs` is not an option here: an iteration is an epoch, so `num_iterations` sets it.

    Raises:
        UserError: a value is invalid; the message has the option, the value, the limit and a remedy.
    """

    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: Quark makes its own batches."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Not used: num_iterations sets it."})

    def __post_init__(self) -> None:
        for name, meaning in LISTS.items():
            value = getattr(self, name)
            setattr(self, name, list(value) if isinstance(value, Sequence) else [float(value)])
            if not getattr(self, name):
                raise UserError(f"{name} []: must be a number, or several that apply to {meaning}. The default is 1.")
        self._set_epochs()
        self.chat_template_kwargs = read_template_kwargs(self.chat_template_kwargs)
        check_options(self, INHERITED)
        self._check_lengths()
        self._check_guidance()
        self._check_combinations()
        self._adapt()
        super().__post_init__()
        self._use_one_gpu()
        self._check_step()
        for name in ("output_dir", "resume_from_checkpoint"):  # A reward may change the working directory.
            if isinstance(path := getattr(self, name), str):
                setattr(self, name, os.path.abspath(path))
        self._check_trackers()
        if self.hub_strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
            raise UserError(
                f"hub_strategy {self.hub_strategy.value}: must be end, as checkpoints are not uploaded. Leave it out."
            )

    def _check_trackers(self) -> None:
        """Check that the trackers exist and are installed, which `Trainer` reports after the model is loaded."""
        for name in self.report_to or ():
            if name not in INTEGRATION_TO_CALLBACK:
                raise UserError(
                    f"report_to {name}: must be one of {', '.join(INTEGRATION_TO_CALLBACK)}."
                    f"{did_you_mean(name, INTEGRATION_TO_CALLBACK)}"
                )
            if name not in (*get_available_reporting_integrations(), "flyte"):  # transformers never lists flyte.
                raise UserError(f"report_to {name}: must be installed. Run `pip install {name}`.")

    def _set_epochs(self) -> None:
        remedy = "Set --num_iterations and --steps_per_iteration."
        if self.max_steps > 0:
            raise UserError(f"max_steps {self.max_steps}: must be left out. {remedy}")
        if self.num_train_epochs not in (3.0, self.total_iterations):  # 3.0 is the default of TrainingArguments
            raise UserError(f"num_train_epochs {self.num_train_epochs}: must be left out. {remedy}")
        self.num_train_epochs = self.total_iterations

    def _check_lengths(self) -> None:
        if self.min_completion_length > self.max_completion_length:
            raise UserError(
                f"min_completion_length {self.min_completion_length}: must be at most max_completion_length, "
                f"{self.max_completion_length}. Set a smaller --min_completion_length."
            )
        for switch, name in (("do_sample", "samples_per_prompt"), ("eval_do_sample", "eval_samples_per_prompt")):
            if not getattr(self, switch) and getattr(self, name) > 1:
                raise UserError(
                    f"{name} {getattr(self, name)}: must be 1 if {switch} is False, since greedy completions "
                    f"of a prompt are equal. Set --{name} 1."
                )

    def _check_guidance(self) -> None:
        quantiles = [str(number) for number in range(self.num_quantiles - 1)]  # without the best, which is sampled
        sources = ("worst", "reference", *quantiles)
        if str(self.guidance_from) not in sources:
            raise UserError(
                f"guidance_from {self.guidance_from!r}: must be worst, reference or a quantile from 0 to "
                f"{quantiles[-1]}."
            )
        self._check_guidance_of_each()
        if self.guidance_from != "worst" and set(self.guidance_scales) == {1} and not self.explore_guidance_of:
            raise UserError(
                f"guidance_from {self.guidance_from!r}: must be left out if guidance is off. Set "
                "--explore_guidance_scale, --eval_guidance_scale or --distill_guidance_scale."
            )

        stages, temperatures = len(self.distill_guidance_scale), len(self.distill_temperature)
        if temperatures > stages:
            raise UserError(
                f"distill_temperature: has {temperatures} values, and must have at most one for each value of "
                f"distill_guidance_scale, which has {stages}. Leave some out."
            )

    def _check_guidance_of_each(self) -> None:
        text = self.explore_guidance_of
        if text is None:
            return
        if not isinstance(read_scale(text, "explore_guidance_of"), dict):
            raise UserError(
                f"explore_guidance_of {text!r}: must be NAME=γ,NAME=γ. Use --explore_guidance_scale for one γ."
            )
        remedies = {
            "condition_on": (self.condition_on == "each", "each"),
            "explore_guidance_scale": (self.explore_guidance_scale == [1], 1),
            "guidance_from": (self.guidance_from != "reference", "worst"),
        }
        for name, (is_fit, value) in remedies.items():
            if not is_fit:
                raise UserError(f"explore_guidance_of {text!r}: must have {name} {value}. Set --{name} {value}.")

    def _check_combinations(self) -> None:
        for name in ("kl", "entropy"):
            target = getattr(self, f"{name}_target")
            if target is not None and not getattr(self, f"{name}_coef"):
                raise UserError(
                    f"{name}_target {target}: must be left out if {name}_coef is 0. Set --{name}_coef above 0, or drop "
                    f"--{name}_target."
                )
        self._check_workers()
        self._check_engine()
        self._check_words()
        checkpoint = self.resume_from_checkpoint
        if isinstance(checkpoint, str) and not os.path.isfile(os.path.join(checkpoint, "trainer_state.json")):
            raise UserError(
                f"resume_from_checkpoint {checkpoint!r}: must be the directory of a checkpoint, such as "
                "runs/mine/checkpoint-500."
            )

    def _check_engine(self) -> None:
        """Check the options of vLLM, which `engine_url` and some ways to sample do not go with."""
        url, remedy = self.engine_url, "Set --engine builtin."
        if self.engine == "builtin":
            if url is not None:
                raise UserError(f"engine_url {url!r}: must be left out of a run without vLLM. Set --engine vllm.")
            return
        if url is not None and not url.startswith(("http://", "https://")):
            raise UserError(f"engine_url {url!r}: must start with http:// or https://, as http://localhost:8000 does.")
        for name in ("temperature", "eval_temperature", "distill_temperature"):
            values = getattr(self, name)
            lowest = min(values) if isinstance(values, list) else values
            if lowest < LEAST_VLLM_TEMPERATURE:
                raise UserError(f"{name} {lowest}: must be at least {LEAST_VLLM_TEMPERATURE} with vLLM. {remedy}")
        if self.guidance_from == "reference":
            raise UserError(f"guidance_from reference: must be a quantile with vLLM, which has no reference. {remedy}")

    def _check_words(self) -> None:
        """Check the options that need words."""
        if self.conditioning != "tokens":
            return
        if self.words is not None:
            raise UserError("words: must be left out with new tokens. Set --conditioning text or soft.")
        if set(self.kl_guidance_scale) != {1}:
            raise UserError(
                f"kl_guidance_scale {self.kl_guidance_scale}: must be 1 with new tokens, which have no meaning to the "
                "reference. Set --conditioning text or soft."
            )

    def _check_workers(self) -> None:
        """Check the options of the data loader, which torch checks after the first exploration or not at all."""
        if self.dataloader_persistent_workers:
            raise UserError(
                "dataloader_persistent_workers True: must be False, since each iteration draws anew and persistent "
                "workers keep the old draws. Leave it out."
            )
        if not self.dataloader_in_order:
            raise UserError(
                "dataloader_in_order False: must be True, since a resumed run repeats the order of the batches. Leave "
                "it out."
            )
        method, known = self.dataloader_multiprocessing_context, multiprocessing.get_all_start_methods()
        if method is not None and method not in known:
            raise UserError(
                f"dataloader_multiprocessing_context {method!r}: must be {join_words(known)}."
                f"{did_you_mean(method, known)}"
            )
        if method is not None and not self.dataloader_num_workers:
            raise UserError(
                f"dataloader_multiprocessing_context {method!r}: must be left out without workers. Set "
                "--dataloader_num_workers 1."
            )

    def _adapt(self) -> None:
        """Set fields of `TrainingArguments` that follow from other options and from the machine."""
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"  # TrainingArguments would take the loss, which is not evaluated.
        if self.on_bad_numbers == "skip":
            self.logging_nan_inf_filter = True  # Otherwise the loss of a skipped step makes all later means NaN.
        if self.bf16 == "auto":
            self.bf16 = not self.fp16 and bf16_is_fast()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # There is no device to pin for; torch warns in each iteration.
            if self.bf16:
                self.use_cpu = True  # TrainingArguments accepts bf16 on a CPU only with use_cpu.
        if not _is_launched():
            # A run of several processes may be resumed as one, and one process can have none of these.
            self.ddp_backend = self.fsdp = self.fsdp_config = None

    def _use_one_gpu(self) -> None:
        """Use one GPU in each process. `Trainer` would split batches over all visible ones (`nn.DataParallel`)."""
        if self.n_gpu > 1:
            command = f"torchrun --nproc_per_node {self.n_gpu}"
            logger.warning(f"one of {self.n_gpu} GPUs is used. To use all, start the run by {command}.")
            self._n_gpu = 1

    def _check_step(self) -> None:
        """Check options whose limits depend on the number of processes."""
        if self.world_size > 1 and not self.average_tokens_across_devices:
            raise UserError(
                "average_tokens_across_devices False: must be True in a run of several processes, since the loss is a "
                "mean over the tokens of all. Leave it out."
            )
        if self.world_size > 1 and self.engine != "builtin":
            raise UserError("engine vllm: must be builtin in a run of several processes. Set --engine builtin.")
        # A step multiplies a coefficient by 1 ± 0.2 n / horizon: see `Coefficients`.
        least = MAX_CHANGE * self.draws_per_step
        if self.coef_horizon <= least and (self.kl_target is not None or self.entropy_target is not None):
            raise UserError(
                f"coef_horizon {self.coef_horizon}: must be greater than {least:g}, {MAX_CHANGE:g} times the "
                f"{self.draws_per_step} samples of a step, so that coefficients stay positive. The default is "
                "--coef_horizon 2500."
            )

    @property
    def compares_with_reference(self) -> bool:
        """Whether a term of the loss needs p_0."""
        return bool(self.kl_coef or self.dpo_coef)

    @property
    def guides_reference(self) -> bool:
        """Whether the KL term compares with guided logits of the reference in any iteration."""
        return bool(self.kl_coef) and set(self.kl_guidance_scale) != {1}

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """Every γ of the run that holds for all rewards; 1 is without guidance."""
        return (*self.explore_guidance_scale, self.eval_guidance_scale, *self.distill_guidance_scale)

    @property
    def passes(self) -> int:
        """The forward passes per token of the run's most guided sampling; 1 without guidance."""
        return max(map(count_passes, (*self.guidance_scales, self.explore_guidance_of or 1)))

    def exploring_scale(self, iteration: int) -> GuidanceScale:
        """Return γ of exploration in an iteration; 1 is without guidance."""
        return self.explore_guidance_of or at_iteration(self.explore_guidance_scale, iteration)

    @property
    def distills(self) -> bool:
        """Whether the run ends by distillation."""
        return set(self.distill_guidance_scale) != {1}

    @property
    def total_iterations(self) -> int:
        """The iterations of the run, those of distillation included."""
        stages = len(self.distill_guidance_scale) if self.distills else 0
        return self.num_iterations + stages * self.distill_iterations

    @property
    def hub_name(self) -> str:
        """The repository of the hub that the final model is uploaded to."""
        return self.hub_model_id or Path(self.output_dir).absolute().name

    def run_identity(self) -> dict[str, Any]:
        """Return the options that a run's result depends on, by name. `resume_rules` says which of them may change."""
        rules = {"branch", "fixed"} | ({"selection"} if self.load_best_model_at_end else set())
        names = [name for name, rule in sorted(resume_rules().items()) if rule in rules]
        if self.distills:
            names.append("num_iterations")  # Distillation begins after them.
        return {name: getattr(self, name, None) for name in names}

    def recorded_options(self) -> dict[str, Any]:
        """Return the options that `quark.json` records beside the weights: Quark's own, and all that have an effect."""
        return {option.name: getattr(self, option.name) for option in fields(QuarkOptions)} | self.run_identity()

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


def at_iteration(values: Sequence[float], iteration: int) -> float:
    """Return the value of an option for an iteration: each value is for one, the last for all that follow."""
    return values[min(iteration, len(values) - 1)]


def resume_rules() -> dict[str, str]:
    """Return whether a resumed run may change an option: "free", "branch", "fixed" or "selection", by name.

    Options that are not listed are free.
    """
    declared = {option.name: option for option in fields(QuarkConfig)} | INHERITED
    return {name: option.metadata["resume"] for name, option in declared.items() if "resume" in option.metadata}


def _is_launched() -> bool:
    """Return whether torchrun, accelerate or MPI started this process, by the variables that accelerate reads."""
    sizes = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")
    return int(os.environ.get("LOCAL_RANK", -1)) >= 0 or get_int_from_env(sizes, 1) > 1
