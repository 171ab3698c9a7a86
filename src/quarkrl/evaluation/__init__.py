"""Measure a model: sample and score completions, compute metrics with confidence intervals, record the protocol."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "evaluate": ["evaluate"],
        "options": ["EvaluationOptions"],
        "results": ["CorpusRow", "Evaluation", "Row"],
    },
)
