"""The rewards that a model was trained with, for commands that score its completions and name no reward."""

from typing import NamedTuple

from quarkrl.cli.inputs import check_rewards
from quarkrl.errors import UserError
from quarkrl.runs.records import OPTIONS_FILE, options_of_run


class RunRewards(NamedTuple):
    """Rewards as options name them.

    Attributes:
        names: for `resolve`.
        label: of a classifier, if there is one.
    """

    names: list[str]
    label: str | None = None


def rewards_of_training(model: str) -> RunRewards | None:
    """Return the rewards that a model was trained with; None if nothing tells.

    Functions of the user's own are taken from `config.yaml` of the directory of a run, which the user has started.
    Code that `quark.json` names is never run, because the model may be a stranger's.

    Args:
        model: the directory of a run, or of a model.

    Raises:
        UserError: a reward does not exist here, or is a function that only `quark.json` names.
    """
    from quarkrl.models.quark_json import read_quark_json
    from quarkrl.rewards.recorded import specs_of

    options = options_of_run(model)
    if names := options.get("reward"):
        rewards = RunRewards([names] if isinstance(names, str) else list(names), options.get("reward_label"))
        try:
            check_rewards(rewards.names, rewards.label)
        except UserError as error:
            raise UserError(
                f"{error} {OPTIONS_FILE} of the run names it: start the command where training was started, or set "
                "--reward."
            ) from error
        return rewards
    recorded = (read_quark_json(model) or {}).get("rewards")
    return None if recorded is None else RunRewards(specs_of(recorded))
