"""The built-in rewards, one file each. `endpoint`, `response` and `rate_limiter` are shared by those over HTTP."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "brevity": ["Brevity"],
        "classifier": ["Classifier"],
        "judge": ["Judge"],
        "perspective": ["Perspective"],
        "profanity": ["Profanity"],
        "repetition": ["Repetition"],
        "vader": ["Vader"],
    },
)
