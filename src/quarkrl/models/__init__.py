"""A causal language model seen from outside: loading, reward tokens, tokenizer, logits, batches, export."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conditioning": ["Conditioning"],
        "export": ["save_steered"],
        "loading": ["load_model", "load_tokenizer"],
    },
)
