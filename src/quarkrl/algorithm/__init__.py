"""The paper as code: the loss, its coefficients, the data pool with its quantiles, and the order of the data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "coefficients": ["Coefficients"],
        "loss": ["QuarkLoss", "quark_loss"],
        "pairs": ["dpo_loss", "find_pairs"],
        "pool": ["DataPool"],
        "schedule": ["bucket_by_length", "schedule_prompts"],
    },
)
