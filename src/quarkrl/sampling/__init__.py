"""Text out: how the next token is chosen, cached decoding, guidance, and the generator."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "generator": ["QuarkGenerator"],
        "guidance": ["Guidance"],
        "strategy": ["Sampling"],
    },
)
