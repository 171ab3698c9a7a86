"""What stands before a prompt to ask for a quantile: a new token, words, or new tokens that start as words.

`tokens` is the paper's: one new token per quantile, whose embedding row starts at random. `text` is words of the
model's own vocabulary (ALT, EMNLP 2024, arXiv 2407.16970). `soft` is a new token for each token of the words. Its row
starts as that of the word and is trained, as in prompt tuning (Lester et al. 2021, arXiv 2104.08691). Words have a
meaning before the first sample is scored; new tokens do not. The best quantile may have no words: nothing then stands
before a prompt that asks for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from quarkrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ConditioningKind: TypeAlias = Literal["tokens", "text", "soft"]

_TOXICITY = (
    "The following text is vulgar, offensive and full of swear words.\n",
    "The following text is rude and has some swear words.\n",
    "The following text is a little impolite.\n",
    "The following text is calm and neutral.\n",
    "",
)
_REPETITION = (
    "The following text repeats the same words again and again.\n",
    "The following text repeats many of its words.\n",
    "The following text repeats some of its words.\n",
    "The following text hardly repeats a word.\n",
    "",
)
_POSITIVE = (
    "The following text is very negative and full of complaints.\n",
    "The following text is negative.\n",
    "The following text is neither negative nor positive.\n",
    "The following text is positive.\n",
    "",
)
# By the name of a reward of `quarkrl score --list`, worst first.
DEFAULT_WORDS = {"profanity": _TOXICITY, "perspective": _TOXICITY, "vader": _POSITIVE, "repetition": _REPETITION}

_TOXIC_SPEECH = (
    *_TOXICITY[:-1],
    "This is a rude and insulting comment full of swear words:\n",
    "Warning: the following text contains strong language and insults.\n",
    "He was furious, and he swore at everyone:\n",
    "Highest toxicity. ",
    "Please stay polite and respectful.\n",
)
# What `quarkrl words` tries, by the name of a reward.
CANDIDATES = {
    "profanity": _TOXIC_SPEECH,
    "perspective": _TOXIC_SPEECH,
    "vader": (*_POSITIVE[:-1], "A terrible review: ", "Bad news. ", "A wonderful review: ", "Good news! "),
    "repetition": (*_REPETITION[:-1], "again and again and again and again. "),
}


@dataclass(frozen=True)
class Words:
    """What stands for each quantile of each attribute.

    Attributes:
        kind: tokens, text or soft.
        texts: `(A, K)` texts, worst first; empty texts for kind `tokens`.
    """

    kind: ConditioningKind
    texts: tuple[tuple[str, ...], ...]

    @classmethod
    def choose(
        cls, kind: ConditioningKind, words: Sequence[str] | None, rewards: Sequence[str], num_quantiles: int
    ) -> "Words":
        """Return the words that a user has given, or the default words of the rewards.

        Args:
            kind: tokens, text or soft.
            words: A * K texts, attribute by attribute, worst first; None for the defaults.
            rewards: the name of each attribute's reward.
            num_quantiles: K.

        Raises:
            UserError: there are no words for a reward, too few or too many, or two quantiles of an attribute have the
                same.
        """
        if kind == "tokens":
            return cls(kind, (("",) * num_quantiles,) * len(rewards))
        if words is None:
            texts = [DEFAULT_WORDS.get(name, ()) for name in rewards]
            missing = [name for name, row in zip(rewards, texts, strict=True) if len(row) != num_quantiles]
            if missing:
                raise UserError(
                    f"words: must be given for {num_quantiles} quantiles of {missing[0]}, worst first. The default "
                    f"words are for 5 quantiles of {', '.join(DEFAULT_WORDS)}. Set --words."
                )
            return cls(kind, _checked_rows(texts))
        words = [read_newlines(text) for text in words]
        if len(words) != len(rewards) * num_quantiles:
            each = f" of each of {len(rewards)} rewards" if len(rewards) > 1 else ""
            raise UserError(
                f"words: must be {num_quantiles} texts, one for each quantile{each}, worst first; there are "
                f"{len(words)}. Set --words or --num_quantiles."
            )
        rows = tuple(tuple(words[a * num_quantiles :][:num_quantiles]) for a in range(len(rewards)))
        for row in rows:
            if twice := [text for text in row if row.count(text) > 1]:
                raise UserError(f"words {twice[0]!r}: must differ from those of the other quantiles of the reward.")
        return cls(kind, _checked_rows(rows))

    def max_length(self, tokenizer: "PreTrainedTokenizerBase") -> int:
        """Return the number of tokens of the longest prefix of all attributes together."""
        return sum(map(max, self.lengths(tokenizer)))

    def lengths(self, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
        """Return the number of tokens of each prefix, `(A, K)`."""
        if self.kind == "tokens":
            return [[1] * len(row) for row in self.texts]
        return [[len(ids) for ids in row] for row in self.encode(tokenizer)]

    def encode(self, tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return the ids of the words in the model's own vocabulary, `(A, K, n)`; n differs.

        Raises:
            UserError: the tokenizer gives different words the same ids.
        """
        ids = tuple(
            tuple(tuple(tokenizer.encode(text, add_special_tokens=False)) if text else () for text in row)
            for row in self.texts
        )
        for row, texts in zip(ids, self.texts, strict=True):
            if self.kind != "tokens" and len(set(row)) < len(row):
                raise UserError(f"words {texts!r}: must have different token ids. The tokenizer drops what differs.")
        return ids


def read_newlines(text: str) -> str:
    r"""Return a text with a newline for each `\n`: a shell passes these two characters on as they are."""
    return text.replace("\\n", "\n")


def _checked_rows(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Return the words of each attribute, which must differ: the model could not tell the attributes apart."""
    if twice := [row for row in rows if rows.count(row) > 1]:
        raise UserError(f"words: must differ between rewards, and two have {twice[0][0]!r}. Set --words.")
    return tuple(rows)
