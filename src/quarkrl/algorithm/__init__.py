"""The paper: the loss, the data pool with its quantiles, and the schedule of prompts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loss": ["Coefficients", "quark_loss"],
        "pool": ["DataPool"],
    },
)
