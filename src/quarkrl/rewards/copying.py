"""Copies of a reward's arguments, so that a reward that changes them changes nothing of the run."""

import copy
from typing import Any

_IMMUTABLE = frozenset({str, bytes, int, float, complex, bool, type(None)})


def copy_value(value: Any) -> Any:
    """Return a deep copy. An object that refuses to be copied is returned itself.

    Data sets hold lists and dicts of texts and numbers. For those it is ten times faster than `copy.deepcopy`.
    """
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is list:
        return value.copy() if _IMMUTABLE.issuperset(map(type, value)) else [copy_value(item) for item in value]
    if kind is dict:
        return {key: copy_value(item) for key, item in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - a column of the user's own objects, such as a connection
        return value


def copy_state(state: Any) -> Any:
    """Return a copy of a `transformers.TrainerState`; a new one for None, as outside training."""
    if state is None:
        from transformers import TrainerState

        return TrainerState()
    state = copy.copy(state)
    state.log_history = [dict(row) for row in state.log_history]
    state.stateful_callbacks = copy_value(state.stateful_callbacks)
    return state
