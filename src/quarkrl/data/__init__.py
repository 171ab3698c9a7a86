"""Prompts in: read, checked, truncated, and encoded as token ids."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "prompts": ["Prompts", "load_prompts"],
    },
)
