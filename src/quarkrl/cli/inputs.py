"""Checks of what options name, before torch and transformers are imported, which takes many seconds."""

import os
from collections.abc import Iterable
from pathlib import Path

from quarkrl.builtin import BUILTIN, locate_prompts, near_builtin
from quarkrl.cli.common import working_directory
from quarkrl.errors import UserError, near_file
from quarkrl.names import is_missing_path


def check_model(name: str | None, option: str = "model") -> None:
    """Check that a model exists, unless it may be a name on the hub.

    Args:
        name: a directory, a file, a name, or builtin; None is not checked.
        option: the option that names it, for the message.

    Raises:
        UserError: it is a path, and there is nothing.
    """
    if name is None or name == BUILTIN:
        return
    hint = near_builtin(name)
    if hint or is_missing_path(name):
        path = Path(name).expanduser()
        hint = hint or near_file(path, (entry.name for entry in path.parent.glob("*")))
        raise UserError(
            f"{option} {name!r}: must be an existing directory or file, builtin, or a name on the hub."
            f"{hint or ' Correct the path.'}"
        )


def check_prompts(*names: str | None) -> None:
    """Check that files of prompts exist; None, builtin and names of data sets are not checked.

    Raises:
        UserError: one does not exist.
    """
    from quarkrl.data.readers import check_exists

    for name in names:
        if name is not None and locate_prompts(name, "train") is None:
            check_exists(name)


def check_rewards(names: Iterable[str], label: str | None = None) -> None:
    """Check names and options of rewards. Functions of the user's own are imported.

    Raises:
        UserError: one is wrong.
    """
    from quarkrl.rewards.registry import check_reward

    with working_directory(os.getcwd()):  # Importing a reward may change it.
        for name in names:
            check_reward(name, label)


def missing_reward(why: str = "") -> UserError:
    """Return the error for an option `reward` that is not set, with the names that it takes."""
    from quarkrl.rewards.registry import REWARDS

    return UserError(
        f"reward is missing{why}. Set --reward to {', '.join(REWARDS)}, FILE.py:FUNCTION, or a classifier "
        "(docs/rewards.md)."
    )
