"""From settings to columns: which models and quantiles are shown, their completions, scores and errors."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from helpers.preferred_tokens import prefer
from helpers.reward_token_models import add_reward_tokens
from helpers.tiny_models import tiny_model, tiny_tokenizer

from quarkrl.errors import UserError
from quarkrl.playground.answers import Answer, Column, Turn, answer, low_score, sides
from quarkrl.playground.cards import columns_html, error_html
from quarkrl.playground.settings import Settings
from quarkrl.playground.subject import Subject
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.generator import QuarkGenerator

QUICK = {"prompt": "ab", "max_new_tokens": 5, "num_return_sequences": 2}


def share_of_b(completions, **_):
    return [text.count("b") / len(text) if text else None for text in completions]


def length(completions, **_):
    return [float(len(text)) for text in completions]


def subject(attributes=("reward",), rewards=share_of_b, chat_template=False, **others) -> Subject:
    """A tiny model with three quantiles whose reference always says "b"."""
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    conditioning, extended, model = add_reward_tokens(tokenizer, attributes=attributes)
    reference = tiny_model("gpt2", tokenizer)
    prefer(reference, tokenizer.convert_tokens_to_ids("b"))

    @contextmanager
    def before():
        yield reference

    kind = "each" if len(attributes) > 1 else "sum"
    scorer = Scorer(rewards, condition_on=kind) if rewards else None
    return Subject("tiny", QuarkGenerator(model, extended, conditioning), before, scorer, **others)


def last(subject: Subject, settings: Settings) -> list[Column]:
    return list(answer(subject, settings))[-1]


def answers(column: Column) -> list[Answer]:
    """The answers of the last turn."""
    return column.turns[-1].answers


def titles(subject: Subject, **settings) -> list[str]:
    return [side.title for side in sides(subject, Settings(**settings))]


def test_before_best_and_worst_are_shown_and_a_quantile_between_them():
    assert titles(subject()) == titles(subject(), quantile="0") == ["before", "best", "worst"]
    assert titles(subject(), quantile="1") == ["before", "best", "quantile 1", "worst"]
    two = subject(("kind", "short"), [share_of_b, length])
    assert titles(two, quantile="kind=2,short=2") == ["before", "best", "worst"]
    assert titles(two, quantile="kind=2,short=0") == ["before", "best", "quantile 2/0", "worst"]


def test_a_model_that_quark_did_not_train_has_one_column():
    tokenizer = tiny_tokenizer()
    plain = Subject("plain", QuarkGenerator(tiny_model("gpt2", tokenizer), tokenizer, None), None)
    (column,) = last(plain, Settings(**QUICK))
    assert column.title == "model" and len(answers(column)) == 2 and answers(column)[0].scores == {}


def test_columns_come_one_after_the_other():
    states = list(answer(subject(), Settings(**QUICK)))
    assert [[bool(column.turns) for column in state] for state in states] == [
        [False, False, False],
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_completions_are_those_of_generate_and_are_scored():
    subject_ = subject()
    before, best, worst = last(subject_, Settings(**QUICK, seed=3))
    assert answers(before) == [Answer("bbbbb", {"share_of_b": 1.0})] * 2 and before.mean == 1.0
    for column, quantile in ((best, "best"), (worst, "worst")):
        texts = subject_.generator.generate("ab", quantile, num_return_sequences=2, seed=3, max_new_tokens=5)[0]
        assert [given.text for given in answers(column)] == texts
        assert [given.score for given in answers(column)] == share_of_b(texts)


def test_guidance_steers_every_quantile_but_the_worst():
    guided, plain = (last(subject(), Settings(**QUICK, quantile="1", guidance_scale=g)) for g in (3, 1))
    same = [answers(a) == answers(b) for a, b in zip(guided, plain, strict=True)]
    assert same == [True, False, False, True]
    assert [column.detail for column in guided] == [
        "the model before training",
        "quantile 2, guidance 3",
        "of 0 to 2, guidance 3",
        "quantile 0",
    ]


def test_each_attribute_has_its_score_and_a_sum_its_terms():
    two = subject(("kind", "short"), [share_of_b, length])
    assert answers(last(two, Settings(**QUICK))[0])[0].scores == {"share_of_b": 1.0, "length": 5.0}
    summed = subject(rewards=[share_of_b, length])
    assert answers(last(summed, Settings(**QUICK))[0])[0].scores == {"reward": 6.0, "share_of_b": 1.0, "length": 5.0}


def test_a_message_is_wrapped_in_the_chat_template():
    seen = []

    def remember(prompts, completions, **_):
        seen.extend(prompts)
        return [0.0] * len(completions)

    chats = subject(rewards=remember, chat_template=True)
    last(chats, Settings(**QUICK, chat=True, system_prompt="Be brief."))
    assert seen[0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]


TALK = {**QUICK, "chat": True, "max_new_tokens": 2}


def test_each_column_goes_on_with_its_own_first_answer():
    seen = []

    def remember(prompts, completions, **_):
        seen.extend(prompts)
        return [float(len(prompt)) for prompt in prompts]

    chats = subject(rewards=remember, chat_template=True)
    first = last(chats, Settings(**TALK))
    seen.clear()
    settings = Settings(**TALK, replies=("c",))
    states = list(answer(chats, settings, first))
    assert [[len(column.turns) for column in state] for state in states] == [[1, 1, 1], [2, 1, 1], [2, 2, 1], [2, 2, 2]]
    for column, before in zip(states[-1], first, strict=True):
        assert column.turns[0].answers == answers(before)[:1] and len(answers(column)) == 2
        history = [("user", "ab"), ("assistant", answers(before)[0].text), ("user", "c")]
        assert [(message["role"], message["content"]) for message in seen[0]] == history
        assert column.mean == pytest.approx((1 + 3 + 3) / 3)  # One score of the first turn, two of the second.
        del seen[:2]
    assert states[-1][0].turns[0].answers != states[-1][2].turns[0].answers  # before, and worst


def test_a_conversation_is_the_same_if_all_its_messages_are_answered_at_once():
    chats = subject(chat_template=True)
    columns = last(chats, Settings(**TALK))
    for count in (1, 2):
        settings = Settings(**TALK, replies=("c", "d")[:count])
        columns = list(answer(chats, settings, columns))[-1]
    assert last(chats, settings) == columns and [len(column.turns) for column in columns] == [3, 3, 3]
    assert last(chats, Settings(**QUICK, replies=("c",))) == last(chats, Settings(**QUICK))  # No chat, no replies.


def test_a_conversation_that_is_too_long_is_one_line():
    with pytest.raises(UserError, match=r"^conversation: must have at most 126 tokens beside 2 .* Start again"):
        list(answer(subject(chat_template=True), Settings(**TALK, replies=("a" * 90,))))
    with pytest.raises(UserError, match=r"^prompt: must not be empty"):
        list(answer(subject(chat_template=True), Settings(**TALK, replies=(" ",))))


def test_completions_are_shown_without_scores_if_a_reward_fails():
    def failing(completions, **_):
        raise RuntimeError("the service is down")

    column = last(subject(rewards=failing), Settings(**QUICK))[0]
    note = column.turns[0].note
    assert note.startswith("no scores: ") and "the service is down" in note
    assert [given.text for given in answers(column)] == ["bbbbb"] * 2 and column.mean is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " \n"}, "prompt: must not be empty"),
        ({"prompt": "a" * 200}, "prompt: must have at most 108 tokens"),
        ({"prompt": "a <|reward_0|>"}, "must not contain reward tokens"),
        ({"prompt": "a", "quantile": "7"}, "quantile '7': must be best, worst, or a number from 0"),
        ({"prompt": "a", "chat": True}, "chat template"),
    ],
)
def test_an_impossible_request_is_one_line(settings, message):
    with pytest.raises(UserError, match=message) as error:
        list(answer(subject(), Settings(**settings)))
    assert "\n" not in str(error.value)


def column_of(*scores: float | None) -> Column:
    return Column("x", "", (Turn([Answer("text", {"r": score}) for score in scores]),))


def test_the_lowest_fifth_of_the_range_is_low():
    assert low_score([column_of(0.0, 1.0), column_of(0.5, None)]) == pytest.approx(0.2)
    assert low_score([column_of(0.5, 0.5)]) is None and low_score([column_of(None)]) is None
    assert low_score([Column("x", "")]) is None


# HTML


def test_low_scores_are_marked_in_words_and_missing_ones_named():
    html = columns_html([column_of(0.0, 1.0, None)], Settings())
    assert "▼" in columns_html([column_of(-1.0, 4.0)], Settings())  # Up to 0 is low.
    assert html.count("q-low ") + html.count('q-low"') == 1 and html.count("▼") == 2  # The mark, and its legend.
    assert "r <b>0.00</b>" in html and "r <b>no score</b>" in html and "mean 0.50" in html


def test_all_text_is_escaped():
    evil = '<img src=x onerror="alert(1)">'
    turn = Turn([Answer(evil, {evil: 1.0})], evil)
    html = columns_html([Column(evil, evil, (turn,))], Settings(prompt=evil), evil) + error_html(evil)
    html += columns_html([Column("", "", (turn,))], Settings(prompt=evil, replies=(evil,), chat=True))
    assert "<img" not in html and 'onerror="' not in html and html.count("&lt;img") == 8 + 5


def test_a_column_says_that_it_is_being_sampled():
    assert "sampling …" in columns_html([Column("best", "")], Settings())
