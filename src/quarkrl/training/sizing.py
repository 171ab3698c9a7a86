"""Defaults by model size, prompts and time, for options that neither a flag nor a file sets.

`quarkrl train` applies them. `QuarkConfig` has the paper's defaults. In Python, `size_defaults` returns those of a
size. docs/choosing.md says which rows were measured.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from quarkrl.errors import UserError


@dataclass(frozen=True)
class ModelSize:
    """The defaults of models with fewer than `below` parameters.

    Attributes:
        below: number of parameters.
        lora_rank: of the adapter; 0 trains all weights.
        adapter_rate, full_rate: learning rate of an adapter, and of all weights.
        dpo_coef: weight of the DPO term.
        options: other options by name. `prompts_per_iteration` counts completions.
        without_pairs: what replaces some of them in a run without the DPO term, which needs more samples.
    """

    below: float
    lora_rank: int
    adapter_rate: float
    full_rate: float
    dpo_coef: float
    options: dict[str, Any]
    without_pairs: dict[str, Any] = field(default_factory=dict)


def _options(
    kl_coef: float, num_iterations: int, steps_per_iteration: int, batch: int, prompts_per_iteration: int
) -> dict[str, Any]:
    """Return β, and the options that say how much a run samples and learns."""
    return {
        "kl_coef": kl_coef,
        "num_iterations": num_iterations,
        "steps_per_iteration": steps_per_iteration,
        "per_device_train_batch_size": batch,
        "prompts_per_iteration": prompts_per_iteration,
    }


SIZES = (
    ModelSize(3e6, 0, 4e-3, 2e-3, 0.2, _options(0.4, 6, 40, 128, 5000), _options(0.4, 26, 50, 128, 5000)),
    ModelSize(50e6, 4, 4e-3, 1e-4, 0.4, _options(0.4, 8, 24, 128, 3000), _options(0.1, 20, 35, 128, 3000)),
    ModelSize(1e9, 16, 3e-4, 1e-5, 10.0, _options(0.05, 8, 16, 32, 1024)),
    ModelSize(float("inf"), 16, 2e-4, 1e-5, 10.0, _options(0.05, 8, 16, 32, 1024)),
)
SAMPLED = ("prompts_per_iteration", "samples_per_prompt")  # Options that say how much an iteration samples.
_ALL_SIZES = {"entropy_coef": 0.0, "bf16": "auto"}
NAMES = (
    "lora_rank",
    "learning_rate",
    *SIZES[0].options,
    "dpo_coef",
    "samples_per_prompt",
    "num_quantiles",
    *_ALL_SIZES,
)
PAIRED = 8  # Completions of a prompt where pairs of them are compared.
# With fewer prompts than an iteration explores, several completions of each are sampled, up to this number.
MOST_SAMPLES_PER_PROMPT = 16
# So many samples of an iteration are in the smallest quantile, if more completions of each prompt can have that effect.
LEAST_RARE = 64
_RARE = 0.1  # A share of samples that is called rare.
# Fewer steps than this learn little, so the batch gets smaller first. A run in a short time has at least so many
# iterations and prompts.
PASSES = 4  # Of a run over scored samples that explores nothing (docs/offline.md).
LEAST_STEPS, LEAST_BATCH, LEAST_ITERATIONS, LEAST_PROMPTS = 8, 8, 8, 64
_AMOUNTS = ("num_iterations", "steps_per_iteration", "prompts_per_iteration", "samples_per_prompt")
_TOLERANCE = 1.2  # By which factor the estimate may exceed a budget without a warning.


def size_defaults(parameters: float, lora_rank: int | None = None, dpo_coef: float | None = None) -> dict[str, Any]:
    """Return the default options of a model, by name.

    Args:
        parameters: the number of its parameters.
        lora_rank: rank of the adapter, if it is set; 0 for all weights. The learning rate depends on it.
        dpo_coef: weight of the DPO term, if it is set. Completions of a prompt are compared if it is not 0.
    """
    size = next(size for size in SIZES if parameters < size.below)
    rank = size.lora_rank if lora_rank is None else lora_rank
    coef = size.dpo_coef if dpo_coef is None else dpo_coef
    samples = PAIRED if coef else 1
    options = size.options if coef else size.options | size.without_pairs
    return {
        "lora_rank": rank,
        "learning_rate": size.adapter_rate if rank else size.full_rate,
        **options,
        "prompts_per_iteration": options["prompts_per_iteration"] // samples,
        "dpo_coef": coef,
        "samples_per_prompt": samples,
        "num_quantiles": RewardSpread.MOST,
        **_ALL_SIZES,
    }


@dataclass(frozen=True)
class Speed:
    """How fast a model samples and learns, in seconds: per completion, and per draw."""

    per_completion: float
    per_draw: float

    def seconds(self, iterations: int, explored: int, drawn: int) -> float:
        """Return the time of a run without rewards: iterations, completions and draws of each."""
        return iterations * (explored * self.per_completion + drawn * self.per_draw)


@dataclass(frozen=True)
class RewardSpread:
    """How the rewards of a few first samples differ.

    Attributes:
        num_quantiles: as many as have samples, at most `MOST`.
        least_share: of the samples, in the smallest of these quantiles.
        text: what was seen, in words.
        is_constant: whether all rewards are equal.
    """

    MOST: ClassVar[int] = 5

    num_quantiles: int
    least_share: float
    text: str
    is_constant: bool = False

    def describe(self, options: dict[str, Any], fixed: dict[str, Any]) -> str:
        """Return a line about the options that follow from the rewards; "" if they are those of any reward."""
        if self.is_constant:
            return f"warning: {self.text}. Choose prompts whose completions differ, or a finer reward."
        count, samples = options["num_quantiles"], options["samples_per_prompt"]
        if count > self.num_quantiles:  # The user has set it.
            filled = f"only {self.num_quantiles} of {count} quantiles would have samples"
            return f"warning: {self.text}, so {filled}. Lower --num_quantiles, or choose a finer reward."
        parts = []
        if count < self.MOST and "num_quantiles" not in fixed:
            parts.append(f"{count} quantiles")
        usual = PAIRED if options["dpo_coef"] else 1
        if samples > usual and self.least_share < _RARE and "samples_per_prompt" not in fixed:
            parts.append(f"{samples} samples per prompt")
        return f"rewards: {self.text}, so the run has {' and '.join(parts)}" if parts else ""

    def samples_per_prompt(self, prompts: int) -> int:
        """Return how many completions of each prompt put `LEAST_RARE` samples into the smallest quantile."""
        return min(math.ceil(LEAST_RARE / (self.least_share * prompts)), MOST_SAMPLES_PER_PROMPT)


def fit_to_prompts(
    options: dict[str, Any],
    num_prompts: int,
    fixed: dict[str, Any],
    per_batch: int = 1,
    spread: RewardSpread | None = None,
) -> None:
    """Change the amounts of `size_defaults` so that a completion is drawn as often as with plenty of prompts.

    Args:
        options: by name; changed in place.
        num_prompts: the prompts of the run.
        fixed: the options that the user has set. They are not changed, and the others suit them.
        per_batch: batches of an optimizer step, over processes and micro-batches.
        spread: of the rewards. Where few samples differ from the others, there are more of each prompt.
    """
    plenty, batch = options["prompts_per_iteration"], options["per_device_train_batch_size"]
    of_each = options["samples_per_prompt"]
    draws = options["steps_per_iteration"] * batch / (plenty * of_each)  # of a completion
    options.update({name: fixed[name] for name in fixed.keys() & options.keys()})
    prompts = min(options["prompts_per_iteration"] or num_prompts, num_prompts)
    if not fixed.keys() & {"samples_per_prompt", "prompts_per_iteration", "steps_per_iteration"}:
        samples = min(of_each * max(plenty // prompts, 1), MOST_SAMPLES_PER_PROMPT)
        needed = spread.samples_per_prompt(prompts) if spread and not spread.is_constant else 1
        options["samples_per_prompt"] = max(samples, needed)
    batch = options["per_device_train_batch_size"] * per_batch
    _set_steps(options, fixed, draws * prompts * options["samples_per_prompt"] / batch)


def fit_to_samples(options: dict[str, Any], num_samples: int, fixed: dict[str, Any], per_batch: int = 1) -> None:
    """Change the amounts of `size_defaults` for a run that explores nothing: an iteration is a pass over the samples.

    Args:
        options: by name; changed in place.
        num_samples: the scored samples of the run.
        fixed, per_batch: as in `fit_to_prompts`.
    """
    options.update({"num_iterations": PASSES, "prompts_per_iteration": None})
    options.update({name: fixed[name] for name in fixed.keys() & options.keys()})
    _set_steps(options, fixed, num_samples / (options["per_device_train_batch_size"] * per_batch))


def fit_to_budget(
    options: dict[str, Any], num_prompts: int, fixed: dict[str, Any], speed: Speed, seconds: float, per_batch: int = 1
) -> None:
    """Reduce the amounts until a run takes at most so many seconds: first the iterations, then what each samples.

    Args:
        options, fixed, per_batch: as in `fit_to_prompts` or `fit_to_samples`, which comes before.
        num_prompts: the prompts of the run; 0 of a run that explores nothing.
        speed: of the model.
        seconds: the time of the run, without rewards.
    """
    share = seconds / time_of(options, num_prompts, speed, per_batch)
    if share < 1 and "num_iterations" not in fixed:
        iterations = options["num_iterations"]
        least = min(LEAST_ITERATIONS if num_prompts else 1, iterations)
        options["num_iterations"] = max(int(iterations * share), least)
        share = seconds / time_of(options, num_prompts, speed, per_batch)
    takes_samples = "samples_per_prompt" not in fixed and not options["dpo_coef"]  # Pairs need several.
    if share < 1 and takes_samples and options["samples_per_prompt"] > 1:
        samples = max(int(options["samples_per_prompt"] * share), 1)
        _set_steps(options, fixed, options["steps_per_iteration"] * samples / options["samples_per_prompt"])
        options["samples_per_prompt"] = samples
        share = seconds / time_of(options, num_prompts, speed, per_batch)
    if share < 1 and not num_prompts:  # Nothing is explored.
        _set_steps(options, fixed, options["steps_per_iteration"] * share)
    elif share < 1 and "prompts_per_iteration" not in fixed:
        prompts = min(options["prompts_per_iteration"], num_prompts)
        options["prompts_per_iteration"] = max(int(prompts * share), min(LEAST_PROMPTS, prompts))
        _set_steps(options, fixed, options["steps_per_iteration"] * options["prompts_per_iteration"] / prompts)


def describe_excess(
    options: dict[str, Any], num_prompts: int, fixed: dict[str, Any], speed: Speed, budget: str, per_batch: int = 1
) -> str:
    """Return a warning if the amounts that `fit_to_budget` leaves exceed the budget; else ""."""
    if time_of(options, num_prompts, speed, per_batch) <= _TOLERANCE * parse_duration(budget):
        return ""
    amounts = [name for name in _AMOUNTS if name in fixed]
    remedy = f"Lower or leave out {', '.join(amounts)}" if amounts else "A run has no fewer iterations and prompts"
    return f"\nwarning: sampling and learning exceed --budget {budget}. {remedy}."


def _set_steps(options: dict[str, Any], fixed: dict[str, Any], steps: float) -> None:
    """Set the steps of an iteration; of few steps, there are more with a smaller batch each."""
    if "steps_per_iteration" in fixed:
        return
    batch = options["per_device_train_batch_size"]
    while "per_device_train_batch_size" not in fixed and steps < LEAST_STEPS and batch > LEAST_BATCH:
        batch, steps = batch // 2, steps * 2
    options["per_device_train_batch_size"], options["steps_per_iteration"] = batch, max(round(steps), 1)


def time_of(options: dict[str, Any], num_prompts: int, speed: Speed, per_batch: int = 1) -> float:
    """Return the seconds that a run with these amounts takes, without rewards."""
    prompts = min(options["prompts_per_iteration"] or num_prompts, num_prompts)
    drawn = options["steps_per_iteration"] * options["per_device_train_batch_size"] * per_batch
    return speed.seconds(options["num_iterations"], prompts * options["samples_per_prompt"], drawn)


def describe_defaults(parameters: float, chosen: dict[str, Any]) -> str:
    """Return the line that tells the user which options were chosen, and why."""
    unit = next((unit for unit in ((1e9, "B"), (1e6, "M")) if parameters >= unit[0]), (1, ""))
    count = f"{parameters / unit[0]:.1f}{unit[1]}" if unit[1] else str(parameters)
    options = ", ".join(f"{name} {value}" for name, value in chosen.items())
    return f"defaults for a model of {count} parameters: {options}. Set --defaults paper for the paper's."


def parse_duration(text: str) -> float:
    """Return the seconds of a time such as 90s, 30m, 2h or 1h30m.

    Raises:
        UserError: it is no such time.
    """
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text.replace(" ", ""))
    parts = match.groups() if match else ()
    seconds = sum(float(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not seconds:
        raise UserError(f"budget {text!r}: must be a time above 0, such as 90s, 30m or 2h. Set --budget 30m.")
    return seconds
