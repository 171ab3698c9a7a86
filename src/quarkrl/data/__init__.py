"""Prompts in: reading them from files and data sets, and truncating texts to prompts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "prompts": ["Prompts", "load_prompts"],
    },
)
