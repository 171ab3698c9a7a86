"""`resolve`: turn the name, path or callable that a user gives into a reward function."""

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from quarkrl.errors import UserError, did_you_mean
from quarkrl.rewards.custom import load_function
from quarkrl.rewards.functions.brevity import Brevity
from quarkrl.rewards.functions.classifier import Classifier, sentiment, toxicity
from quarkrl.rewards.functions.judge import Judge
from quarkrl.rewards.functions.perspective import Perspective
from quarkrl.rewards.functions.profanity import Profanity
from quarkrl.rewards.functions.repetition import Repetition
from quarkrl.rewards.functions.vader import Vader
from quarkrl.rewards.near_names import own_function_hint
from quarkrl.rewards.reward import Reward
from quarkrl.rewards.spec import missing_options, options_of, read_options, split_spec

# The factory of each named reward. Its keyword arguments are the options of a spec.
REWARDS: dict[str, Callable[..., Reward]] = {
    "brevity": Brevity,
    "judge": Judge,
    "perspective": Perspective,
    "profanity": Profanity,
    "repetition": Repetition,
    "sentiment": sentiment,
    "toxicity": toxicity,
    "vader": Vader,
    "vader-negative": partial(Vader, negative=True),
}


def resolve(
    spec: str | os.PathLike[str] | Reward,
    *,
    label: str | int | None = None,
    unwanted: str | None = None,
    device: str | None = None,
) -> Reward:
    """Return the reward function that `spec` names.

    Args:
        spec: a name of `REWARDS`, `file.py:function`, `module:function`, or the directory or hub name of a sequence
            classifier; each may have options, `NAME?option=value&option=value`. A callable is returned unchanged.
        label: for a classifier: the label whose probability is the reward, or "not LABEL" for 1 - P(LABEL).
        unwanted: for a classifier: the name of what 1 - reward measures, such as "toxicity".
        device: for a classifier: where it runs. Default: the accelerator, if there is one. Other rewards ignore it.

    An option of the spec overrides the argument of the same name.

    Raises:
        UserError: the reward does not exist, or an option is unknown, missing or invalid. So are `label` and `unwanted`
            for a reward that is not a classifier.
    """
    return _prepare(spec, {"label": label, "unwanted": unwanted, "device": device})()


def check_reward(spec: str, label: str | None = None) -> None:
    """Check what can be checked of a reward before its model is loaded. A function of the user's own is imported.

    Args:
        spec, label: as in `resolve`.

    Raises:
        UserError: as in `resolve`.
    """
    _prepare(spec, {"label": label})


def _prepare(spec: Any, arguments: dict[str, Any]) -> Callable[[], Reward]:
    """Return what makes the reward, with checked options."""
    arguments = {option: value for option, value in arguments.items() if value is not None}
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    if not isinstance(spec, str):
        reward = _checked_callable(spec, repr(spec))
        _refuse_classifier_arguments(arguments, spec)
        return lambda: reward
    name, option_texts = split_spec(spec)
    if name not in REWARDS and not os.path.isdir(os.path.expanduser(name)) and (":" in name or name.endswith(".py")):
        function = _checked_callable(load_function(name), repr(name))
        _refuse_classifier_arguments(arguments, name)
        if option_texts:
            function = partial(function, **read_options(name, function, option_texts))
        return lambda: function
    if name in REWARDS:
        factory = REWARDS[name]
    else:
        _refuse_misspelt(name)
        factory = partial(Classifier, name)
    known = options_of(factory)
    _refuse_classifier_arguments({option: value for option, value in arguments.items() if option not in known}, name)
    options = {option: value for option, value in arguments.items() if option in known}
    options |= read_options(name, factory, option_texts)
    if missing := missing_options(factory, options):
        example = "&".join(f"{option}=…" for option in missing)
        raise UserError(f"reward {name!r} options {', '.join(missing)}: must be set. Write '{name}?{example}'.")
    return partial(factory, **options)


def _refuse_classifier_arguments(arguments: dict[str, Any], spec: Any) -> None:
    """Raise if `label` or `unwanted` would have no effect. `device` may be given for all rewards together."""
    for option in ("label", "unwanted"):
        if option in arguments:
            raise UserError(
                f"{option} {arguments[option]!r}: must be unset, because reward {spec!r} is not a classifier."
            )


def _checked_callable(reward: Any, spec: str) -> Reward:
    if inspect.isclass(reward):
        raise UserError(f"reward {spec}: must be a function or an object, not a class. Use {reward.__name__}(…).")
    if not callable(reward):
        raise UserError(f"reward {spec}: must be a function, a name or a path, not of type {type(reward).__name__}.")
    return reward


def _refuse_misspelt(name: str) -> None:
    """Raise at once for a name that can be neither a directory nor on the hub, or resembles a known name."""
    if not name.strip():
        raise UserError(f"reward {name!r}: must be one of {', '.join(REWARDS)}, file.py:function, or a classifier.")
    if os.path.isdir(os.path.expanduser(name)):
        return
    if suggestion := did_you_mean(name.lower(), REWARDS, cutoff=0.7):
        raise UserError(f"reward {name!r}: must be a known name.{suggestion} (known: {', '.join(REWARDS)})")
    if name.isidentifier():  # On the hub, names of classifiers have an owner or a hyphen.
        raise UserError(
            f"reward {name!r}: must be one of {', '.join(REWARDS)}, FILE.py:FUNCTION, or a classifier: a directory or "
            f"OWNER/NAME.{own_function_hint(name)}"
        )
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise UserError(f"reward {name!r}: must be an existing directory.")
