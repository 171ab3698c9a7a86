"""Conditioning: which tokens, put before a prompt, ask for which quantile.

Each attribute has K reward tokens, `<|reward_0|>` (worst) to `<|reward_K-1|>` (best), added to the tokenizer and to
the model as new rows. They stand after BOS, where the tokenizer adds one, and before the prompt. They are conditions,
never outputs: every sampler here suppresses them. The tokenizer that `steered` gives puts them there by itself, and
so does its chat template, so that a saved model is steered wherever plain transformers loads it.
"""

import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from quarkrl.errors import UserError
from quarkrl.storage.json import nan_to_null

FACTS_FILE = "quark.json"


@dataclass(frozen=True)
class Conditioning:
    """The reward tokens of a model.

    Attributes:
        attributes: names of the A rewards that condition.
        token_ids: `(A, K)` ids of the reward tokens, worst first.
        bos_id: the token that stays in front of them, where a prompt begins with it.
        vocab_size: V, how many token ids are the model's original ones; outputs are always below it.
    """

    attributes: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    bos_id: int | None
    vocab_size: int

    @property
    def num_quantiles(self) -> int:
        return len(self.token_ids[0])

    @property
    def best(self) -> tuple[int, ...]:
        """The best quantile under every attribute."""
        return (self.num_quantiles - 1,) * len(self.attributes)

    @classmethod
    def add_to(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        num_quantiles: int,
        attributes: Sequence[str] = ("reward",),
        seed: int = 0,
    ) -> tuple["Conditioning", PreTrainedTokenizerBase]:
        """Add reward tokens to a model in place, and to a copy of its tokenizer.

        The new rows are drawn, per dimension, from N(mean, std) of the existing rows (paper, section 2; official
        code), for the input and, if it is not tied, the output embedding.

        Returns:
            The conditioning and the tokenizer that knows its tokens.

        Raises:
            UserError: the tokenizer already has reward tokens (the model was trained by Quark before).
        """
        names = [reward_token(name, k) for name in attributes for k in range(num_quantiles)]
        known = set(tokenizer.get_vocab())
        if taken := [name for name in names if name in known]:
            raise UserError(
                f"the tokenizer already has the reward token {taken[0]}: this model was trained by Quark before; "
                "start from the model it was made of"
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(names, special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(names)
        rows = model.get_input_embeddings().weight.shape[0]
        conditioning = cls(
            attributes=tuple(attributes),
            token_ids=tuple(tuple(ids[a * num_quantiles : (a + 1) * num_quantiles]) for a in range(len(attributes))),
            bos_id=tokenizer.bos_token_id,
            # Rows that pad the embedding beyond the tokenizer are no tokens; a tokenizer larger than it has no rows.
            vocab_size=min(rows, *ids),
        )
        if max(ids) >= rows:
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        _draw_rows(model, ids, conditioning.vocab_size, seed)
        return conditioning, tokenizer

    def prefix(self, prompt_ids: Sequence[int], quantiles: Sequence[int]) -> list[int]:
        """The prompt's ids with the reward token of each attribute's quantile before it (after BOS)."""
        tokens = [self.token_ids[a][q] for a, q in enumerate(quantiles)]
        start = int(len(prompt_ids) > 0 and prompt_ids[0] == self.bos_id)
        return [*prompt_ids[:start], *tokens, *prompt_ids[start:]]

    def strip(self, ids: Sequence[int]) -> list[int]:
        """The ids without any reward token: what a steered tokenizer gave, as a plain one would give it."""
        reward_tokens = {i for row in self.token_ids for i in row}
        return [int(i) for i in ids if i not in reward_tokens]

    def quantiles_of(self, quantile: str | int) -> tuple[int, ...]:
        """One quantile per attribute from what a user asks for.

        Args:
            quantile: "best", "worst", or a number from 0 (worst) to K - 1 (best).

        Raises:
            UserError: anything else.
        """
        named = {"best": self.num_quantiles - 1, "worst": 0}
        text = str(quantile)
        number = named.get(text, int(text) if text.isdecimal() else -1)
        if not 0 <= number < self.num_quantiles:
            raise UserError(
                f"quantile {quantile!r}: want best, worst or a number from 0 (worst) to {self.num_quantiles - 1} (best)"
            )
        return (number,) * len(self.attributes)

    def steered(
        self, tokenizer: PreTrainedTokenizerBase, quantiles: Sequence[int] | None = None
    ) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer that puts the reward tokens of `quantiles` (default: the best) first by itself.

        Raises:
            UserError: the tokenizer is not a fast one, whose post-processor can be set.
        """
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} is a slow tokenizer: Quark needs a fast one (tokenizer.json)")
        tokens = [self.token_ids[a][q] for a, q in enumerate(quantiles or self.best)]
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        before, after = full[:start], full[start + len(plain) :]
        single = [*before, *tokens, "$A", *after]
        pair = [*single, *before, "$B:1", *after]
        steered = copy.deepcopy(tokenizer)
        named = {i: steered.convert_ids_to_tokens(i) for i in (*before, *tokens, *after)}
        steered.backend_tokenizer.post_processor = TemplateProcessing(
            single=[named.get(piece, piece) for piece in single],
            pair=[named.get(piece, piece) for piece in pair],
            special_tokens=[(name, i) for i, name in named.items()],
        )
        steered._should_update_post_processor = False
        if isinstance(steered.chat_template, str):
            text = "".join(steered.convert_ids_to_tokens(tokens))
            steered.chat_template = _steered_template(steered.chat_template, text, steered.bos_token)
        return steered

    def with_adapter(self, model: PreTrainedModel, peft_config: Any) -> Any:
        """The model with an adapter of `peft`, whose reward-token rows are trained too."""
        from peft import get_peft_model

        peft_config = copy.deepcopy(peft_config)
        if getattr(peft_config, "trainable_token_indices", False) is None and not peft_config.modules_to_save:
            peft_config.trainable_token_indices = [i for row in self.token_ids for i in row]
        return get_peft_model(model, peft_config)

    def save(self, directory: str | os.PathLike, **facts: Any) -> None:
        """Write `quark.json`: the conditioning, and whatever facts of the run belong with the model."""
        target = Path(directory) / FACTS_FILE
        temporary = target.with_suffix(".tmp")
        temporary.write_text(
            json.dumps(nan_to_null({"conditioning": asdict(self), **facts}), indent=2) + "\n", encoding="utf-8"
        )
        os.replace(temporary, target)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Conditioning | None":
        """Read the conditioning of a model, from a directory or the hub; None if Quark did not train it.

        Raises:
            UserError: `quark.json` is damaged.
        """
        facts = load_facts(path)
        if facts is None:
            return None
        try:
            found = facts["conditioning"]
            if not isinstance(found["attributes"], list):
                raise TypeError("attributes: want a list")
            ids = tuple(map(tuple, found["token_ids"]))
            loaded = cls(tuple(found["attributes"]), ids, found["bos_id"], found["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, repr(error)) from error
        if problem := loaded._problem():
            raise _damaged(path, problem)
        return loaded

    def _problem(self) -> str | None:
        """What cannot be so, of a conditioning that was read from a file."""
        ids = [i for row in self.token_ids for i in row]
        if not all(isinstance(name, str) for name in self.attributes) or not len(self.attributes) >= 1:
            return f"attributes {self.attributes!r}"
        if len(self.token_ids) != len(self.attributes) or len(set(map(len, self.token_ids))) != 1:
            return "token_ids: want as many for each attribute"
        if self.num_quantiles < 2 or len(set(ids)) < len(ids) or not all(type(i) is int for i in ids):
            return "token_ids: want two and more for each attribute, all different"
        if type(self.vocab_size) is not int or not 1 <= self.vocab_size <= min(ids):
            return f"vocab_size {self.vocab_size!r}: want the number of ids before the reward tokens"
        if not (self.bos_id is None or (type(self.bos_id) is int and 0 <= self.bos_id < self.vocab_size)):
            return f"bos_id {self.bos_id!r}"
        return None


def load_facts(path: str | os.PathLike) -> dict[str, Any] | None:
    """What `quark.json` says of a model, from a directory or the hub; None if there is none.

    Raises:
        UserError: it is no JSON object.
    """
    file = cached_file(
        str(path),
        FACTS_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    try:
        facts = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(facts, dict):
        raise _damaged(path, "no JSON object")
    return facts


def reference_name(path: str | os.PathLike) -> str | None:
    """The model that one was trained from, by what `quark.json` says; None where it says nothing.

    Raises:
        UserError: `quark.json` is damaged.
    """
    reference = (load_facts(path) or {}).get("reference") or {}
    name = reference.get("name") if isinstance(reference, dict) else reference
    if not isinstance(reference, dict) or not isinstance(name, str | None):
        raise _damaged(path, f"reference {reference!r}")
    return name


def _damaged(path: str | os.PathLike, problem: str) -> UserError:
    return UserError(f"{path}: {FACTS_FILE} is damaged ({problem}); want what `quarkrl train` wrote")


def reward_token(attribute: str, quantile: int) -> str:
    """The text of a reward token, as the tokenizer lists it."""
    return f"<|{attribute}_{quantile}|>"


@torch.no_grad()
def _draw_rows(model: PreTrainedModel, ids: Sequence[int], vocab_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [inputs.weight] if outputs is None or outputs.weight is inputs.weight else [inputs.weight, outputs.weight]
    bias = getattr(outputs, "bias", None)
    for weight in [*weights, *([] if bias is None else [bias])]:
        old = weight[:vocab_size].float()
        noise = torch.randn((len(ids), *old.shape[1:]), generator=generator).to(old.device)
        weight[list(ids)] = (old.mean(0) + old.std(0) * noise).to(weight.dtype)


def _steered_template(template: str, reward_tokens: str, bos_token: str | None) -> str:
    """A chat template that renders as before, with the reward tokens in front (after BOS, if it renders BOS)."""
    # transformers' environment drops a newline behind a tag, blanks before one, and the newline that ends a template:
    # so the template starts on a line of its own, the closing tag keeps (+) what is before it, and that newline goes.
    body = re.sub(r"(\r\n|\r|\n)\Z", "", template)
    bos, tokens = (json.dumps(text, ensure_ascii=False) for text in (bos_token or "", reward_tokens))
    return (
        "{% set quark_text %}\n" + body + "{%+ endset %}"
        "{% set quark_bos = " + bos + " if quark_text.startswith(" + bos + ") else '' %}"
        "{{ quark_bos + " + tokens + " + quark_text[quark_bos | length:] }}"
    )
