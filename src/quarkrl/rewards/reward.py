"""The `Reward` protocol: what a reward function receives, what it returns, and its optional attributes."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

# `on_score(row, score)`: a reward reports the score of one completion before it has scored all of them.
OnScore = Callable[[int, float | None], None]


def discard_score(row: int, score: float | None) -> None:
    """The `on_score` of a reward without a cache."""


# Parameters that hold one value for the whole batch. All other parameters hold one value per completion.
END_IDS, ON_SCORE = "end_ids", "on_score"
TRAINER_STATE, LOG_EXTRA, LOG_METRIC = TRL_PARAMETERS = ("trainer_state", "log_extra", "log_metric")
BATCH_PARAMETERS = (END_IDS, ON_SCORE, *TRL_PARAMETERS)
PARAMETERS = ("prompts", "completions", "completion_ids", *BATCH_PARAMETERS)


class Reward(Protocol):
    """A function that scores n completions. A higher score is better.

    A reward is called by keyword, with those of the arguments below that it has a parameter for. A parameter
    `**kwargs` receives all of them but `end_ids` and `on_score`. A parameter `**_` receives none. Arguments are copies:
    a reward may change them. It runs in a thread of its own.

    Args:
        prompts: n texts or chats (lists of messages).
        completions: n texts. The completion of a chat is a list of one message, `{"role": "assistant", "content": …}`.
        completion_ids: n lists of token ids, EOS included; empty lists if the texts were not sampled by a model.
        end_ids: the token ids that end a completion.
        trainer_state: the trainer's `transformers.TrainerState`; a new one outside training.
        log_extra: `log_extra(column, values)` adds a column, with n values, to the samples of the run.
        log_metric: `log_metric(name, value)` adds a number to the run's log.
        on_score: `on_score(row, score)` writes one score to the score cache at once. Call it in the thread in which
            the reward was called.
        NAME: n values of the column NAME of the prompts' data set.

    Returns:
        n scores as a list, tuple, array or tensor of numbers. None is a completion without a score. Non-finite values
        are missing scores too, but a score cache does not store them. An async reward returns an awaitable of the
        scores; all async rewards of a batch run concurrently on one event loop.

    Attributes (all optional):
        name (str): the reward's name in files, logs and messages. Default: the name of the function or class.
        identity (dict): JSON-able provenance of the scores, such as a model and the hash of its weights. It is stored
            with the scores. Equal identities must give equal scores, so only rewards with an identity are cached.
        cached (bool): False keeps the scores of a reward with an identity out of the score cache. Default: True.
        reads (tuple[str, ...]): the arguments that determine a score, which are the key of the score cache. Default:
            all arguments that the reward accepts.
        completions_as_text (bool): True makes the completion of a chat a text, too. Default: False.
        unwanted (str | None): what 1 - reward measures if the reward is a probability, such as "toxicity".
        wanted (str | None): the class that a high reward indicates, such as "positive".
        wanted_from (float | None): the reward from which a text counts as `wanted`. Default: the evaluation's
            threshold.
    """

    def __call__(self, *args: Any, **arguments: Any) -> Any:
        """Return one number or None for each completion, or an awaitable of that."""
        ...


def is_cached(reward: Reward) -> bool:
    """Return whether a score cache stores the scores of `reward`: it has an identity and does not opt out."""
    return getattr(reward, "identity", None) is not None and getattr(reward, "cached", True)


def reads_text(reward: Reward) -> bool:
    """Return whether `reward` reads the completion of a chat as text, by its attribute `completions_as_text`."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return bool(getattr(reward, "completions_as_text", False))
