"""Logits at completion positions only, and not even those at once.

A model's last hidden states are narrowed to the completion tokens on their way into its output layer. From there
`completion_logits` takes the model's own logits, and `completion_projection` stops: hidden states and the layer's
weights, of which `loss.quark_loss` makes logits a slice of positions at a time, so that nothing of the size
tokens x vocabulary is ever held. Whatever wraps the model (DDP, adapters, autocast) still happens.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

# Output layers whose logits are not to be had from hidden states and weights alone.
_out_of_reach: WeakSet[nn.Module] = WeakSet()

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
    return _narrowed(model, input_ids, attention_mask, labels, positions=slice(None))[1]


def completion_projection(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Projection:
    """`completion_logits`, still to be computed where the model's output layer can be reached.

    It can where the layer is one matrix product, trained or not, with at most a known soft cap or scale behind it;
    the model's own logits of the first position are held against it at every call. Where it cannot, which the log
    says once, or where the weights are spread over processes, the logits are computed whole.
    """
    layer = output_layer(model)
    if layer in _out_of_reach or is_spread(layer):
        return Projection(completion_logits(model, input_ids, attention_mask, labels))
    hidden, first = _narrowed(model, input_ids, attention_mask, labels, positions=slice(0, 1))
    if operands := _operands(layer, hidden[:1]):
        config = _unwrapped(model).config.get_text_config()
        # None where a config has the entry and no scale (MPT); a scale by name is not known, and found out below.
        factor, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
        scale = (factor if isinstance(factor, float | int) else 1.0) / (divisor or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        projection = Projection(hidden, *operands, scale, cap)
        with torch.no_grad():
            off = (projection.logits(slice(0, 1)).to(first) - first).abs().amax(-1)  # Of no position, if there is none.
            # Of the largest: bf16 rounds hidden states and weights, which the small logits are sums of too.
            if _everywhere((off <= 2e-2 * first.abs().amax(-1)).all()):
                return projection
    logger.warning(f"the output layer of {type(_unwrapped(model)).__name__} is out of reach: its logits are held whole")
    _out_of_reach.add(layer)
    return completion_projection(model, input_ids, attention_mask, labels)


def is_one_product(layer: nn.Module | None) -> bool:
    """Whether an output layer is one matrix product, so that `completion_projection` will most likely reach it."""
    weight = getattr(layer, "weight", None)
    if layer is None or not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return False
    with torch.no_grad():
        return _operands(layer, weight.new_zeros(1, weight.shape[1])) is not None


def _operands(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that is one matrix product and nothing else; None of another.

    What is learned before or behind the product would get no gradient, and may start as the identity (IA3, OFT), so
    that values do not tell: the product's input and its result have to be the layer's own.
    """
    with _Products() as products:
        logits = layer(hidden)
    if len(products.noted) != 1:
        return None
    ((input, weight, bias, result, made_by),) = products.noted
    alone = input is hidden and logits is result and logits.grad_fn is made_by  # Else it was changed in place.
    return (weight, bias) if alone else None


def _everywhere(here: Tensor) -> bool:
    """Whether it is so in all processes: one that went a way of its own would call the model once more than others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        here = here.float()
        torch.distributed.all_reduce(here, torch.distributed.ReduceOp.MIN)
    return bool(here)


def is_spread(module: nn.Module) -> bool:
    """Whether its weights are spread over processes (FSDP, ZeRO), all of which must then call it equally often."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())


def output_layer(model: nn.Module) -> nn.Module:
    """The layer that turns hidden states into logits, under whatever wraps the model."""
    return _unwrapped(model).get_output_embeddings()


def _unwrapped(model: nn.Module) -> Any:
    # By class: a DeepSpeed engine passes on what it has not, and has a `config` of its own.
    while not hasattr(type(model), "get_output_embeddings") and "module" in model._modules:
        model = model.module  # type: ignore[assignment]
    return model


def _narrowed(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, positions: slice
) -> tuple[Tensor, Tensor]:
    """Hidden states `(T, width)` before each completion token, and the logits of those at some `positions`."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    narrowed: list[Tensor] = []

    def narrow(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (hidden,) = inputs  # (batch, length, width)
        narrowed.append(hidden[predicts])
        return (narrowed[0][positions],)

    handle = output_layer(model).register_forward_pre_hook(narrow)
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        handle.remove()
    return narrowed[0], logits


class _Products(TorchFunctionMode):
    """Notes every `F.linear` while it lasts: input, weight and bias, such as an adapter puts together, and result."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Tensor, Tensor, Tensor | None, Tensor, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self._note(result, *args, **(kwargs or {}))
        return result

    def _note(self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.noted.append((input, weight, bias, result, result.grad_fn))
