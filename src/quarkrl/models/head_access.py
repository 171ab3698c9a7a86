"""Whether the loss can compute a model's logits in slices: decided once per model, when training starts.

The loss saves memory if it gets hidden states and the output layer's weights instead of logits. It then computes the
logits of some positions at a time (`Projection`). This is possible where the output layer is one matrix product. Where
it is more, such as a layer with an adapter on it, the model computes all logits itself.

`decide_head_access` makes the decision, `completion_projection` uses it in each forward pass.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quarkrl.models.completion_logits import (
    Projection,
    completion_logits,
    forward_at_completions,
    output_layer,
    unwrapped,
)
from quarkrl.models.eval_mode import eval_mode
from quarkrl.models.sharding import is_sharded
from quarkrl.models.token_rows import Rows, trained_rows

logger = logging.getLogger(__name__)

# Length of the sequence that the decision is tested on, in tokens.
_TEST_LENGTH = 8
# Largest difference from the model's own logits, relative to the largest logit of the position. It allows for bf16,
# which rounds hidden states and weights.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class HeadAccess:
    """How the loss gets the logits of one model.

    Attributes:
        sliced: the loss computes the logits from hidden states and weights; if False, the model computes them whole.
        own_weights: the output layer multiplies by its attributes `weight` and `bias`. If False, it builds its matrix
            again in each call.
        scale: a factor on the logits, from the model's config.
        cap: the soft cap of the logits, from the model's config; None for no cap.
    """

    sliced: bool
    own_weights: bool = True
    scale: float = 1.0
    cap: float | None = None


WHOLE_LOGITS = HeadAccess(sliced=False)


def decide_head_access(model: nn.Module, token_ids: Sequence[int]) -> HeadAccess:
    """Decide whether the loss can compute a model's logits in slices; log the reason where it cannot.

    Two conditions must hold. The output layer is one `F.linear` of its input and returns the result unchanged. And
    `scale * (hidden @ weight.T + bias)`, soft-capped, equals the model's own logits in one forward pass.

    Call this in all processes at the same time, after the model has its adapter, its device and its sharding. The
    forward pass is in evaluation mode, so it changes no random state.

    Args:
        model: a causal language model of transformers, wrapped or not, adapter enabled or disabled as in training.
        token_ids: tokens to test on, such as a prompt; at least one.
    """
    layer, config = output_layer(model), unwrapped(model).config
    if is_sharded(layer):  # All processes must call such a layer equally often.
        logger.info(f"the output layer of {config.model_type} is sharded over processes: its logits are computed whole")
        return WHOLE_LOGITS
    ids = (list(token_ids) * _TEST_LENGTH)[:_TEST_LENGTH]
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    labels = input_ids.clone()
    labels[:, 0] = -100  # Nothing predicts the first token.
    with torch.no_grad(), eval_mode(model):
        hidden, logits = forward_at_completions(model, input_ids, torch.ones_like(input_ids), labels)
    with torch.enable_grad():
        product = _only_product(layer, hidden[:1])
    access, agrees = WHOLE_LOGITS, torch.zeros((), dtype=torch.bool, device=logits.device)
    if product is not None:
        access = HeadAccess(True, _is_own(product, layer), *_scale_and_cap(config.get_text_config()))
        with torch.no_grad():
            sliced = product.project(hidden, access).logits()
            difference = (sliced.to(logits) - logits).abs().amax(-1)
            agrees = (difference <= _TOLERANCE * logits.abs().amax(-1)).all()
    if _in_all_processes(agrees):
        return access
    reason = "is more than one matrix product" if product is None else "gives other logits than its matrix product"
    logger.warning(
        f"the output layer of {config.model_type} {reason}: its logits are computed whole, which takes more memory"
    )
    return WHOLE_LOGITS


def completion_projection(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, head: HeadAccess
) -> Projection:
    """Run a model and return the logits of its completion tokens, not yet computed where `head` is sliced.

    Args:
        model, input_ids, attention_mask, labels: as in `completion_logits`.
        head: the decision for this model.
    """
    if not head.sliced:
        return Projection(completion_logits(model, input_ids, attention_mask, labels))
    layer = output_layer(model)
    # The model has to compute some logits: those of one position.
    hidden, _ = forward_at_completions(model, input_ids, attention_mask, labels, logits_at=slice(0, 1))
    if head.own_weights:
        return Projection(hidden, cast(Tensor, layer.weight), getattr(layer, "bias", None), head.scale, head.cap)
    product = _only_product(layer, hidden[:1])
    if product is None:
        raise RuntimeError("the output layer is no longer the single matrix product that training started with")
    return product.project(hidden, head)


def is_one_product(layer: nn.Module | None) -> bool:
    """Whether an output layer is one matrix product, so that its logits can most likely be computed in slices."""
    weight = getattr(layer, "weight", None)
    if layer is None or not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return False
    return _only_product(layer, weight.new_zeros(1, weight.shape[1])) is not None


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What a model does to its logits behind the output layer, by its config.

    `logit_scale` can be None or a word (MPT). A word counts as 1; the comparison of logits detects that it is not.
    """
    factor, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    scale = (factor if isinstance(factor, float | int) else 1.0) / (divisor or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


class _Product(NamedTuple):
    """One call of `F.linear`: its arguments, its result, and the result's `grad_fn` at that moment.

    `rows`: trained rows that take the place of rows of the weight.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    result: Tensor
    grad_fn: Any
    rows: Rows | None = None

    def project(self, hidden: Tensor, access: HeadAccess) -> Projection:
        """Return the logits of hidden states, not computed yet."""
        projection = Projection(hidden, self.weight, self.bias, access.scale, access.cap)
        if self.rows is None:
            return projection
        return projection._replace(row_ids=self.rows.ids, row_values=self.rows.values)


def _only_product(layer: nn.Module, hidden: Tensor) -> _Product | None:
    """Call a layer; return its `F.linear` if it is one matrix product and nothing else, otherwise None.

    Equal values do not prove this: trained parts before or behind the product can start as the identity (IA3, OFT), and
    would get no gradient. So the product's input and result must be the very tensors that the layer takes and returns.
    """
    hidden = hidden.detach().requires_grad_()  # An operation in place shows in `grad_fn` alone.
    with _ProductRecorder() as recorder:
        logits = layer(hidden)
    if (rows := trained_rows(layer)) is not None and len(recorder.products) == 2:
        product, other = recorder.products
        replaced = logits.grad_fn is not None and logits.grad_fn.name() == "IndexCopyBackward0"
        known = product.weight is rows.layer.weight and product.input is other.input is hidden
        return product._replace(rows=rows) if replaced and known else None
    if len(recorder.products) != 1:
        return None
    (product,) = recorder.products
    unchanged = product.input is hidden and logits is product.result and logits.grad_fn is product.grad_fn
    return product if unchanged else None


def _is_own(product: _Product, layer: nn.Module) -> bool:
    return product.weight is getattr(layer, "weight", None) and product.bias is getattr(layer, "bias", None)


def _in_all_processes(condition: Tensor) -> bool:
    """Whether a condition holds in every process. Processes that decide differently would wait for each other."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        condition = condition.float()
        torch.distributed.all_reduce(condition, torch.distributed.ReduceOp.MIN)
    return bool(condition)


class _ProductRecorder(TorchFunctionMode):
    """Records each call of `F.linear` while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[_Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self._record(result, *args, **(kwargs or {}))
        return result

    def _record(self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.products.append(_Product(input, weight, bias, result, result.grad_fn))
