"""Logits of the completion tokens only, and logits that are computed later, some positions at a time.

`completion_logits` lets a model's output layer see only the positions that predict a completion token; prompts and
padding get no logits. A `Projection` goes further: it holds hidden states and the output layer's weights in place of
logits. The loss computes logits from it in slices, so nothing of size tokens x vocabulary is ever in memory.
Everything that wraps the model (DDP, adapters, autocast) still takes effect.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quarkrl.models.encoder_decoder import is_encoder_decoder, separate

# Logit of a suppressed token: probability 0 in every precision, but finite, so that 0 times its logarithm is 0.
_SUPPRESSED_LOGIT = -1e4


class Projection(NamedTuple):
    """Logits that are not computed yet: `scale * (hidden @ weight.T + bias)`, soft-capped.

    Attributes:
        hidden: `(T, width)` hidden states; without a weight, the logits themselves, `(T, vocab)`.
        weight: `(vocab, width)`.
        bias: `(vocab,)`.
        scale: a factor on the logits.
        cap: soft cap of the logits, `cap * tanh(logits / cap)`, as in Gemma 2.
        suppressed: positions, `(T,)` bool, and token ids, `(E,)`, that have no probability at these positions.
        row_ids: `(R,)`, tokens whose rows of the weight are replaced by `row_values`.
        row_values: `(R, width)`, rows that are trained beside a frozen weight; without bias.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    suppressed: tuple[Tensor, Tensor] | None = None
    row_ids: Tensor | None = None
    row_values: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(T, vocab)`."""
        return len(self.hidden), self.hidden.shape[1] if self.weight is None else len(self.weight)

    def limit_vocab(self, vocab_size: int) -> "Projection":
        """Return the projection on the first `vocab_size` token ids."""
        if self.weight is None:
            return self._replace(hidden=self.hidden[:, :vocab_size])
        limited = self._replace(
            weight=self.weight[:vocab_size], bias=None if self.bias is None else self.bias[:vocab_size]
        )
        if self.row_ids is None or self.row_values is None:
            return limited
        kept = self.row_ids < vocab_size
        return limited._replace(row_ids=self.row_ids[kept], row_values=self.row_values[kept])

    def split(self, count: int) -> tuple["Projection", "Projection"]:
        """Return the projections of the first `count` positions and of the others. Nothing may be suppressed yet."""
        assert self.suppressed is None
        return self._replace(hidden=self.hidden[:count]), self._replace(hidden=self.hidden[count:])

    def suppress_early_eos(self, labels: Tensor, min_length: int, eos_ids: Sequence[int]) -> "Projection":
        """Return the projection without EOS in the first `min_length` tokens of each completion, as in sampling.

        Args:
            labels: `(batch, length)`, -100 except at the T completion tokens.
            min_length: tokens of a completion before its EOS, at least.
            eos_ids: the ids that end a completion.
        """
        if min_length == 0:
            return self
        completion = labels != -100
        early = completion.cumsum(-1)[completion] <= min_length
        return self._replace(suppressed=(early, torch.tensor(eos_ids, dtype=torch.long, device=labels.device)))

    def logits(self, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """Compute the logits of some positions, `(R, vocab)`.

        Args:
            rows: the positions.
            out: memory for the matrix product; unused if the projection holds logits.
        """
        if self.weight is None:
            logits = self.hidden[rows] if self.suppressed is None else self.hidden[rows].clone()
        elif self.bias is None:
            logits = torch.mm(self.hidden[rows], self.weight.T, out=out)
        else:
            logits = torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=out)
        if self.row_ids is not None and self.row_values is not None:
            logits[:, self.row_ids] = self.hidden[rows] @ self.row_values.T
        logits = logits if self.scale == 1 else logits * self.scale
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        if self.suppressed is not None:
            positions, tokens = self.suppressed
            logits[positions[rows].nonzero(), tokens] = _SUPPRESSED_LOGIT
        return logits

    def product_grad(self, logits_grad: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient with respect to `hidden @ weight.T + bias`, given that with respect to the logits."""
        grad = logits_grad if self.cap is None else logits_grad * (1 - (logits / self.cap) ** 2)
        return grad if self.scale == 1 else grad * self.scale


def completion_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Run a model and return the logits that predict the completion tokens.

    Args:
        model: a causal or encoder–decoder language model of transformers, wrapped or not.
        input_ids: `(batch, length)`, right-padded.
        attention_mask: `(batch, length)`, 1 = counts.
        labels: `(batch, length)`, the token id at completion positions, -100 elsewhere; never at position 0.

    Returns:
        `(T, V)`, in the order of `labels[labels != -100]`, as the model computes them: soft-capped, scaled, cast.
    """
    return forward_at_completions(model, input_ids, attention_mask, labels)[1]


def forward_at_completions(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, logits_at: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Run a model whose output layer sees only the positions that predict a completion token.

    Args:
        model, input_ids, attention_mask, labels: as in `completion_logits`.
        logits_at: which of the T positions get logits.

    Returns:
        The last hidden states, `(T, width)`, and the logits of the chosen positions, `(R, V)`.
    """
    if is_encoder_decoder(unwrapped(model)):
        inputs, predicts = separate(unwrapped(model), input_ids, attention_mask, labels)
    else:
        inputs, predicts = {"input_ids": input_ids, "attention_mask": attention_mask}, torch.zeros_like(labels).bool()
        predicts[:, :-1] = labels[:, 1:] != -100
    narrowed: list[Tensor] = []

    def narrow(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (hidden,) = inputs  # (batch, length, width)
        narrowed.append(hidden[predicts])
        return (narrowed[0][logits_at],)

    handle = output_layer(model).register_forward_pre_hook(narrow)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return narrowed[0], logits


def output_layer(model: nn.Module) -> nn.Module:
    """The layer of a model, wrapped or not, that turns hidden states into logits."""
    return unwrapped(model).get_output_embeddings()


def unwrapped(model: nn.Module) -> Any:
    """The model without its wrappers (DDP, DeepSpeed)."""
    # Checked on the class: a DeepSpeed engine forwards unknown attributes and has a `config` of its own.
    while not hasattr(type(model), "get_output_embeddings") and "module" in model._modules:
        model = model.module  # type: ignore[assignment]
    return model
