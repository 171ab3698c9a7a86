"""`PromptStream`: the prompts of a streamed data set, of which one iteration's are in memory at a time."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

from quarkrl.data.prompts import Prompts, check_rows
from quarkrl.data.rows import Row, choose_column, restore_chats
from quarkrl.errors import UserError, describe_exception

_NAME = "train_dataset"


class PromptStream:
    """Groups of prompts from a `datasets.IterableDataset`, in its order. After its last row, the stream starts again.

    Which prompts a group has is a function of the data set and of these arguments. A resumed run therefore gets the
    same groups. It reads the stream from the start to reach the first group that it explores.

    Args:
        dataset: the data set; each pass over it gives the same rows, or those of `set_epoch(pass)` if it is shuffled.
        encode: encodes prompts, maybe none: `Prompts.encode` with its arguments.
        group_size: prompts in a group, skipped ones excluded.
        skip_bad: skip and count bad rows, instead of raising at the first one.
    """

    def __init__(self, dataset: Any, encode: Callable[[Prompts], Prompts], *, group_size: int, skip_bad: bool):
        self._dataset = dataset.with_format(None)
        self._encode, self._group_size, self._skip_bad = encode, group_size, skip_bad
        self._column: str | None = None
        self._start()

    def group(self, number: int) -> Prompts:
        """Return the encoded prompts of a group, counted from 0.

        Raises:
            UserError: a row is bad or cannot be read, or a pass has fewer good prompts than a group.
        """
        if number < self._number:
            self._start()
        while self._number < number:
            self._group = self._read_group()
            self._number += 1
        return self._group

    def _start(self) -> None:
        self._number = -1
        self._start_pass(0)

    def _start_pass(self, number: int) -> None:
        self._dataset.set_epoch(number)
        self._pass, self._good_in_pass = number, 0
        self._rows = self._read_rows("the stream" if not number else f"pass {number + 1} of the stream")

    def _read_group(self) -> Prompts:
        parts, missing = [], self._group_size
        while missing:
            if rows := list(islice(self._rows, missing)):
                parts.append(self._check(rows))
                missing -= len(parts[-1])
                self._good_in_pass += len(parts[-1])
            elif self._good_in_pass < self._group_size:
                raise UserError(
                    f"prompts_per_iteration {self._group_size}: must be at most {self._good_in_pass}, the prompts in "
                    f"pass {self._pass + 1} of {_NAME}. Lower it, or stream more prompts."
                )
            else:
                self._start_pass(self._pass + 1)
        return Prompts.join(parts)

    def _check(self, rows: list[Row]) -> Prompts:
        if self._column is None:
            self._column = choose_column(_NAME, [row for _, row in rows], "prompt")
        return self._encode(check_rows(rows, self._column, skip_bad=self._skip_bad))

    def _read_rows(self, name: str) -> Iterator[Row]:
        rows = iter(self._dataset)
        for number in count(1):
            location = f"row {number} of {name}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # Formats, network and the user's own generators raise many types.
                raise UserError(f"{location}: cannot be read ({describe_exception(error)}). Fix the cause.") from error
            yield location, restore_chats(row)
