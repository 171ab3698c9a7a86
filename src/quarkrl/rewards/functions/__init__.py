"""The rewards that come with quarkrl, one file each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "classifier": ["Classifier"],
        "judge": ["Judge"],
        "perspective": ["Perspective"],
        "profanity": ["Profanity"],
        "repetition": ["Repetition"],
        "vader": ["Vader"],
    },
)
