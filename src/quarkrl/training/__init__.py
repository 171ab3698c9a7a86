"""Training with Quark: start with trainer.py."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["QuarkConfig"],
        "trainer": ["QuarkTrainer"],
    },
)
