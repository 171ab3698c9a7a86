"""Which arguments a reward function receives."""

from helpers.errors import error_message
from helpers.reward_helpers import IDS, PROMPTS, TEXTS, score
from transformers import TrainerState

from quarkrl.rewards import Scorer


def test_a_reward_receives_prompts_completions_ids_and_the_data_sets_columns():
    seen = {}

    def reward(prompts, completions, completion_ids, log_extra, log_metric, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        assert callable(log_extra) and callable(log_metric)
        return [0.0] * len(prompts)

    score(reward, columns={"topic": ["w", "x", "y", "z"]})
    assert seen == {
        "prompts": PROMPTS,
        "completions": TEXTS,
        "completion_ids": IDS,
        "topic": ["w", "x", "y", "z"],
        "trainer_state": TrainerState(),
    }


def test_a_reward_receives_only_what_it_accepts():
    def of_topic(topic, *, factor=10):
        return [factor * t for t in topic]

    scores = score(of_topic, columns={"topic": [1, 2, 3, 4], "other": list("abcd")})
    assert scores.rewards[:, 0].tolist() == [10, 20, 30, 40]


def test_a_parameter_of_two_stars_and_an_underscore_receives_nothing():
    def reward(completions, **_):
        return [len(_)] * len(completions)

    assert score(reward).rewards[:, 0].tolist() == [0, 0, 0, 0]


def test_a_required_parameter_without_a_column_is_an_error_that_lists_the_columns():
    message = error_message(lambda: score(lambda completions, topik: [0] * 4, columns={"topic": [1, 2, 3, 4]}))
    assert (
        "must be prompts, completions, completion_ids, or a column of the prompts, whose columns are 'topic'" in message
    )
    assert "Did you mean 'topic'?" in message


def test_the_eos_ids_are_passed_to_a_reward_with_that_parameter_and_to_no_other():
    def of_eos(completion_ids, end_ids):
        return [sum(i in end_ids for i in ids) for ids in completion_ids]

    def count_arguments(**arguments):
        return [len(arguments)] * 4

    scores = Scorer([of_eos, count_arguments])(PROMPTS, TEXTS, IDS, {"topic": [0] * 4}, end_ids=[4, 1])
    # Prompts, completions, ids, the topic, and TRL's trainer_state, log_extra and log_metric.
    assert scores.components.tolist() == [[1, 7], [0, 7], [0, 7], [4, 7]]


def test_on_score_can_be_called_without_a_cache():
    def reward(completions, on_score):
        for row in range(len(completions)):
            on_score(row, 1.0)
        return [1.0] * len(completions)

    assert score(reward).rewards[:, 0].tolist() == [1, 1, 1, 1]
