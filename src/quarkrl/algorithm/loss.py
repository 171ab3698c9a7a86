"""The loss of Quark, as a function of logits.

For one completion token y_t, with policy logits z over V original and K reward tokens, the loss is

    L  =  -log p_θ(y_t | y_<t, x, r_k)  +  β KL(p_θ || p_0)  -  α H(p_θ)

- The NLL, -log softmax(z)[y_t], is over all V + K tokens. Reward tokens are conditions, never outputs, and this
  softmax teaches the policy not to produce them.
- The KL is exact, over the V original tokens, with the policy renormalised on them. The default is KL(p_θ || p_0)
  ("policy_ref", as in the official code); the paper writes KL(p_0 || p_θ) ("ref_policy").
- H is the entropy of the same renormalised policy. It is in the official code, not in the paper.

With `nll_temperature` T, the NLL is that of softmax(z / T), the policy that samples at temperature T. KL and H remain
those of the policy at temperature 1.

`quark_loss_plain` is this formula in plain autograd. `quark_loss` computes the same values and gradients over slices
of positions (see sliced_loss.py) and is what training uses.

Source: Lu et al., NeurIPS 2022 (arXiv 2205.13636), equation 2, and the official code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quarkrl.algorithm.sliced_loss import KLDirection, LossInputs, LossSettings, SlicedQuarkLoss
from quarkrl.models.completion_logits import Projection


class QuarkLoss(NamedTuple):
    """The loss and its terms: scalars, each the mean over the T completion tokens, in nats."""

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
    slice_length: int | None = None,
) -> QuarkLoss:
    """Compute Quark's loss over completion tokens.

    Only `total` carries a gradient, and only to `policy_logits`. Logits may be given as a `Projection`, which computes
    them from hidden states slice by slice. Then no array of T x (V + K) elements is held.

    Args:
        policy_logits: `(T, V + K)`, the policy's logits at the positions that predict the completion tokens; K may be
            0.
        ref_logits: `(T, V)`, the reference's logits at the same positions; None omits the KL term (reported as 0).
        targets: `(T,)`, the completion token ids, each below V + K.
        kl_coef: β, the weight of the KL term; at least 0.
        entropy_coef: α, the weight of the entropy bonus; at least 0.
        kl_direction: "policy_ref" for KL(policy || ref), "ref_policy" for KL(ref || policy).
        nll_temperature: divisor of the policy's logits in the NLL only; above 0.
        slice_length: positions that are computed at a time; None chooses a length that suits the CPU cache. It does
            not change the result beyond rounding.

    Returns:
        The means over T of the total, NLL, KL and entropy; all are 0 if T is 0.

    Raises:
        ValueError: shapes do not match, or `kl_direction` or `slice_length` is invalid.
    """
    _check(policy_logits, ref_logits, targets, kl_direction)
    if slice_length is not None and slice_length < 1:
        raise ValueError(f"slice_length {slice_length}: must be at least 1. Leave it out for the default.")
    policy = policy_logits if isinstance(policy_logits, Projection) else Projection(policy_logits)
    ref = Projection(ref_logits) if isinstance(ref_logits, Tensor) else ref_logits
    settings = LossSettings(kl_coef, entropy_coef, kl_direction, nll_temperature)
    inputs = LossInputs(policy, ref, targets, settings, slice_length)
    # Autograd sees only tensors that are direct arguments, so those with a gradient are passed on their own.
    return QuarkLoss(*SlicedQuarkLoss.apply(policy.hidden, policy.weight, policy.bias, policy.row_values, inputs))


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
    """Compute `quark_loss` in plain autograd: the same arguments and result up to rounding, but more memory."""
    _check(policy_logits, ref_logits, targets, kl_direction)
    vocab_size = policy_logits.shape[-1] if ref_logits is None else ref_logits.shape[-1]
    nll = F.cross_entropy(_widen(policy_logits) / nll_temperature, targets)
    log_p = F.log_softmax(_widen(policy_logits[:, :vocab_size]), dim=-1)  # (T, V)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    kl = torch.zeros_like(nll)
    if ref_logits is not None:
        log_q = F.log_softmax(_widen(ref_logits), dim=-1)  # (T, V)
        first, second = (log_p, log_q) if kl_direction == "policy_ref" else (log_q, log_p)
        kl = (first.exp() * (first - second)).sum(-1).mean()
    return QuarkLoss(nll + kl_coef * kl - entropy_coef * entropy, nll, kl, entropy)


def distillation_loss(policy_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> QuarkLoss:
    """Compute KL(g || p), the divergence of a policy p over V + K tokens from a teacher g over V tokens.

    The teacher gives the reward tokens no probability. So the loss teaches the policy not to produce them.

    Args:
        policy_logits: `(T, V + K)`, the policy's logits at the positions that predict the completion tokens.
        teacher_logits: `(T, V)`, the teacher's logits at the same positions; they get no gradient.
        targets: `(T,)`, the completion token ids, for the reported NLL only.

    Returns:
        The means over T of the loss (total and KL are equal), of the NLL, and of the policy's entropy.
    """
    log_p = F.log_softmax(_widen(policy_logits), dim=-1)  # (T, V + K)
    log_g = F.log_softmax(_widen(teacher_logits.detach()), dim=-1)  # (T, V)
    kl = (log_g.exp() * (log_g - log_p[:, : log_g.shape[-1]])).sum(-1).mean()
    with torch.no_grad():
        nll, entropy = F.nll_loss(log_p, targets), -(log_p.exp() * log_p).sum(-1).mean()
    return QuarkLoss(kl, nll, kl.detach(), entropy)


def _widen(logits: Tensor) -> Tensor:
    """Cast to float32 unless wider: exponentials and sums lose too much in bf16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check(
    policy_logits: Tensor | Projection, ref_logits: Tensor | Projection | None, targets: Tensor, kl_direction: str
) -> None:
    policy_shape, targets_shape = tuple(policy_logits.shape), tuple(targets.shape)
    if len(policy_shape) != 2:
        raise ValueError(f"policy_logits {policy_shape}: must have shape (T, V + K). Flatten batch and length into T.")
    if targets_shape != policy_shape[:1]:
        raise ValueError(
            f"targets {targets_shape}: must have shape {policy_shape[:1]}. Pass one token id per row of policy_logits."
        )
    if ref_logits is not None:
        ref_shape = tuple(ref_logits.shape)
        if len(ref_shape) != 2 or ref_shape[0] != policy_shape[0] or ref_shape[1] > policy_shape[1]:
            raise ValueError(
                f"ref_logits {ref_shape}: must have shape ({policy_shape[0]}, V) with V at most {policy_shape[1]}. "
                "Pass one row per row of policy_logits, over the original vocabulary."
            )
    if kl_direction not in ("policy_ref", "ref_policy"):
        raise ValueError(f'kl_direction {kl_direction!r}: must be "policy_ref" or "ref_policy".')
