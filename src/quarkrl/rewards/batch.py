"""`Batch`: the arguments that reward functions may receive for n completions."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from quarkrl.data.chats import as_messages
from quarkrl.data.rows import quote_names
from quarkrl.errors import UserError, did_you_mean
from quarkrl.rewards.copying import copy_state, copy_value
from quarkrl.rewards.reward import (
    BATCH_PARAMETERS,
    END_IDS,
    LOG_EXTRA,
    LOG_METRIC,
    ON_SCORE,
    TRAINER_STATE,
    TRL_PARAMETERS,
    OnScore,
    Reward,
    discard_score,
    reads_text,
)
from quarkrl.rewards.reward_log import RewardLog

_ALWAYS = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class Batch:
    """All arguments that a reward function may receive for n completions.

    Attributes:
        columns: by parameter name, one value per completion: the data set's columns, prompts, completions and
            completion_ids.
        end_ids: the token ids that end a completion.
        log: what the reward logs.
        trainer_state: the state of the trainer; None outside training.
        on_score: receives the row and the score of a completion as soon as the reward knows it.
    """

    columns: dict[str, list[Any]]
    end_ids: list[int]
    log: RewardLog
    trainer_state: Any = None
    on_score: OnScore = discard_score

    @classmethod
    def of(
        cls,
        prompts: list[Any],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        end_ids: Sequence[int],
        trainer_state: Any = None,
    ) -> "Batch":
        """A batch of n completions, with the other columns of their prompts."""
        columns = {name: values for name, values in columns.items() if name not in BATCH_PARAMETERS}
        columns |= dict(zip(_ALWAYS, (prompts, completions, completion_ids), strict=True))
        assert all(len(values) == len(completions) for values in columns.values())
        return cls(columns, list(end_ids), RewardLog(range(len(completions))), trainer_state)

    def __len__(self) -> int:
        return len(self.columns["completions"])

    def with_own_log(self) -> "Batch":
        """The same batch for another reward, whose log is its own."""
        return replace(self, log=RewardLog(range(len(self))))

    def select(self, rows: Sequence[int], on_score: OnScore) -> "Batch":
        """The batch of these rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, log=self.log.select(rows), on_score=on_score)

    def argument_names(self, name: str, reward: Reward) -> list[str]:
        """The names of the arguments that `reward` accepts.

        Raises:
            UserError: the reward has a required parameter that no column fills.
        """
        try:
            parameters = inspect.signature(reward).parameters.values()
        except (TypeError, ValueError):  # Implemented in C, without a signature.
            return list(self.columns)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        available = (*self.columns, *BATCH_PARAMETERS)
        missing = [p.name for p in by_name if p.default is p.empty and p.name not in available]
        if missing:
            remedy = f", give the parameter a default, or set it behind the name of the reward: NAME?{missing[0]}=VALUE"
            raise UserError(f"reward {name!r} parameter {missing[0]!r}: {self.must_be_a_column(missing[0], remedy)}")
        named = [p.name for p in by_name if p.name in available]
        takes_all = any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in parameters)
        return list(dict.fromkeys([*named, *self.columns, *TRL_PARAMETERS])) if takes_all else named

    def arguments_for(self, name: str, reward: Reward) -> dict[str, Any]:
        """Copies of the arguments that `reward` accepts.

        Raises:
            UserError: the reward has a required parameter that no column fills.
        """
        return {argument: self._copy_of(argument, reward) for argument in self.argument_names(name, reward)}

    def _copy_of(self, argument: str, reward: Reward) -> Any:
        if argument == "completions" and not reads_text(reward):
            return as_messages(self.columns["prompts"], self.columns["completions"])
        if argument in self.columns:
            return copy_value(self.columns[argument])
        if argument == TRAINER_STATE:
            return copy_state(self.trainer_state)
        return {
            END_IDS: list(self.end_ids),
            ON_SCORE: self.on_score,
            LOG_EXTRA: self.log.log_extra,
            LOG_METRIC: self.log.log_metric,
        }[argument]

    def must_be_a_column(self, unknown: str, remedy: str = "") -> str:
        """The end of an error message about a column that does not exist.

        Args:
            unknown: its name.
            remedy: what else the user can do, beside adding the column.
        """
        others = [column for column in self.columns if column not in _ALWAYS]
        existing = f"whose columns are {quote_names(others)}" if others else "which have no further column"
        hint = did_you_mean(unknown, self.columns) or f" Add a column {unknown!r} to the prompts{remedy}."
        return f"must be {', '.join(_ALWAYS)}, or a column of the prompts, {existing}.{hint}"
