"""Rewards: any function that scores text, higher is better.

    resolve("profanity")                              # a name of REWARDS
    resolve("my_rewards.py:kindness")                 # a function of a file, or module:function
    resolve("unitary/toxic-bert", label="not toxic")  # a sequence classifier, from the hub or a directory
    resolve("perspective?attribute=INSULT")           # any of them with options, as in a URL
    Scorer(["vader", my_function], weights=[1, 0.5])(prompts, completions, completion_ids, columns).rewards

A reward is called by keyword, `f(prompts, completions, completion_ids, **columns)`, with as much of that as
it accepts, and returns one number per completion, or None where it has none. It may be `async`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cache": ["ScoreCache"],
        "registry": ["REWARDS", "resolve"],
        "scorer": ["Scorer", "Scores"],
        "custom": ["load_function"],
        "functions": ["Classifier", "Judge", "Perspective", "Profanity", "Repetition", "Vader"],
    },
)
