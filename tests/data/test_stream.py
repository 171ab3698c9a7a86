"""A streamed data set: groups of prompts, in order, the same ones for a resumed run, and never more in memory."""

from __future__ import annotations

from functools import partial

import pytest
from datasets import Dataset, IterableDataset
from helpers.errors import error_message
from helpers.prompt_helpers import byte_tokenizer

from quarkrl.data.prompts import Prompts
from quarkrl.data.stream import PromptStream


class Source:
    """A data set of the texts p0, p1, …; it counts the rows that were read."""

    def __init__(self, count: int = 10, **others):
        self.count, self.read, self.others = count, 0, others

    def rows(self):
        for i in range(self.count):
            self.read += 1
            yield self.others.get(f"row_{i}", {"prompt": f"p{i}", "n": i})

    def stream(self, group_size: int = 3, skip_bad: bool = False, **how) -> PromptStream:
        return stream_of(IterableDataset.from_generator(self.rows), group_size, skip_bad=skip_bad, **how)


def stream_of(dataset: IterableDataset, group_size: int, max_length: int = 9, skip_bad: bool = False) -> PromptStream:
    encode = partial(
        Prompts.encode, tokenizer=byte_tokenizer(), max_length=max_length, skip_bad=skip_bad, allow_none=True
    )
    return PromptStream(dataset, encode, group_size=group_size, skip_bad=skip_bad)


def test_groups_follow_each_other_and_the_stream_starts_again_at_its_end():
    stream = Source(count=7).stream(3)
    groups = [stream.group(number) for number in range(4)]
    assert [group.prompts for group in groups] == [
        ["p0", "p1", "p2"],
        ["p3", "p4", "p5"],
        ["p6", "p0", "p1"],
        ["p2", "p3", "p4"],
    ]
    assert groups[2].columns == {"n": [6, 0, 1]}
    assert groups[2].locations == [
        "row 7 of the stream",
        "row 1 of pass 2 of the stream",
        "row 2 of pass 2 of the stream",
    ]
    assert groups[0].ids == [byte_tokenizer()(text).input_ids for text in ["p0", "p1", "p2"]]


def test_no_row_is_read_before_its_group():
    source = Source(count=1000)
    stream = source.stream(3)
    for number in range(3):
        stream.group(number)
        stream.group(number)  # It is still there.
        assert source.read == 3 * (number + 1)


def test_a_new_stream_reaches_a_later_group_and_an_earlier_one():
    stream = Source(count=7).stream(3)
    assert stream.group(5).prompts == ["p1", "p2", "p3"]  # Prompts 15, 16 and 17 of p0 … p6 p0 … p6 p0 …
    assert stream.group(2).prompts == ["p6", "p0", "p1"]


def test_bad_rows_are_replaced_by_those_that_follow():
    bad = {"row_1": {"prompt": "", "n": 1}, "row_4": {"prompt": "much too long", "n": 4}}
    stream = Source(**bad).stream(3, skip_bad=True)
    groups = [stream.group(number) for number in range(2)]
    assert [group.prompts for group in groups] == [["p0", "p2", "p3"], ["p5", "p6", "p7"]]
    assert [group.skipped for group in groups] == [{"empty prompt": 1}, {"too long": 1}]
    assert Source(**bad).stream(3, skip_bad=True).group(1) == groups[1]
    error_message(lambda: Source(**bad).stream(3).group(0), "row 2 of the stream: the prompt is empty")
    strict = Source(row_4=bad["row_4"]).stream(3)
    strict.group(0)
    error_message(lambda: strict.group(1), "row 5 of the stream: the prompt has 13 tokens, limit 9")


def test_a_shuffled_stream_has_another_order_in_each_pass_and_the_same_one_when_it_is_read_again():
    dataset = Dataset.from_dict({"prompt": [f"p{i}" for i in range(8)]}).to_iterable_dataset().shuffle(seed=3)
    first, again = stream_of(dataset, 8), stream_of(dataset, 8)
    passes = [first.group(number).prompts for number in range(3)]
    assert [sorted(group) for group in passes] == [sorted(passes[0])] * 3
    assert len({tuple(group) for group in passes}) == 3
    assert again.group(2).prompts == passes[2] and again.group(0).prompts == passes[0]


def test_a_formatted_stream_gives_python_values():
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "n": [1, 2]}).to_iterable_dataset().with_format("numpy")
    assert stream_of(dataset, 2).group(0).columns == {"n": [1, 2]}


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_stream_of_too_few_prompts_ends_in_one_line(skip_bad):
    pieces = ("prompts_per_iteration 3: must be at most 2, the prompts in pass 1 of train_dataset",)
    error_message(lambda: Source(count=2).stream(3, skip_bad).group(0), *pieces)
    error_message(lambda: Source(count=0).stream(3, skip_bad).group(0), "must be at most 0")
    once = iter([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    used_up = stream_of(IterableDataset.from_generator(lambda: once), 3, skip_bad=skip_bad)
    error_message(lambda: used_up.group(1), "must be at most 0, the prompts in pass 2")


def test_an_error_of_the_stream_names_the_row_and_the_cause():
    def rows():
        yield {"prompt": "a"}
        raise ConnectionError("the server\nis gone")

    stream = stream_of(IterableDataset.from_generator(rows), 2)
    error_message(lambda: stream.group(0), "row 2 of the stream: cannot be read (ConnectionError: the server is gone")
    error_message(lambda: stream_of(IterableDataset.from_generator(lambda: iter([{"x": 1}])), 1).group(0), "'x'")
