"""Rewards: functions that score completions; a higher score is better. See `Reward` for their protocol.

Examples:
    resolve("profanity")                              # a name of REWARDS
    resolve("my_rewards.py:kindness")                 # a function of a file, or module:function
    resolve("unitary/toxic-bert", label="not toxic")  # a sequence classifier: a hub name or a directory
    resolve("perspective?attribute=INSULT")           # any of these with options, as in a URL
    Scorer(["vader", my_function], weights=[1, 0.5])(prompts, completions, completion_ids, columns).rewards
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cache": ["ScoreCache"],
        "registry": ["REWARDS", "resolve"],
        "reward": ["Reward"],
        "scorer": ["Scorer", "Scores"],
        "custom": ["load_function"],
        "functions": ["Classifier", "Judge", "Perspective", "Profanity", "Repetition", "Vader"],
    },
)
