"""Conditioning: what stands before a prompt and asks the model for one quantile of the reward.

Each attribute (a reward that conditions) has K prefixes, from worst to best. By default a prefix is one new token, a
reward token: `<|reward_0|>` (worst) to `<|reward_K-1|>` (best). It can also be words, or new tokens that start as words
(`words.py`). New tokens are added to the tokenizer and, as embedding rows, to the model. They are conditions, never
outputs: every sampler suppresses them. A prefix comes after BOS, if the tokenizer adds one, and before the prompt.

`data.encoding.encode_prompts` gives the ids of a prompt, and `Conditioning.prefix` those behind quantiles: in training,
generation and evaluation. The reference reads the same ids without prefixes. The tokenizer in `final/` gives the
ids behind the best quantiles (`steering.py`), and `training/served.py` checks that before a run samples.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.errors import UserError, did_you_mean
from quarkrl.models.adapters import add_adapter
from quarkrl.models.quark_json import damaged, read_quark_json, write_quark_json
from quarkrl.models.special_tokens import add_special_tokens, surrounding_ids
from quarkrl.models.steering import steer_tokenizer
from quarkrl.models.words import ConditioningKind, Words

Item = TypeVar("Item")


@dataclass(frozen=True)
class Conditioning:
    """The prefixes of a model, which ask for quantiles.

    Attributes:
        attributes: names of the A rewards that condition.
        prefixes: `(A, K, n)` ids of the prefixes, worst first; n differs, and 0 is an empty prefix.
        start_ids: the ids that precede a prefix where a prompt starts with them: the special tokens that the tokenizer
            puts first, such as BOS.
        vocab_size: V, the number of original token ids. Every generated id is below it.
        kind: `tokens`, `text` or `soft` (`words.py`).
        words: `(A, K)` the words of the prefixes; empty for kind `tokens`.
        word_ids: `(A, K, n)` the ids of the words in the original vocabulary; empty for kind `tokens`.
    """

    attributes: tuple[str, ...]
    prefixes: tuple[tuple[tuple[int, ...], ...], ...]
    start_ids: tuple[int, ...]
    vocab_size: int
    kind: ConditioningKind = "tokens"
    words: tuple[tuple[str, ...], ...] = ()
    word_ids: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @property
    def num_quantiles(self) -> int:
        """K, the number of quantiles."""
        return len(self.prefixes[0])

    @property
    def best(self) -> tuple[int, ...]:
        """The best quantile of each attribute, K - 1."""
        return (self.num_quantiles - 1,) * len(self.attributes)

    @property
    def new_token_ids(self) -> list[int]:
        """The ids of all new tokens; none for kind `text`."""
        return [] if self.kind == "text" else _flatten(self.prefixes)

    @property
    def token_names(self) -> list[str]:
        """The texts of all new tokens."""
        names = _token_names(self.kind, self.attributes, [[len(ids) for ids in row] for row in self.prefixes])
        return _flatten(names)

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest prefix of all attributes together."""
        return sum(max(map(len, row)) for row in self.prefixes)

    @property
    def in_words(self) -> "Conditioning":
        """The same prefixes in words of the original vocabulary, as a model before training can read them."""
        return self if self.kind == "text" else replace(self, kind="text", prefixes=self.word_ids)

    @classmethod
    def add_to(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        num_quantiles: int,
        attributes: Sequence[str] = ("reward",),
        seed: int = 0,
        words: Words | None = None,
    ) -> tuple["Conditioning", PreTrainedTokenizerBase]:
        """Add the new tokens of prefixes to a model, in place, and to a copy of its tokenizer.

        The new embedding rows are drawn, per dimension, from N(mean, std) of the old rows (paper, section 2; official
        code). Those of words start as the rows of the words. An output embedding that is not tied gets rows of its own.

        Args:
            tokenizer: the model's; it is not changed.
            model: a causal language model.
            num_quantiles: K.
            attributes: names of the rewards that condition.
            seed: of the new rows.
            words: what stands for the quantiles; reward tokens by default.

        Returns:
            The conditioning, and the tokenizer with the new tokens.

        Raises:
            UserError: the tokenizer already has such tokens, because Quark trained this model before.
        """
        words = words or Words.choose("tokens", None, attributes, num_quantiles)
        tokenizer = copy.deepcopy(tokenizer)
        word_ids = words.encode(tokenizer)
        names = _token_names(words.kind, attributes, words.lengths(tokenizer))
        flat_names = _flatten(names)
        _check_names_are_new(tokenizer, flat_names)
        rows = model.get_input_embeddings().weight.shape[0]
        used_ids = 1 + max(tokenizer.get_vocab().values())
        new_ids = add_special_tokens(tokenizer, flat_names)
        # An embedding can have more rows than the tokenizer has tokens (padding), or fewer: neither are outputs.
        vocab_size = min(rows, *(new_ids or [used_ids]))
        remaining = iter(new_ids)
        prefixes = tuple(tuple(tuple(next(remaining) for _ in quantile) for quantile in row) for row in names)
        conditioning = cls(
            attributes=tuple(attributes),
            prefixes=word_ids if words.kind == "text" else prefixes,
            start_ids=start_ids_of(tokenizer),
            vocab_size=vocab_size,
            kind=words.kind,
            words=() if words.kind == "tokens" else words.texts,
            word_ids=() if words.kind == "tokens" else word_ids,
        )
        conditioning.add_rows(model, seed)
        return conditioning, tokenizer

    def add_rows(self, model: PreTrainedModel, seed: int) -> None:
        """Add the embedding rows of the new tokens to a model, in place, as `add_to` does.

        Args:
            model: the model before training.
            seed: of rows that do not start as words.
        """
        ids = self.new_token_ids
        if not ids:
            return
        if max(ids) >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        if self.kind == "soft":
            _copy_rows(model, ids, _flatten(self.word_ids))
        else:
            _draw_rows(model, ids, self.vocab_size, seed)

    def position(self, plain_ids: Sequence[int]) -> int:
        """Return the position that a prefix gets in the ids of a prompt: 0, or behind `start_ids`."""
        start = len(self.start_ids)
        return start if tuple(plain_ids[:start]) == self.start_ids else 0

    def prefix(self, prompt_ids: Sequence[int], quantiles: Sequence[int]) -> list[int]:
        """Return the prompt's ids behind one prefix per attribute, which follow `start_ids`.

        Args:
            prompt_ids: a prompt without prefix.
            quantiles: one per attribute.
        """
        start = self.position(prompt_ids)
        return [*prompt_ids[:start], *self.ids_of(quantiles), *prompt_ids[start:]]

    def prefix_named(self, prompt_ids: Sequence[int], quantile: str | int) -> list[int]:
        """Return the prompt's ids behind the prefixes of a quantile, which `quantiles_of` reads."""
        return self.prefix(prompt_ids, self.quantiles_of(quantile))

    def strip(self, ids: Sequence[int]) -> list[int]:
        """Return the ids without prefix: the inverse of `prefix`.

        Words can be a part of any text. So in kind `text` only those of the best quantile are removed, which the
        tokenizer in `final/` adds.
        """
        if self.kind != "text":
            new_ids = set(self.new_token_ids)
            return [int(i) for i in ids if i not in new_ids]
        start, best = self.position(ids), self.ids_of(self.best)
        is_steered = list(ids[start : start + len(best)]) == best
        return [*ids[:start], *ids[start + len(best) :]] if is_steered else list(ids)

    def is_prefixed(self, ids: Sequence[int]) -> bool:
        """Return whether ids are what `prefix` returns for some quantiles; in kind `text`, for the best ones."""
        return self.quantiles_in(ids) is not None

    def quantiles_in(self, ids: Sequence[int]) -> tuple[int, ...] | None:
        """Return the quantiles for which `prefix` returns these ids, or None; in kind `text`, only the best ones."""
        plain_ids = self.strip(ids)
        start = self.position(plain_ids)
        head = list(ids[start : start + len(ids) - len(plain_ids)])
        if list(ids) != [*plain_ids[:start], *head, *plain_ids[start:]]:
            return None
        if self.kind == "text":
            return self.best if head == self.ids_of(self.best) else None
        quantiles = []
        for row in self.prefixes:
            matches = [(len(prefix), i) for i, prefix in enumerate(row) if head[: len(prefix)] == list(prefix)]
            if not matches:
                return None
            length, quantile = max(matches)
            quantiles.append(quantile)
            head = head[length:]
        return None if head else tuple(quantiles)

    def quantiles_of(self, quantile: str | int) -> tuple[int, ...]:
        """Return a quantile given by name or number as one number per attribute.

        Args:
            quantile: "best", "worst", or a number from 0 (worst) to K - 1 (best), for all attributes. Or one for each
                of several, as in "polite=best,short=0"; the others are then best.

        Raises:
            UserError: it is none of these, or names an unknown attribute.
        """
        text = str(quantile)
        if "=" not in text:
            return (self._number_of(text, quantile),) * len(self.attributes)
        numbers = dict(zip(self.attributes, self.best, strict=True))
        for part in text.split(","):
            name, _, value = part.strip().rpartition("=")
            if name not in numbers:
                raise UserError(
                    f"quantile {quantile!r}: must name attributes of the model, which are "
                    f"{', '.join(self.attributes)}. Write NAME=QUANTILE,…{did_you_mean(name, self.attributes)}"
                )
            numbers[name] = self._number_of(value, quantile)
        return tuple(numbers.values())

    def _number_of(self, text: str, quantile: str | int) -> int:
        """The number of one attribute's quantile; `quantile` is for the message."""
        named = {"best": self.num_quantiles - 1, "worst": 0}
        number = named.get(text, int(text) if text.isdecimal() else -1)
        if not 0 <= number < self.num_quantiles:
            raise UserError(
                f"quantile {quantile!r}: must be best, worst, or a number from 0 (worst) to "
                f"{self.num_quantiles - 1} (best)."
            )
        return number

    def steer_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, quantiles: Sequence[int] | None = None, keep_end: bool = False
    ) -> PreTrainedTokenizerBase:
        """Return a copy of the tokenizer that puts the reward tokens of `quantiles` first by itself.

        Its chat template has an argument `quantile`, which selects others.

        Args:
            tokenizer: the one with new tokens that `add_to` returned.
            quantiles: one per attribute; the best by default.
            keep_end: whether it adds behind a text what `tokenizer` adds (`steering.steer_tokenizer`).

        Raises:
            UserError: the tokenizer is not a fast one.
        """
        names = ["best", "worst", *map(str, range(self.num_quantiles))]
        choices = {name: self._text_of(self.quantiles_of(name)) for name in names}
        quantiles = quantiles or self.best
        prefix = self.ids_of(quantiles), self._text_of(quantiles)
        return steer_tokenizer(tokenizer, *prefix, self.start_ids, choices, keep_end)

    def add_adapter(self, model: PreTrainedModel, peft_config: Any) -> Any:
        """Return the model with an adapter of `peft` that also trains the embedding rows of the new tokens.

        Raises:
            UserError: the adapter cannot do that, or cannot be merged (`adapters.add_adapter`).
        """
        return add_adapter(model, peft_config, self.new_token_ids)

    def save(self, directory: str | os.PathLike, **facts: Any) -> None:
        """Write `quark.json`, atomically: the conditioning, and facts of the run that belong with the model.

        Raises:
            UserError: the operating system refuses the write, for example on a full disk.
        """
        write_quark_json(directory, {"conditioning": asdict(self), **facts})

    @classmethod
    def load(cls, model: str | os.PathLike) -> "Conditioning | None":
        """Read the conditioning of a model, from its directory or the hub; None if Quark did not train the model.

        Raises:
            UserError: `quark.json` is damaged.
        """
        facts = read_quark_json(model)
        if facts is None:
            return None
        try:
            conditioning = cls._from_json(facts["conditioning"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(model, repr(error)) from error
        if problem := conditioning._inconsistency():
            raise damaged(model, problem)
        return conditioning

    @classmethod
    def _from_json(cls, fields: dict[str, Any]) -> "Conditioning":
        if not isinstance(fields["attributes"], list):
            raise TypeError("attributes: must be a list")
        if "token_ids" in fields:  # Written before there were other kinds.
            fields = {**fields, "prefixes": [[[i] for i in row] for row in fields["token_ids"]]}
            fields["start_ids"] = fields["prefix_ids"]
        return cls(
            attributes=tuple(fields["attributes"]),
            prefixes=_to_tuples(fields["prefixes"]),
            start_ids=tuple(fields["start_ids"]),
            vocab_size=fields["vocab_size"],
            kind=fields.get("kind", "tokens"),
            words=tuple(map(tuple, fields.get("words", ()))),
            word_ids=_to_tuples(fields.get("word_ids", ())),
        )

    def ids_of(self, quantiles: Sequence[int]) -> list[int]:
        """Return the ids of the prefixes of all attributes, one quantile each."""
        return [i for row, q in zip(self.prefixes, quantiles, strict=True) for i in row[q]]

    def _text_of(self, quantiles: Sequence[int]) -> str:
        """The text of the prefixes of all attributes."""
        if self.kind == "text":
            return "".join(row[q] for row, q in zip(self.words, quantiles, strict=True))
        names = _token_names(self.kind, self.attributes, [[len(ids) for ids in row] for row in self.prefixes])
        return "".join(name for row, q in zip(names, quantiles, strict=True) for name in row[q])

    def _inconsistency(self) -> str | None:
        """What is wrong with values that were read from a file; None if they are consistent."""
        if not all(isinstance(name, str) for name in self.attributes) or not len(self.attributes) >= 1:
            return f"attributes {self.attributes!r}: must be at least one name"
        if self.kind not in get_args(ConditioningKind):
            return f"kind {self.kind!r}: must be tokens, text or soft"
        if len(self.prefixes) != len(self.attributes) or len(set(map(len, self.prefixes))) != 1:
            return "prefixes: must be equally many for each attribute"
        ids = _flatten(self.prefixes)
        if self.num_quantiles < 2 or any(len(set(row)) < len(row) for row in self.prefixes):
            return "prefixes: must be at least two different ones for each attribute"
        if not all(type(i) is int for i in ids) or len(set(self.new_token_ids)) < len(self.new_token_ids):
            return "prefixes: must be different numbers"
        if type(self.vocab_size) is not int or not 1 <= self.vocab_size <= min(self.new_token_ids, default=2**63):
            return f"vocab_size {self.vocab_size!r}: must be the number of ids below the new tokens"
        old_ids = [*self.start_ids, *(ids if self.kind == "text" else ()), *_flatten(self.word_ids)]
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in old_ids):
            return f"start_ids {list(self.start_ids)!r} and words: must be ids below vocab_size"
        if self.kind == "tokens":
            return None
        texts = [text for row in self.words for text in row]
        if list(map(len, self.words)) != list(map(len, self.prefixes)) or not all(isinstance(t, str) for t in texts):
            return "words: must be a text for each prefix"
        if [[len(ids) for ids in row] for row in self.prefixes] != [[len(ids) for ids in row] for row in self.word_ids]:
            return "word_ids: must be as many as the ids of the prefixes"
        return None


def _to_tuples(table: Sequence[Sequence[Sequence[int]]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(tuple(ids) for ids in row) for row in table)


def _flatten(table: Sequence[Sequence[Sequence[Item]]]) -> list[Item]:
    return [i for row in table for ids in row for i in ids]


def reward_token(attribute: str, quantile: int) -> str:
    """The text of a reward token in the tokenizer's vocabulary."""
    return f"<|{attribute}_{quantile}|>"


def new_token_names(tokenizer: PreTrainedTokenizerBase, attributes: Sequence[str], words: Words) -> list[str]:
    """The texts of all new tokens that a conditioning adds."""
    return _flatten(_token_names(words.kind, attributes, words.lengths(tokenizer)))


def _token_names(
    kind: ConditioningKind, attributes: Sequence[str], lengths: Sequence[Sequence[int]]
) -> list[list[list[str]]]:
    """The texts of the new tokens of each prefix, `(A, K, n)`, given the lengths of the prefixes."""
    if kind == "text":
        return [[[] for _ in row] for row in lengths]
    if kind == "tokens":
        return [
            [[reward_token(name, k)] for k in range(len(row))] for name, row in zip(attributes, lengths, strict=True)
        ]
    return [
        [[f"<|{name}_{k}.{n}|>" for n in range(length)] for k, length in enumerate(row)]
        for name, row in zip(attributes, lengths, strict=True)
    ]


def _check_names_are_new(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> None:
    vocabulary = set(tokenizer.get_vocab())
    if existing := [name for name in names if name in vocabulary]:
        raise UserError(
            f"model: its tokenizer already has the reward token {existing[0]}, so Quark trained this model before. "
            "Start from the original model."
        )


def start_ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that precede a prefix: what the tokenizer puts first, or else the BOS of a chat template.

    A text can spell BOS. A tokenizer that adds no special tokens puts the reward tokens first there too. So BOS counts
    only if there is a chat template, which can render it.
    """
    before, _ = surrounding_ids(tokenizer)
    bos_id = bos_of_chats(tokenizer)
    return tuple(before) if bos_id is None else (bos_id,)


def bos_of_chats(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of a BOS that reward tokens follow in chats, while a text starts with reward tokens; or None."""
    before, _ = surrounding_ids(tokenizer)
    return tokenizer.bos_token_id if tokenizer.chat_template and not before else None


def _weights(model: PreTrainedModel) -> list[Tensor]:
    """The tables with a row for each token: input embedding, and output embedding and bias if it is not tied."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [inputs.weight] if outputs is None or outputs.weight is inputs.weight else [inputs.weight, outputs.weight]
    bias = getattr(outputs, "bias", None)
    return [*weights, *([] if bias is None else [bias])]


@torch.no_grad()
def _draw_rows(model: PreTrainedModel, ids: Sequence[int], vocab_size: int, seed: int) -> None:
    """Draw the rows of new tokens."""
    generator = torch.Generator().manual_seed(seed)
    for weight in _weights(model):
        old = weight[:vocab_size].float()
        noise = torch.randn((len(ids), *old.shape[1:]), generator=generator).to(old.device)
        weight[list(ids)] = (old.mean(0) + old.std(0) * noise).to(weight.dtype)


@torch.no_grad()
def _copy_rows(model: PreTrainedModel, ids: Sequence[int], sources: Sequence[int]) -> None:
    """Let the rows of new tokens start as those of words."""
    for weight in _weights(model):
        weight[list(ids)] = weight[list(sources)]
