"""What survives a crash and can be resumed: run directory, checkpoints, interrupts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "interrupts": ["Stopped"],
    },
)
