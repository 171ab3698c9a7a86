"""What a reward may return, and which error follows anything else."""

import numpy as np
import pytest
import torch
from helpers.errors import error_message
from helpers.reward_helpers import score

from quarkrl.errors import UserError
from quarkrl.rewards.validation import checked_scores


@pytest.mark.parametrize(
    "result",
    [
        [1, 2, 0, 4],
        (1.0, 2.0, 0.0, 4.0),
        np.array([1, 2, 0, 4], dtype=np.float32),
        torch.tensor([1.0, 2.0, 0.0, 4.0], requires_grad=True),
        [torch.tensor(1.0), np.float16(2), False, np.int64(4)],
        np.array([1, 2.0, np.bool_(False), 4], dtype=object),
    ],
)
def test_scores_may_be_lists_arrays_tensors_scalars_and_booleans(result):
    assert score(lambda completions: result).rewards[:, 0].tolist() == [1, 2, 0, 4]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ([1, 2, 3], "returned 3 scores for 4 completions: must be 4"),
        (None, "returned None: must be a list of 4 numbers"),
        (0.5, "returned 0.5 (type float): must be a list of 4"),
        ("1234", "returned '1234' (type str): must be a list of 4"),
        ({"a": 1}, "(type dict): must be a list of 4"),
        ([1, 2, "good", 4], "returned 'good' (type str) at index 2: must be a number or None"),
        ([1, [2], 3, 4], "returned [2] (type list) at index 1: must be a number or None"),
        (torch.zeros(4, 1), "returned [0.0] (type list) at index 0: must be a number or None"),
        ([1, 2, 3, 1j], "returned 1j (type complex) at index 3: must be a number or None"),
    ],
)
def test_any_other_result_is_an_error_that_names_reward_index_and_value(result, expected):
    def my_reward(completions):
        return result

    message = error_message(lambda: score(my_reward))
    assert expected in message and "reward 'my_reward'" in message


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -float("inf"), None])
def test_a_non_finite_value_or_none_is_a_missing_score(value):
    first, missing, last = checked_scores("mine", [1.0, value, 2], 3)
    assert (first, last) == (1.0, 2.0)
    assert missing is None if value is None else missing != missing  # None is kept, all else is NaN.


@pytest.mark.parametrize("value", ["1.0", b"1", [1.0], 1j, {}, object()])
def test_a_value_that_cannot_be_a_number_is_an_error(value):
    with pytest.raises(UserError, match="at index 1: must be a number or None"):
        checked_scores("mine", [1.0, value, 2], 3)
