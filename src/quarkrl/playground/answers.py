"""From settings to columns of scored completions. Nothing here knows the page."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quarkrl.data.chats import as_question
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
class Column:
    """Completions of one model at one quantile.

    Attributes:
        title: such as "best".
        detail: such as "quantile 4, guidance 2".
        answers: None while they are sampled.
        note: why there are no scores.
    """

    title: str
    detail: str
    answers: list[Answer] | None = None
    note: str = ""

    @property
    def mean(self) -> float | None:
        """The mean of the first scores; None without scores."""
        scores = [answer.score for answer in self.answers or [] if answer.score is not None]
        return sum(scores) / len(scores) if scores else None


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


def answer(subject: Subject, settings: Settings) -> Iterator[list[Column]]:
    """Yield all columns, again each time that one of them has its completions.

    Raises:
        UserError: the prompt is empty or too long, or a setting is not possible with this model.
    """
    prompt = prompt_of(settings)
    strategy = settings.strategy()
    planned = sides(subject, settings)
    plain_ids = subject.generator.strip([prompt], subject.generator.encode([prompt]))[0]
    length = len(subject.generator.condition(plain_ids))
    if length > (room := subject.generator.longest_prompt(strategy.max_new_tokens)):
        raise UserError(
            f"prompt: must have at most {max(0, room)} tokens beside {strategy.max_new_tokens} new ones, and has "
            f"{length}. Shorten it, or lower the length."
        )
    columns = [Column(side.title, side.detail) for side in planned]
    yield columns
    for i, side in enumerate(planned):
        completion_ids = _sample(subject, settings, side, plain_ids)
        columns = [*columns[:i], _score(subject, columns[i], prompt, plain_ids, completion_ids), *columns[i + 1 :]]
        yield columns


def prompt_of(settings: Settings) -> Prompt:
    """Return the prompt as text or chat.

    Raises:
        UserError: it is empty.
    """
    if not settings.prompt.strip():
        raise UserError("prompt: must not be empty. Type some text, or choose an example.")
    if not settings.chat:
        return settings.prompt
    system: list[dict[str, Any]] = [{"role": "system", "content": settings.system_prompt}]
    return [*(system if settings.system_prompt.strip() else []), *as_question(settings.prompt)]


def _sample(subject: Subject, settings: Settings, side: Side, plain_ids: list[int]) -> list[list[int]]:
    """Token ids of the completions of one column. Each column has the same random numbers."""
    generator, count = subject.generator, settings.num_return_sequences
    options: dict[str, Any] = {"end_ids": generator.end_ids, "vocab_size": generator.vocab_size, "seed": settings.seed}
    if side.quantile is None:
        assert subject.reference is not None
        with subject.reference() as model:
            return complete(model, [plain_ids] * count, settings.strategy(), **options)
    contrast = generator.contrast(
        [plain_ids] * count, side.guidance_scale, "worst", side.quantile, settings.guidance_rule
    )
    prompt_ids = [generator.condition(plain_ids, side.quantile)] * count
    return complete(generator.model, prompt_ids, settings.strategy(), contrast=contrast, **options)


def _score(
    subject: Subject, column: Column, prompt: Prompt, plain_ids: list[int], completion_ids: list[list[int]]
) -> Column:
    """The column with its completions, and their scores by the run's reward."""
    generator, scorer, count = subject.generator, subject.scorer, len(completion_ids)
    texts = generator.decode([plain_ids] * count, completion_ids)
    if scorer is None:
        return Column(column.title, column.detail, [Answer(text) for text in texts])
    read = generator.decode([plain_ids] * count, completion_ids, subject.keep_special_tokens)
    prompts: list[Any] = [prompt] * count
    try:
        scores = scorer(prompts, read, completion_ids, end_ids=generator.end_ids)
    except UserError as error:  # A reward that reads columns of the data set, or an endpoint that is down.
        return Column(column.title, column.detail, [Answer(text) for text in texts], f"no scores: {error}")
    names = scorer.names if len(scorer.attributes) > 1 or len(scorer.names) == 1 else scorer.attributes
    table = {name: scores.rewards[:, i] for i, name in enumerate(names)} | scores.terms
    answers = [
        Answer(text, {name: None if values[i] != values[i] else float(values[i]) for name, values in table.items()})
        for i, text in enumerate(texts)
    ]
    return Column(column.title, column.detail, answers)


def low_score(columns: list[Column]) -> float | None:
    """Return the score up to which a completion is marked as low; None if all scores are equal or there are none."""
    scores = [a.score for column in columns for a in column.answers or [] if a.score is not None]
    if not scores or min(scores) == max(scores):
        return None
    return min(scores) + LOW_SHARE * (max(scores) - min(scores))
