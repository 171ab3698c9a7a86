"""From settings to columns of scored completions. Nothing here knows the page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quarkrl.data.conversation import Conversation
from quarkrl.data.encoding import Prompt
from quarkrl.errors import UserError
from quarkrl.playground.settings import Settings
from quarkrl.playground.subject import Subject
from quarkrl.sampling.sampler import complete

LOW_SHARE = 0.2  # Scores in this lowest part of the range on the page are marked.


@dataclass(frozen=True)
class Answer:
    """A completion.

    Attributes:
        text: the completion.
        scores: by the reward's name, its score; None is a missing score. The first one conditions or is the sum.
    """

    text: str
    scores: dict[str, float | None] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """The first score; None if it is missing."""
        return next(iter(self.scores.values()), None)


@dataclass(frozen=True)
class Turn:
    """Completions of a text, or answers to one message of the user.

    Attributes:
        answers: one for each sample in the last turn. Earlier turns have the one that the conversation keeps.
        note: why there are no scores.
    """

    answers: list[Answer]
    note: str = ""


@dataclass(frozen=True)
class Column:
    """What one model said at one quantile.

    Attributes:
        title: such as "best".
        detail: such as "quantile 4, guidance 2".
        turns: one for each message of the user that is answered; a text to continue has one.
    """

    title: str
    detail: str
    turns: tuple[Turn, ...] = ()

    @property
    def scores(self) -> list[float]:
        """The first score of each answer that has one."""
        return [answer.score for turn in self.turns for answer in turn.answers if answer.score is not None]

    @property
    def mean(self) -> float | None:
        """The mean of the first scores; None without scores."""
        return sum(self.scores) / len(self.scores) if self.scores else None

    def with_turn(self, turn: Turn) -> "Column":
        """The column with one more turn. Of the turn before, it keeps the first answer."""
        return replace(self, turns=(*self.kept_turns, turn))

    @property
    def kept_turns(self) -> tuple[Turn, ...]:
        """The turns of the conversation so far, each with its first answer."""
        return tuple(replace(turn, answers=turn.answers[:1]) for turn in self.turns)


@dataclass(frozen=True)
class Side:
    """What a column shows: the model before training if `quantile` is None, or else a quantile."""

    title: str
    detail: str
    quantile: str | None
    guidance_scale: float = 1.0


def sides(subject: Subject, settings: Settings) -> list[Side]:
    """Return what the columns show: before training, the chosen quantile if it is neither end, best and worst.

    Guidance steers away from the worst quantile, so it applies to all others.

    Raises:
        UserError: the chosen quantile does not exist.
    """
    conditioning = subject.generator.conditioning
    before = [Side("before", "the model before training", None)] if subject.reference else []
    if conditioning is None:
        return [Side("model", "not trained with Quark", "best")]
    chosen, best, worst = (conditioning.quantiles_of(name) for name in (settings.quantile, "best", "worst"))
    scale = settings.guidance_scale
    steered = "" if scale == 1 else f", guidance {scale:g}"
    middle = []
    if chosen not in (best, worst):
        numbers = chosen if len(subject.attributes) > 1 else chosen[:1]
        title = "quantile " + "/".join(map(str, numbers))
        middle = [Side(title, f"of 0 to {conditioning.num_quantiles - 1}{steered}", settings.quantile, scale)]
    return [
        *before,
        Side("best", f"quantile {conditioning.num_quantiles - 1}{steered}", "best", scale),
        *middle,
        Side("worst", "quantile 0", "worst"),
    ]


def answer(subject: Subject, settings: Settings, earlier: Sequence[Column] = ()) -> Iterator[list[Column]]:
    """Yield all columns, again each time that one of them has one more turn.

    Args:
        subject: the model.
        settings: with all messages of the user.
        earlier: the columns before the last message, by the same settings; without them, all messages are answered.

    Raises:
        UserError: a message is empty or too long, or a setting is not possible with this model.
    """
    if not all(message.strip() for message in settings.messages):
        raise UserError("prompt: must not be empty. Type some text, or choose an example.")
    planned = sides(subject, settings)
    columns = list(earlier) or [Column(side.title, side.detail) for side in planned]
    columns = [replace(column, turns=column.kept_turns) for column in columns]
    yield list(columns)
    for i, side in enumerate(planned):
        for _ in settings.messages[len(columns[i].turns) :]:
            columns[i] = columns[i].with_turn(_next_turn(subject, settings, side, columns[i].turns))
            yield list(columns)


def _next_turn(subject: Subject, settings: Settings, side: Side, turns: Sequence[Turn]) -> Turn:
    """Answer the message after some turns. Each column has the same random numbers."""
    prompt = _prompt_after(turns, settings)
    plain_ids = subject.generator.strip([prompt], subject.generator.encode([prompt]))[0]
    length, new = len(subject.generator.condition(plain_ids)), settings.max_new_tokens
    if length > (room := subject.generator.longest_prompt(new)):
        name, remedy = ("conversation", "Start again") if turns else ("prompt", "Shorten it")
        raise UserError(
            f"{name}: must have at most {max(0, room)} tokens beside {new} new ones, and has {length}. "
            f"{remedy}, or lower the length."
        )
    completion_ids = _sample(subject, settings, side, plain_ids, settings.seed + len(turns))
    if len(turns) + 1 < len(settings.messages):
        completion_ids = completion_ids[:1]  # The conversation continues with it, and the page shows no other.
    return _score(subject, prompt, plain_ids, completion_ids)


def _prompt_after(turns: Sequence[Turn], settings: Settings) -> Prompt:
    """The text to continue, or the chat up to the message that comes after some turns."""
    if not settings.chat:
        return settings.prompt
    conversation = Conversation(settings.system_prompt if settings.system_prompt.strip() else None)
    for message, turn in zip(settings.messages, turns, strict=False):
        conversation = conversation.with_turn(message, turn.answers[0].text)
    return conversation.ask(settings.messages[len(turns)])


def _sample(subject: Subject, settings: Settings, side: Side, plain_ids: list[int], seed: int) -> list[list[int]]:
    """Token ids of the completions of one prompt."""
    generator, count = subject.generator, settings.num_return_sequences
    options: dict[str, Any] = {"end_ids": generator.end_ids, "vocab_size": generator.vocab_size, "seed": seed}
    if side.quantile is None:
        assert subject.reference is not None
        with subject.reference() as model:
            return complete(model, [plain_ids] * count, settings.strategy(), **options)
    contrast = generator.contrast(
        [plain_ids] * count, side.guidance_scale, "worst", side.quantile, settings.guidance_rule
    )
    prompt_ids = [generator.condition(plain_ids, side.quantile)] * count
    return complete(generator.model, prompt_ids, settings.strategy(), contrast=contrast, **options)


def _score(subject: Subject, prompt: Prompt, plain_ids: list[int], completion_ids: list[list[int]]) -> Turn:
    """The completions as texts, and their scores by the run's reward."""
    generator, scorer, count = subject.generator, subject.scorer, len(completion_ids)
    texts = generator.decode([plain_ids] * count, completion_ids)
    if scorer is None:
        return Turn([Answer(text) for text in texts])
    read = generator.decode([plain_ids] * count, completion_ids, subject.keep_special_tokens)
    prompts: list[Any] = [prompt] * count
    try:
        scores = scorer(prompts, read, completion_ids, end_ids=generator.end_ids)
    except UserError as error:  # A reward that reads columns of the data set, or an endpoint that is down.
        return Turn([Answer(text) for text in texts], f"no scores: {error}")
    names = scorer.names if len(scorer.attributes) > 1 or len(scorer.names) == 1 else scorer.attributes
    table = {name: scores.rewards[:, i] for i, name in enumerate(names)} | scores.terms
    answers = [
        Answer(text, {name: None if values[i] != values[i] else float(values[i]) for name, values in table.items()})
        for i, text in enumerate(texts)
    ]
    return Turn(answers)


def low_score(columns: list[Column]) -> float | None:
    """Return the score up to which a completion is marked as low; None if all scores are equal or there are none."""
    scores = [score for column in columns for score in column.scores]
    if not scores or min(scores) == max(scores):
        return None
    return min(scores) + LOW_SHARE * (max(scores) - min(scores))
