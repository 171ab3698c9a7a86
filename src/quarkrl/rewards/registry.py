"""The names of rewards, and what a reward given by name, path or function means."""

import inspect
import os
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from quarkrl.errors import UserError
from quarkrl.rewards.custom import load_function
from quarkrl.rewards.functions.classifier import Classifier, sentiment, toxicity
from quarkrl.rewards.functions.judge import Judge
from quarkrl.rewards.functions.perspective import Perspective
from quarkrl.rewards.functions.profanity import Profanity
from quarkrl.rewards.functions.repetition import Repetition
from quarkrl.rewards.functions.vader import Vader
from quarkrl.rewards.spec import missing_options, options_of, read_options, split_spec

# What makes each reward; its keyword arguments are the options that a spec may give.
REWARDS: dict[str, Callable[..., Callable[..., Any]]] = {
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
    spec: str | os.PathLike[str] | Callable[..., Any],
    *,
    label: str | int | None = None,
    unwanted: str | None = None,
    device: str | None = None,
) -> Callable[..., Any]:
    """The reward function that `spec` means.

    Args:
        spec: a callable (taken as it is), a name of `REWARDS`, `file.py:function`, `module:function`, or a
            sequence classifier's directory or hub name; with options of its own as `NAME?option=value&option=value`.
        label: for a classifier, the label whose probability is the reward, or "not LABEL" for 1 - P(LABEL).
        unwanted: for a classifier, the name of what 1 - reward measures, such as "toxicity".
        device: for a classifier, where it runs; the accelerator by default, if there is one.

    An option in the spec goes before the argument of that name.

    Raises:
        UserError: nothing usable goes by that name, it has no such option or needs one that is not given, a value is
            not of its option's type, or `label` or `unwanted` is given without a classifier.
    """
    arguments = {"label": label, "unwanted": unwanted, "device": device}
    arguments = {option: value for option, value in arguments.items() if value is not None}
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    if not isinstance(spec, str):
        reward = _checked_callable(spec)
        _refuse(arguments, spec)
        return reward
    name, options = split_spec(spec)
    if name not in REWARDS and not os.path.isdir(os.path.expanduser(name)) and (":" in name or name.endswith(".py")):
        function = _checked_callable(load_function(name), name)
        _refuse(arguments, name)
        return partial(function, **read_options(name, function, options)) if options else function
    if name in REWARDS:
        factory = REWARDS[name]
    else:
        _refuse_misspelt(name)
        factory = partial(Classifier, name)
    given = read_options(name, factory, options)
    known = options_of(factory)
    _refuse({option: value for option, value in arguments.items() if option not in known}, name)
    given = {option: value for option, value in arguments.items() if option in known} | given
    if missing := missing_options(factory, given):
        wanted = "&".join(f"{option}=…" for option in missing)
        raise UserError(f"reward {name!r} needs {', '.join(missing)}: write '{name}?{wanted}'")
    return factory(**given)


def _refuse(arguments: dict[str, Any], spec: Any) -> None:
    """`device` may be given to all alike; the others would be passed over in silence."""
    for option in ("label", "unwanted"):
        if option in arguments:
            raise UserError(
                f"{option} is {arguments[option]!r}, but reward {spec!r} is no classifier: leave {option} out"
            )


def _checked_callable(reward: Any, spec: str | None = None) -> Callable[..., Any]:
    what = f"reward {spec!r}" if spec else f"reward {reward!r}"
    if inspect.isclass(reward):
        raise UserError(f"{what} is a class: give an object of it, {reward.__name__}(…)")
    if not callable(reward):
        wanted = "a function" if spec else "a function, a name or a path"
        raise UserError(f"{what} is of type {type(reward).__name__}: {wanted} is wanted")
    return reward


def _refuse_misspelt(spec: str) -> None:
    """Say so at once where a name can be neither a directory nor on the hub, or is nearly one of ours."""
    known = ", ".join(REWARDS)
    near = get_close_matches(spec.lower(), REWARDS, n=1, cutoff=0.7)
    if not spec.strip():
        raise UserError(f"the reward's name is empty: give one of {known}, file.py:function, or a classifier")
    if os.path.isdir(os.path.expanduser(spec)):
        return
    if near:
        raise UserError(f"there is no reward {spec!r}: did you mean {near[0]!r}? (known: {known})")
    if spec.startswith((".", "/", "~")) or "\\" in spec or spec.count("/") > 1:
        raise UserError(f"reward {spec!r}: there is no such directory")
