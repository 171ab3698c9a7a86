"""Measuring a model: samples, scores, metrics, confidence intervals, and where they came from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "evaluate": ["evaluate"],
    },
)
