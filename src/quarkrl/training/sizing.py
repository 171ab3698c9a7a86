"""Defaults by model size. `quarkrl train` applies them to options that neither a flag nor a file sets.

`QuarkConfig` has the paper's defaults. In Python, `size_defaults` returns those of a size. docs/guide.md says which
rows were measured.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelSize:
    """The defaults of models with fewer than `below` parameters.

    Attributes:
        below: number of parameters.
        lora_rank: of the adapter; 0 trains all weights.
        adapter_rate, full_rate: learning rate of an adapter, and of all weights.
        options: other options by name.
    """

    below: float
    lora_rank: int
    adapter_rate: float
    full_rate: float
    options: dict[str, Any] = field(default_factory=dict)


def _amounts(num_iterations: int, steps_per_iteration: int, batch: int, prompts_per_iteration: int) -> dict[str, int]:
    """The options that say how much a run samples and learns."""
    return {
        "num_iterations": num_iterations,
        "steps_per_iteration": steps_per_iteration,
        "per_device_train_batch_size": batch,
        "prompts_per_iteration": prompts_per_iteration,
    }


SIZES = (
    ModelSize(3e6, 0, 4e-3, 2e-3, {"kl_coef": 0.4, **_amounts(26, 50, 128, 5000)}),
    ModelSize(50e6, 4, 4e-3, 1e-4, {"kl_coef": 0.1, **_amounts(20, 35, 128, 3000)}),
    ModelSize(1e9, 16, 3e-4, 1e-5, {"kl_coef": 0.05, **_amounts(20, 32, 32, 1000)}),
    ModelSize(float("inf"), 16, 2e-4, 1e-5, {"kl_coef": 0.05, **_amounts(20, 32, 32, 1000)}),
)
_ALL_SIZES = {"entropy_coef": 0.0, "bf16": "auto"}
NAMES = ("lora_rank", "learning_rate", *SIZES[0].options, *_ALL_SIZES)


def size_defaults(parameters: float, lora_rank: int | None = None) -> dict[str, Any]:
    """Return the default options of a model, by name.

    Args:
        parameters: the number of its parameters.
        lora_rank: rank of the adapter, if it is set; 0 for all weights. The learning rate depends on it.
    """
    size = next(size for size in SIZES if parameters < size.below)
    rank = size.lora_rank if lora_rank is None else lora_rank
    return {
        "lora_rank": rank,
        "learning_rate": size.adapter_rate if rank else size.full_rate,
        **size.options,
        **_ALL_SIZES,
    }


def describe_defaults(parameters: float, chosen: dict[str, Any]) -> str:
    """Return the line that tells the user which options were chosen, and why."""
    unit = next((unit for unit in ((1e9, "B"), (1e6, "M")) if parameters >= unit[0]), (1, ""))
    count = f"{parameters / unit[0]:.1f}{unit[1]}" if unit[1] else str(parameters)
    options = ", ".join(f"{name} {value}" for name, value in chosen.items())
    return f"defaults for a model of {count} parameters: {options}. Set --defaults paper for the paper's."
