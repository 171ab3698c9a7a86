"""The objective of Quark as pure functions of tensors.

For one completion token with policy logits z over V original and K reward tokens, and reference logits over V:

    loss = NLL + kl_coef * KL - entropy_coef * H

- NLL = -log softmax(z)[target], over all V + K tokens: reward tokens are conditions, never outputs, and the
  softmax over all of them is what teaches the policy so.
- KL is exact, over the V original tokens with the policy renormalised on them: KL(policy || ref) by default
  ("policy_ref", as the official code), or KL(ref || policy) ("ref_policy", as the paper writes it).
- H is the entropy of the same renormalised policy distribution (official code; not in the paper).

With `nll_temperature` T the NLL is of softmax(z / T), the policy as it samples at T; KL and H are of the policy at 1.

`quark_loss` computes value and gradient together, a slice of positions at a time, from logits or from what makes
them (`projection.Projection`), in which case nothing of size tokens x vocabulary is ever held; `quark_loss_plain` is
the same in five lines of autograd, for reading and for the tests that hold the two together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quarkrl.models.completion_logits import Projection

KLDirection = Literal["policy_ref", "ref_policy"]

# Numbers in a slice of logits: few enough to stay near the cache, and rows enough for the matrix products to be fast.
_NUMBERS_PER_SLICE, _LEAST_ROWS_PER_SLICE = 2**18, 256
# Numbers of the output matrix's gradient that are added at a time where they have to be widened first.
NUMBERS_PER_PIECE = 2**22


def rows_per_slice(vocab: int) -> int:
    """Positions whose logits are made at a time."""
    return max(_NUMBERS_PER_SLICE // vocab, _LEAST_ROWS_PER_SLICE)


class QuarkLoss(NamedTuple):
    """The objective and its parts, each a scalar: the mean over T completion tokens, in nats."""

    total: Tensor
    nll: Tensor
    kl: Tensor
    entropy: Tensor


def quark_loss(
    policy_logits: Tensor | Projection,
    ref_logits: Tensor | Projection | None,
    targets: Tensor,
    *,
    kl_coef: float,
    entropy_coef: float,
    kl_direction: KLDirection = "policy_ref",
    nll_temperature: float = 1.0,
) -> QuarkLoss:
    """Quark's loss over completion tokens; only `total` carries a gradient, and only to `policy_logits`.

    Args:
        policy_logits: `(T, V + K)`, the policy's logits where each completion token is predicted; K may be 0.
        ref_logits: `(T, V)`, the reference's logits at the same places; None leaves the KL term out (reported as 0).
        targets: `(T,)`, the completion token ids, each below V + K.
        kl_coef: β, the weight of the KL term; at least 0.
        entropy_coef: α, the weight of the entropy bonus; at least 0.
        kl_direction: "policy_ref" for KL(policy || ref), "ref_policy" for KL(ref || policy).
        nll_temperature: divides the policy's logits in the NLL, and there alone; above 0.

    Returns:
        The means over T of total, NLL, KL and entropy. With T = 0 all are 0.

    Raises:
        ValueError: the shapes do not agree, or `kl_direction` is neither of the two.

    Source: Lu et al. 2022 (arXiv 2205.13636), eq. 2; the official code for the KL direction and the entropy bonus.
    """
    _check(policy_logits, ref_logits, targets, kl_direction)
    policy = policy_logits if isinstance(policy_logits, Projection) else Projection(policy_logits)
    ref = Projection(ref_logits) if isinstance(ref_logits, Tensor) else ref_logits
    # Autograd sees tensors alone, so what it is to differentiate comes apart from the rest.
    options = policy, ref, targets, kl_coef, entropy_coef, kl_direction, nll_temperature
    return QuarkLoss(*_QuarkLossFunction.apply(policy.hidden, policy.weight, policy.bias, options))


def quark_loss_plain(
    policy_logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    *,
    kl_coef: float,
    entropy_coef: float,
    kl_direction: KLDirection = "policy_ref",
    nll_temperature: float = 1.0,
) -> QuarkLoss:
    """`quark_loss` written with plain autograd: the same arguments, the same result to rounding, more memory."""
    _check(policy_logits, ref_logits, targets, kl_direction)
    vocab_size = policy_logits.shape[-1] if ref_logits is None else ref_logits.shape[-1]
    nll = F.cross_entropy(_wide(policy_logits) / nll_temperature, targets)
    log_p = F.log_softmax(_wide(policy_logits[:, :vocab_size]), dim=-1)  # (T, V)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    kl = torch.zeros_like(nll)
    if ref_logits is not None:
        log_q = F.log_softmax(_wide(ref_logits), dim=-1)
        first, second = (log_p, log_q) if kl_direction == "policy_ref" else (log_q, log_p)
        kl = (first.exp() * (first - second)).sum(-1).mean()
    return QuarkLoss(nll + kl_coef * kl - entropy_coef * entropy, nll, kl, entropy)


def _wide(logits: Tensor) -> Tensor:
    """At least single precision: exponentials and sums of bf16 logits are not taken in bf16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check(
    policy_logits: Tensor | Projection, ref_logits: Tensor | Projection | None, targets: Tensor, kl_direction: str
) -> None:
    if len(policy_logits.shape) != 2 or targets.shape != policy_logits.shape[:1]:
        raise ValueError(
            f"policy_logits {tuple(policy_logits.shape)} and targets {tuple(targets.shape)}: want (T, V + K) and (T,)"
        )
    if ref_logits is not None and (
        len(ref_logits.shape) != 2
        or ref_logits.shape[0] != policy_logits.shape[0]
        or ref_logits.shape[1] > policy_logits.shape[1]
    ):
        raise ValueError(
            f"ref_logits {tuple(ref_logits.shape)} beside policy_logits {tuple(policy_logits.shape)}: want (T, V), "
            "V at most the policy's vocabulary"
        )
    if kl_direction not in ("policy_ref", "ref_policy"):
        raise ValueError(f'kl_direction {kl_direction!r}: want "policy_ref" or "ref_policy"')


class _QuarkLossFunction(torch.autograd.Function):
    """Value and gradient in one pass over slices of positions.

    With p the policy over V + K, p' renormalised on the V original tokens and q the reference, the gradients in z:
        NLL              p - onehot(target)                   at temperature T: (p_T - onehot(target)) / T
        KL(p' || q)      p' * (log p' - log q - KL)
        KL(q || p')      p' - q
        H                -p' * (log p' + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, options):
        policy, ref, targets, *settings = options
        kl_coef, entropy_coef, _, _ = settings
        tokens, vocab = policy.shape
        # One cast for all slices, where autocast would make one for each.
        policy, ref = _as_autocast(policy), ref and _as_autocast(ref)
        wide = reduce(torch.promote_types, (each.hidden.dtype for each in (policy, ref) if each), torch.float32)
        grads = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) if wanted else None
            for tensor, wanted in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        sums = torch.zeros(3, dtype=wide, device=hidden.device)
        needs_grad = any(ctx.needs_input_grad)
        step = rows_per_slice(vocab)
        arrays = _Arrays(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, tokens, step):
                rows = slice(start, start + step)
                logits, log_q, dz = _logits(policy, rows, arrays, "z", wide), None, None
                if ref is not None:
                    ref_logits = _logits(ref, rows, arrays, "p", wide)
                    log_q = torch.log_softmax(ref_logits, -1, out=arrays.like(ref_logits, "log_q"))
                if needs_grad:  # In the logits' place, if nobody else has or needs them.
                    own = policy.weight is not None and policy.cap is None
                    dz = logits if own else arrays.like(logits, "dz")
                sums += _slice(logits, log_q, targets[rows, None], dz, arrays, *settings)
                if dz is not None:
                    _backpropagate(policy, rows, policy.before_the_cap(dz, logits), arrays, *grads)
        ctx.grads = [g if g is None else g.to(t.dtype) for g, t in zip(grads, (hidden, weight, bias), strict=True)]
        ctx.tokens = tokens
        nll, kl, entropy = sums / max(tokens, 1)
        total = nll + kl_coef * kl - entropy_coef * entropy
        ctx.mark_non_differentiable(nll, kl, entropy)
        return total, nll, kl, entropy

    @staticmethod
    def backward(ctx, grad_total, *_):
        scale = grad_total / max(ctx.tokens, 1)
        return *(grad if grad is None else grad * scale.to(grad.dtype) for grad in ctx.grads), None


def _as_autocast(projection: Projection) -> Projection:
    """The projection in the type that autocast would compute it in."""
    device = projection.hidden.device.type
    if projection.weight is None or not torch.is_autocast_enabled(device):
        return projection
    dtype = torch.get_autocast_dtype(device)
    bias = None if projection.bias is None else projection.bias.to(dtype)
    return projection._replace(hidden=projection.hidden.to(dtype), weight=projection.weight.to(dtype), bias=bias)


class _Arrays:
    """Arrays by name and type, left by one slice to the next: fresh memory takes a CPU ten times as long to fill."""

    def __init__(self, device: torch.device):
        self._device = device
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The array of a name, its contents whatever they last were."""
        count, key = math.prod(shape), (name, dtype)
        if key not in self._kept or len(self._kept[key]) < count:
            self._kept[key] = torch.empty(count, dtype=dtype, device=self._device)
        return self._kept[key][:count].view(*shape)

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """The array of a name, of a tensor's shape and type."""
        return self(name, tensor.shape, tensor.dtype)


def _logits(projection: Projection, rows: slice, arrays: _Arrays, name: str, wide: torch.dtype) -> Tensor:
    """`(R, vocab)` logits, widened to a type; in the array of the name, unless they exist already."""
    if projection.weight is None:
        return projection.logits(rows).to(wide)
    narrow = projection.hidden.dtype
    shape = len(projection.hidden[rows]), len(projection.weight)
    if narrow == wide:
        return projection.logits(rows, out=arrays(name, shape, wide))
    return arrays(name, shape, wide).copy_(projection.logits(rows, out=arrays("narrow", shape, narrow)))


def _slice(
    z: Tensor,
    log_q: Tensor | None,
    target: Tensor,
    dz: Tensor | None,
    arrays: _Arrays,
    kl_coef: float,
    entropy_coef: float,
    kl_direction: str,
    nll_temperature: float,
) -> Tensor:
    """Sums of NLL, KL and entropy over R positions.

    Args:
        z: `(R, V + K)`, the policy's logits; target: `(R, 1)`.
        log_q: `(R, V)`, the reference's log-probabilities, or None; overwritten.
        dz: `(R, V + K)`, where the gradient of the loss's sum in `z` goes, or None; it may be `z` itself.
        arrays: for what comes in between.
    """
    vocab_size = z.shape[-1] if log_q is None else log_q.shape[-1]
    original = z[:, :vocab_size]
    p = arrays.like(original, "p").copy_(original)  # For now the logits, in one piece, as the softmax wants them.
    log_p = torch.log_softmax(p, -1, out=arrays.like(p, "log_p"))
    if nll_temperature == 1:  # The NLL's p is p' but for the reward tokens' share.
        # Held against the target, or any word: not a fixed one, whose logit and log p may be too large to be exact.
        word = target.clamp(max=vocab_size - 1)
        z_word, log_p_word = z.gather(-1, word), log_p.gather(-1, word)
        log_rewards = z[:, vocab_size:] - z_word + log_p_word
        more = F.softplus(log_rewards.logsumexp(-1, keepdim=True))  # What the reward tokens add to the norm.
        nll = more - log_p_word - (z.gather(-1, target) - z_word)
    else:
        cooled = torch.div(z, nll_temperature, out=arrays.like(z, "cooled"))
        log_p_nll = torch.log_softmax(cooled, -1, out=arrays.like(z, "log_p_nll"))
        nll = -log_p_nll.gather(-1, target)
    torch.exp(log_p, out=p)
    entropy = -torch.einsum("rv,rv->r", p, log_p)[:, None]
    kl = torch.zeros_like(nll)
    if log_q is not None and kl_direction == "policy_ref":
        diff = torch.sub(log_p, log_q, out=log_q)  # Before it is summed: between two sums, it would cancel.
        kl = torch.einsum("rv,rv->r", p, diff)[:, None]
    elif log_q is not None:
        q = torch.exp(log_q, out=arrays.like(log_q, "q"))
        kl = torch.einsum("rv,rv->r", q, log_q.sub_(log_p))[:, None]
    kl.clamp_(min=0)  # Rounding alone can take it below, where the two are nearly equal.
    sums = torch.stack((nll.sum(), kl.sum(), entropy.sum()))
    if dz is None:
        return sums
    # Over the original tokens, KL(q || p') aside: p' * (entropy_coef * log p' + kl_coef * diff + shift).
    shift = entropy_coef * entropy
    if nll_temperature == 1:
        shift = shift + torch.exp(-more)
    if log_q is not None and kl_direction == "policy_ref":
        shift = shift - kl_coef * kl
    inner = torch.add(shift, log_p, alpha=entropy_coef, out=log_p)
    if log_q is not None and kl_direction == "policy_ref":
        inner.add_(diff, alpha=kl_coef)
    gradient = torch.mul(inner, p, out=dz[:, :vocab_size])
    if log_q is not None and kl_direction == "ref_policy":
        gradient.add_(p.sub_(q), alpha=kl_coef)
    if nll_temperature == 1:
        torch.exp(log_rewards - more, out=dz[:, vocab_size:])
    else:
        dz[:, vocab_size:] = 0
        dz.add_(log_p_nll.exp_(), alpha=1 / nll_temperature)
    dz.scatter_add_(-1, target, torch.full_like(nll, -1 / nll_temperature))
    return sums


def _backpropagate(
    policy: Projection,
    rows: slice,
    dz: Tensor,
    arrays: _Arrays,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Add what a slice gives to the gradients that are wanted."""
    if dbias is not None:
        dbias += dz.sum(0)
    if policy.weight is None:
        if dhidden is not None:
            dhidden[rows] = dz
        return
    if dz.dtype != policy.weight.dtype:
        dz = arrays("narrow", dz.shape, policy.weight.dtype).copy_(dz)
    if dhidden is not None:
        dhidden[rows] = dz @ policy.weight
    if dweight is not None and dweight.dtype == dz.dtype:
        dweight.addmm_(dz.T, policy.hidden[rows])
    elif dweight is not None:  # In pieces, since what is added in another type is first copied into its own.
        piece = max(NUMBERS_PER_PIECE // dweight.shape[1], 1)
        for some, of_some in zip(dz.T.split(piece), dweight.split(piece), strict=True):
            of_some += some @ policy.hidden[rows]


@dataclass
class Coefficients:
    """β and α; with a target, they adapt to it.

    Attributes:
        kl_coef, entropy_coef: β and α as they stand.
        kl_target, entropy_target: sums over a completion's tokens to aim at, in nats; None leaves the weight alone.
        horizon: samples over which the weights adapt.

    Source: the official code's controllers (after Ziegler et al. 2019). A step of n samples multiplies a weight by
    1 ± clip(measured / target - 1, -0.2, 0.2) * n / horizon: β grows where the KL is above its target, α where the
    entropy is below.
    """

    kl_coef: float
    entropy_coef: float
    kl_target: float | None = None
    entropy_target: float | None = None
    horizon: int = 2500

    @classmethod
    def of(cls, args: Any) -> "Coefficients":
        """What a `QuarkConfig` says of them."""
        return cls(args.kl_coef, args.entropy_coef, args.kl_target, args.entropy_target, args.coef_horizon)

    @property
    def current(self) -> dict[str, Any]:
        """β and α, by name."""
        return {"kl_coef": self.kl_coef, "entropy_coef": self.entropy_coef}

    @property
    def adaptive(self) -> bool:
        return self.kl_target is not None or self.entropy_target is not None

    def adapt(self, kl: float, entropy: float, samples: int) -> None:
        """Take in what a step of so many samples measured: mean KL and entropy per completion, in nats."""
        if self.kl_target is not None:
            self.kl_coef *= 1 + _clip(kl / self.kl_target - 1) * samples / self.horizon
        if self.entropy_target is not None:
            self.entropy_coef *= 1 - _clip(entropy / self.entropy_target - 1) * samples / self.horizon


def _clip(error: float) -> float:
    return min(max(error, -0.2), 0.2)
