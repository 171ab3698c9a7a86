"""Logits at completion positions only, and not even those at once.

A model's last hidden states are narrowed to the completion tokens on their way into its output layer. From there
`completion_logits` takes the model's own logits, and `completion_projection` stops: hidden states and the layer's
weights, of which `loss.quark_loss` makes logits a slice of positions at a time, so that nothing of the size
tokens x vocabulary is ever held. Whatever wraps the model (DDP, adapters, autocast) still happens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The logit of what may not come: no probability, in any precision, and finite, so that 0 times its logarithm is 0.
_NEVER = -1e4


class Projection(NamedTuple):
    """Logits that are still to be computed: `scale * (hidden @ weight.T + bias)`, soft-capped.

    Attributes:
        hidden: `(T, width)`; without a weight these are the logits themselves, `(T, vocab)`.
        weight: `(vocab, width)`.
        bias: `(vocab,)`.
        scale: a factor.
        cap: `cap * tanh(logits / cap)`, as Gemma 2 has it.
        ruled_out: which positions, `(T,)` bool, may not have which tokens, `(E,)` ids: their logits are `_NEVER` there.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    ruled_out: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(T, vocab)`."""
        return len(self.hidden), self.hidden.shape[1] if self.weight is None else len(self.weight)

    def of_first(self, vocab_size: int) -> "Projection":
        """Without the logits of other than the first tokens."""
        if self.weight is None:
            return self._replace(hidden=self.hidden[:, :vocab_size])
        return self._replace(
            weight=self.weight[:vocab_size], bias=None if self.bias is None else self.bias[:vocab_size]
        )

    def logits(self, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """`(R, vocab)` of the given positions; the matrix product goes into `out`, where one is given and needed."""
        if self.weight is None:
            logits = self.hidden[rows] if self.ruled_out is None else self.hidden[rows].clone()
        elif self.bias is None:
            logits = torch.mm(self.hidden[rows], self.weight.T, out=out)
        else:
            logits = torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=out)
        logits = logits if self.scale == 1 else logits * self.scale
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        if self.ruled_out is not None:
            positions, tokens = self.ruled_out
            logits[positions[rows].nonzero(), tokens] = _NEVER
        return logits

    def unended(self, labels: Tensor, least: int, end_ids: Sequence[int]) -> "Projection":
        """Of completions that cannot end before they have `least` tokens: no EOS where it was ruled out in sampling.

        Args:
            labels: `(batch, length)`, -100 but for the T completion tokens.
            least: tokens of a completion that are not EOS.
            end_ids: EOS ids.
        """
        if least == 0:
            return self
        completion = labels != -100
        early = completion.cumsum(-1)[completion] <= least
        return self._replace(ruled_out=(early, torch.tensor(end_ids, dtype=torch.long, device=labels.device)))

    def before_the_cap(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient in `hidden @ weight.T + bias`, from that in the logits."""
        grad = grad if self.cap is None else grad * (1 - (logits / self.cap) ** 2)
        return grad if self.scale == 1 else grad * self.scale


def completion_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The logits that predict the completion tokens, and no others: prompts' and padding's are never computed.

    Args:
        model: a causal language model of transformers, wrapped or not.
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
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    narrowed: list[Tensor] = []

    def narrow(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (hidden,) = inputs  # (batch, length, width)
        narrowed.append(hidden[predicts])
        return (narrowed[0][logits_at],)

    handle = output_layer(model).register_forward_pre_hook(narrow)
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
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
