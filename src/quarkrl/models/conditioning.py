"""Reward tokens: special tokens before a prompt that ask the model for one quantile of the reward.

Each attribute (a reward that conditions) has K reward tokens, `<|reward_0|>` (worst) to `<|reward_K-1|>` (best). They
are added to the tokenizer and, as new embedding rows, to the model. They come after BOS, if the tokenizer adds one, and
before the prompt. They are conditions, never outputs: every sampler suppresses them.

`data.encoding.encode_prompts` gives the ids of a prompt, and `Conditioning.prefix` those behind quantiles: in training,
generation and evaluation. The reference reads the same ids without reward tokens. The tokenizer in `final/` gives the
ids behind the best quantiles (`steering.py`), and `training/served.py` checks that before a run samples.
"""

import copy
import operator
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.errors import UserError
from quarkrl.models.adapters import add_adapter
from quarkrl.models.quark_json import damaged, read_quark_json, write_quark_json
from quarkrl.models.special_tokens import add_special_tokens, surrounding_ids
from quarkrl.models.steering import steer_tokenizer


@dataclass(frozen=True)
class Conditioning:
    """The reward tokens of a model.

    Attributes:
        attributes: names of the A rewards that condition.
        token_ids: `(A, K)` ids of the reward tokens, worst first.
        prefix_ids: the ids that precede the reward tokens where a prompt starts with them: the special tokens that the
            tokenizer puts first, such as BOS.
        vocab_size: V, the number of original token ids. Every generated id is below it.
    """

    attributes: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    prefix_ids: tuple[int, ...]
    vocab_size: int

    @property
    def num_quantiles(self) -> int:
        """K, the number of quantiles."""
        return len(self.token_ids[0])

    @property
    def best(self) -> tuple[int, ...]:
        """The best quantile of each attribute, K - 1."""
        return (self.num_quantiles - 1,) * len(self.attributes)

    @property
    def all_token_ids(self) -> list[int]:
        """The ids of all A * K reward tokens."""
        return [i for row in self.token_ids for i in row]

    @property
    def token_names(self) -> list[str]:
        """The texts of all A * K reward tokens."""
        return reward_token_names(self.attributes, self.num_quantiles)

    @classmethod
    def add_to(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        num_quantiles: int,
        attributes: Sequence[str] = ("reward",),
        seed: int = 0,
    ) -> tuple["Conditioning", PreTrainedTokenizerBase]:
        """Add reward tokens to a model, in place, and to a copy of its tokenizer.

        The new embedding rows are drawn, per dimension, from N(mean, std) of the old rows (paper, section 2; official
        code). An output embedding that is not tied gets rows of its own.

        Args:
            tokenizer: the model's; it is not changed.
            model: a causal language model.
            num_quantiles: K.
            attributes: names of the rewards that condition.
            seed: of the new rows.

        Returns:
            The conditioning, and the tokenizer with the reward tokens.

        Raises:
            UserError: the tokenizer already has reward tokens, because Quark trained this model before.
        """
        names = reward_token_names(attributes, num_quantiles)
        vocabulary = set(tokenizer.get_vocab())
        if existing := [name for name in names if name in vocabulary]:
            raise UserError(
                f"model: its tokenizer already has the reward token {existing[0]}, so Quark trained this model before. "
                "Start from the original model."
            )
        tokenizer = copy.deepcopy(tokenizer)
        ids = add_special_tokens(tokenizer, names)
        rows = model.get_input_embeddings().weight.shape[0]
        conditioning = cls(
            attributes=tuple(attributes),
            token_ids=tuple(tuple(ids[a * num_quantiles : (a + 1) * num_quantiles]) for a in range(len(attributes))),
            prefix_ids=_prefix_ids(tokenizer),
            # An embedding can have more rows than the tokenizer has tokens (padding), or fewer: neither are outputs.
            vocab_size=min(rows, *ids),
        )
        conditioning.add_rows(model, seed)
        return conditioning, tokenizer

    def add_rows(self, model: PreTrainedModel, seed: int) -> None:
        """Add the embedding rows of the reward tokens to a model, in place, as `add_to` does.

        Args:
            model: the model before training.
            seed: of the new rows.
        """
        ids = self.all_token_ids
        if max(ids) >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        _draw_rows(model, ids, self.vocab_size, seed)

    def position(self, plain_ids: Sequence[int]) -> int:
        """Return the position that reward tokens get in the ids of a prompt: 0, or behind `prefix_ids`."""
        start = len(self.prefix_ids)
        return start if tuple(plain_ids[:start]) == self.prefix_ids else 0

    def prefix(self, prompt_ids: Sequence[int], quantiles: Sequence[int]) -> list[int]:
        """Return the prompt's ids with one reward token per attribute before them, after `prefix_ids`.

        Args:
            prompt_ids: a prompt without reward tokens.
            quantiles: one per attribute.
        """
        start = self.position(prompt_ids)
        return [*prompt_ids[:start], *self._tokens_of(quantiles), *prompt_ids[start:]]

    def strip(self, ids: Sequence[int]) -> list[int]:
        """Return the ids without reward tokens: the inverse of `prefix`."""
        reward_tokens = set(self.all_token_ids)
        return [int(i) for i in ids if i not in reward_tokens]

    def is_prefixed(self, ids: Sequence[int]) -> bool:
        """Return whether ids are what `prefix` returns for some quantiles."""
        start = self.position(self.strip(ids))
        tokens = ids[start : start + len(self.attributes)]
        is_one_each = len(tokens) == len(self.attributes) and all(map(operator.contains, self.token_ids, tokens))
        return is_one_each and len(self.strip(ids)) == len(ids) - len(tokens)

    def quantiles_of(self, quantile: str | int) -> tuple[int, ...]:
        """Return a quantile given by name or number as one number per attribute.

        Args:
            quantile: "best", "worst", or a number from 0 (worst) to K - 1 (best).

        Raises:
            UserError: it is none of these.
        """
        named = {"best": self.num_quantiles - 1, "worst": 0}
        text = str(quantile)
        number = named.get(text, int(text) if text.isdecimal() else -1)
        if not 0 <= number < self.num_quantiles:
            raise UserError(
                f"quantile {quantile!r}: must be best, worst, or a number from 0 (worst) to "
                f"{self.num_quantiles - 1} (best)."
            )
        return (number,) * len(self.attributes)

    def steer_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, quantiles: Sequence[int] | None = None
    ) -> PreTrainedTokenizerBase:
        """Return a copy of the tokenizer that puts the reward tokens of `quantiles` first by itself.

        Its chat template has an argument `quantile`, which selects others.

        Args:
            tokenizer: the one with reward tokens that `add_to` returned.
            quantiles: one per attribute; the best by default.

        Raises:
            UserError: the tokenizer is not a fast one.
        """
        names = ["best", "worst", *map(str, range(self.num_quantiles))]
        choices = {name: self._tokens_of(self.quantiles_of(name)) for name in names}
        return steer_tokenizer(tokenizer, self._tokens_of(quantiles or self.best), self.prefix_ids, choices)

    def add_adapter(self, model: PreTrainedModel, peft_config: Any) -> Any:
        """Return the model with an adapter of `peft` that also trains the embedding rows of the reward tokens.

        Raises:
            UserError: the adapter cannot do that, or cannot be merged (`adapters.add_adapter`).
        """
        return add_adapter(model, peft_config, self.all_token_ids)

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
            fields = facts["conditioning"]
            if not isinstance(fields["attributes"], list):
                raise TypeError("attributes: must be a list")
            token_ids = tuple(map(tuple, fields["token_ids"]))
            conditioning = cls(
                tuple(fields["attributes"]), token_ids, tuple(fields["prefix_ids"]), fields["vocab_size"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(model, repr(error)) from error
        if problem := conditioning._inconsistency():
            raise damaged(model, problem)
        return conditioning

    def _tokens_of(self, quantiles: Sequence[int]) -> list[int]:
        """The reward token of each attribute's quantile."""
        return [self.token_ids[a][q] for a, q in enumerate(quantiles)]

    def _inconsistency(self) -> str | None:
        """What is wrong with values that were read from a file; None if they are consistent."""
        ids = self.all_token_ids
        if not all(isinstance(name, str) for name in self.attributes) or not len(self.attributes) >= 1:
            return f"attributes {self.attributes!r}: must be at least one name"
        if len(self.token_ids) != len(self.attributes) or len(set(map(len, self.token_ids))) != 1:
            return "token_ids: must be equally many for each attribute"
        if self.num_quantiles < 2 or not all(type(i) is int for i in ids) or len(set(ids)) < len(ids):
            return "token_ids: must be at least two different numbers for each attribute"
        if type(self.vocab_size) is not int or not 1 <= self.vocab_size <= min(ids):
            return f"vocab_size {self.vocab_size!r}: must be the number of ids below the reward tokens"
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in self.prefix_ids):
            return f"prefix_ids {list(self.prefix_ids)!r}: must be ids below vocab_size"
        return None


def reward_token(attribute: str, quantile: int) -> str:
    """The text of a reward token in the tokenizer's vocabulary."""
    return f"<|{attribute}_{quantile}|>"


def reward_token_names(attributes: Sequence[str], num_quantiles: int) -> list[str]:
    """The texts of all reward tokens."""
    return [reward_token(name, k) for name in attributes for k in range(num_quantiles)]


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that precede the reward tokens: what the tokenizer puts first, or else the BOS of a chat template.

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


@torch.no_grad()
def _draw_rows(model: PreTrainedModel, ids: Sequence[int], vocab_size: int, seed: int) -> None:
    """Draw the rows of new tokens, in the input embedding and in an output embedding (and bias) that is not tied."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [inputs.weight] if outputs is None or outputs.weight is inputs.weight else [inputs.weight, outputs.weight]
    bias = getattr(outputs, "bias", None)
    for weight in [*weights, *([] if bias is None else [bias])]:
        old = weight[:vocab_size].float()
        noise = torch.randn((len(ids), *old.shape[1:]), generator=generator).to(old.device)
        weight[list(ids)] = (old.mean(0) + old.std(0) * noise).to(weight.dtype)
