"""`RewardLog`: columns and metrics that a reward logs through TRL's `log_extra` and `log_metric`."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from quarkrl.errors import UserError


class RewardLog:
    """Collects what one reward logs about completions.

    Args:
        rows: the number of each completion in the batch.
    """

    def __init__(self, rows: Sequence[int]):
        self._rows = list(rows)
        self._columns: dict[str, list[Any]] = {}
        self._values: dict[str, list[float]] = {}
        self._parts: list[RewardLog] = []

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Log a column: one value per completion, in one call or in several."""
        self._columns.setdefault(str(column), []).extend(values)

    def log_metric(self, name: str, value: Any) -> None:
        """Log a number. The run's log shows the mean over all calls of an iteration."""
        self._values.setdefault(str(name), []).append(float(value))

    def select(self, rows: Sequence[int]) -> "RewardLog":
        """Return a log for some of the completions. Its content is part of this log."""
        part = RewardLog([self._rows[row] for row in rows])
        self._parts.append(part)
        return part

    def columns(self, reward: str) -> dict[str, list[str | None]]:
        """Return the logged columns as texts, one value per completion; None where nothing was logged.

        Args:
            reward: the reward's name, for error messages.

        Raises:
            UserError: a column has another number of values than its completions.
        """
        columns: dict[str, list[str | None]] = {}
        for part in (self, *self._parts):
            for name, values in part._columns.items():
                if len(values) != len(part._rows):
                    raise UserError(
                        f"reward {reward!r} log_extra {name!r}: must have {len(part._rows)} values, one per "
                        f"completion, not {len(values)}."
                    )
                column = columns.setdefault(name, [None] * len(self._rows))
                for row, value in zip(part._rows, values, strict=True):
                    column[row] = _as_text(value)
        return columns

    def metrics(self) -> dict[str, list[float]]:
        """Return the logged numbers by name."""
        metrics: dict[str, list[float]] = {}
        for part in (self, *self._parts):
            for name, values in part._values.items():
                metrics.setdefault(name, []).extend(values)
        return metrics


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)
