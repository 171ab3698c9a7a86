"""`PromptSupply`: the prompts that each iteration explores, from memory or from a stream."""

from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import DatasetDict, IterableDataset, IterableDatasetDict

from quarkrl.algorithm.schedule import schedule_prompts
from quarkrl.builtin import locate_prompts
from quarkrl.data.prompts import Prompts, load_prompts
from quarkrl.data.rows import quote_names
from quarkrl.data.stream import PromptStream
from quarkrl.errors import UserError
from quarkrl.runs.collectives import call_in_first_process
from quarkrl.training.config import QuarkConfig


def encode_prompts_of(name: str, source: Any, encode: Callable[..., Prompts], skip_bad: bool) -> Prompts:
    """Load prompts from any source that fits into memory, and encode them.

    Args:
        name: of the argument, for messages.
        source: `Prompts`, or what `load_prompts` reads.
        encode: encodes the prompts.
        skip_bad: skip rows that cannot be read, instead of raising.

    Raises:
        UserError: the source has several splits or cannot be read, or a prompt is bad.
    """
    return encode(read_prompts_of(name, source, skip_bad))


def read_prompts_of(name: str, source: Any, skip_bad: bool) -> Prompts:
    """Load prompts from any source that fits into memory; see `encode_prompts_of`."""
    if isinstance(source, DatasetDict | IterableDatasetDict):
        split = next(iter(source), "train")
        raise UserError(
            f"{name}: must be one split, not a {type(source).__name__} of {quote_names(source)}. Pass one of them, "
            f"such as dataset[{split!r}]."
        )
    if isinstance(source, str):
        source = locate_prompts(source, "eval" if name == "eval_dataset" else "train") or source
    return source if isinstance(source, Prompts) else load_prompts(source, skip_bad=skip_bad)


class PromptSupply:
    """The prompts that each iteration explores: some of those in memory, or the next ones of a stream.

    Args:
        source: `Prompts`, what `load_prompts` reads, or an `IterableDataset`.
        encode: encodes prompts: `Prompts.encode` with its arguments.
        args: the options of the run.

    Attributes:
        streamed: whether the prompts come from a stream.
        first: all prompts; of a stream, those of the first iteration.

    Raises:
        UserError: a stream has no `prompts_per_iteration`, or the source or a prompt is bad.
    """

    def __init__(self, source: Any, encode: Callable[..., Prompts], args: QuarkConfig):
        self._args = args
        self.streamed = isinstance(source, IterableDataset)
        if not self.streamed:
            self.first = encode_prompts_of("train_dataset", source, encode, args.skip_bad_prompts)
            return
        if args.prompts_per_iteration is None:
            raise UserError(
                "prompts_per_iteration None: must be a number for a streamed train_dataset. Set it to the prompts that "
                "an iteration explores."
            )
        self._stream = PromptStream(
            source,
            partial(encode, allow_none=True),
            group_size=args.prompts_per_iteration,
            skip_bad=args.skip_bad_prompts,
        )
        self.first = self._read_group(0)

    def schedule(self, iteration: int) -> tuple[Prompts, list[int]]:
        """Return the prompts of an iteration, and for each completion to sample the row of its prompt.

        Raises:
            UserError: the stream cannot be read, or one of its rows is bad.
        """
        prompts, args = self.first, self._args
        number, count = iteration, args.prompts_per_iteration
        if self.streamed:
            prompts, number, count = self._read_group(iteration), 0, None  # An iteration explores its whole group.
        return prompts, schedule_prompts(prompts.ids, number, count, args.samples_per_prompt, args.seed)

    def _read_group(self, number: int) -> Prompts:
        """Read a group in the first process, so that all processes get the same prompts."""
        args = self._args
        return call_in_first_process(lambda: self._stream.group(number), args.process_index, args.world_size)
