"""The loss of Quark over slices of positions: values and gradients in one pass.

The logits of a slice are computed, turned into their gradient in place and overwritten by those of the next slice. So
no array of tokens x vocabulary is held. Slices share their buffers.

Let z be the policy's logits and p the policy over V + K tokens. Let p' be p renormalised on the V original tokens, and
q the reference. The gradients in z are:

    NLL              p - onehot(target)
    NLL at T         (p_T - onehot(target)) / T
    KL(p' || q)      p' * (log p' - log q - KL)
    KL(q || p')      p' - q
    H                -p' * (log p' + H)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quarkrl.models.completion_logits import Projection

KLDirection = Literal["policy_ref", "ref_policy"]

# A slice of logits has about this many elements, to stay in the CPU cache ...
_SLICE_ELEMENTS = 2**18
# ... but at least this many positions, because matrix products of few rows are slow.
_MIN_SLICE_LENGTH = 256
# Elements of the output matrix's gradient that are accumulated at a time if they have to be widened first.
GRADIENT_CHUNK_ELEMENTS = 2**22


def default_slice_length(vocab_size: int) -> int:
    """Return the number of positions whose logits are computed at a time."""
    return max(_SLICE_ELEMENTS // vocab_size, _MIN_SLICE_LENGTH)


class LossSettings(NamedTuple):
    """The options of `quark_loss`."""

    kl_coef: float
    entropy_coef: float
    kl_direction: KLDirection
    nll_temperature: float


class LossInputs(NamedTuple):
    """The arguments of `quark_loss`, bundled for autograd."""

    policy: Projection  # (T, V + K)
    ref: Projection | None  # (T, V)
    targets: Tensor  # (T,)
    settings: LossSettings
    slice_length: int | None


class SlicedQuarkLoss(torch.autograd.Function):
    """Autograd function of the policy's hidden states and output layer; returns total, NLL, KL and entropy."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, row_values, inputs):
        """Compute total, NLL, KL and entropy, and the gradient that `backward` scales."""
        tokens, vocab_size = inputs.policy.shape
        kl_coef, entropy_coef, _, _ = inputs.settings
        # Cast once, because autocast would cast again for every slice.
        policy = cast_as_autocast(inputs.policy)
        ref = None if inputs.ref is None else cast_as_autocast(inputs.ref)
        dtypes = [projection.hidden.dtype for projection in (policy, ref) if projection is not None]
        dtype = reduce(torch.promote_types, dtypes, torch.float32)  # That of the loss: at least float32.
        tensors = hidden, weight, bias, row_values
        gradients = _Gradients.zeros(tensors, ctx.needs_input_grad[:4])
        sums = torch.zeros(3, dtype=dtype, device=hidden.device)
        step = inputs.slice_length or default_slice_length(vocab_size)
        buffers = _Buffers(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, tokens, step):
                rows = slice(start, start + step)
                target = inputs.targets[rows, None]  # (R, 1)
                z = _compute_logits(policy, rows, buffers, "z", dtype)
                log_q = None if ref is None else _compute_log_q(ref, rows, buffers, dtype)
                terms = _compute_terms(z, log_q, target, inputs.settings, buffers)
                sums += torch.stack((terms.nll.value.sum(), terms.kl.sum(), terms.entropy.sum()))
                if any(ctx.needs_input_grad):
                    # The gradient overwrites the logits, unless they are the caller's or the soft cap needs them.
                    reusable = policy.weight is not None and policy.cap is None
                    dz = z if reusable else buffers.empty_like(z, "dz")
                    _compute_gradient(terms, target, inputs.settings, dz)
                    gradients.add(policy, rows, policy.product_grad(dz, z), buffers)
        ctx.gradients = gradients.cast_as(tensors)
        ctx.tokens = tokens
        nll, kl, entropy = sums / max(tokens, 1)
        total = nll + kl_coef * kl - entropy_coef * entropy
        ctx.mark_non_differentiable(nll, kl, entropy)
        return total, nll, kl, entropy

    @staticmethod
    def backward(ctx, grad_total, *_):
        """Scale the gradient that `forward` computed."""
        scale = grad_total / max(ctx.tokens, 1)
        return *(grad if grad is None else grad * scale.to(grad.dtype) for grad in ctx.gradients), None


def cast_as_autocast(projection: Projection) -> Projection:
    """Cast a projection to the dtype in which autocast would compute it."""
    device = projection.hidden.device.type
    if projection.weight is None or not torch.is_autocast_enabled(device):
        return projection
    dtype = torch.get_autocast_dtype(device)
    names = "hidden", "weight", "bias", "row_values"
    tensors = {name: getattr(projection, name) for name in names}
    return projection._replace(**{name: tensor.to(dtype) for name, tensor in tensors.items() if tensor is not None})


def log_likelihoods(projection: Projection, labels: Tensor) -> Tensor:
    """Return the log-likelihood of each completion, `(batch,)`; gradients hold the logits of one slice at a time.

    Args:
        projection: `(T, V)`, the logits that predict the T completion tokens.
        labels: `(batch, length)`, -100 except at the completion tokens.
    """
    is_completion = labels != -100
    targets, projection = labels[is_completion], cast_as_autocast(projection)
    step, nll = default_slice_length(projection.shape[1]), []
    with torch.autocast(labels.device.type, enabled=False):
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            nll.append(
                checkpoint(_nll_of, projection, rows, targets[rows], use_reentrant=False, preserve_rng_state=False)
            )
    total = torch.zeros(len(labels), device=labels.device, dtype=nll[0].dtype)
    return total.index_add(0, is_completion.nonzero()[:, 0], torch.cat(nll), alpha=-1)


def _nll_of(projection: Projection, rows: slice, targets: Tensor) -> Tensor:
    logits = projection.logits(rows)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="none")


@dataclass
class _Buffers:
    """Uninitialised arrays, by name and dtype, that slices share.

    Filling freshly allocated memory takes a CPU about ten times as long as filling memory that is in use.
    """

    device: torch.device
    arrays: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the array of this name with the given shape; its contents are arbitrary."""
        count, key = math.prod(shape), (name, dtype)
        if key not in self.arrays or len(self.arrays[key]) < count:
            self.arrays[key] = torch.empty(count, dtype=dtype, device=self.device)
        return self.arrays[key][:count].view(*shape)

    def empty_like(self, tensor: Tensor, name: str) -> Tensor:
        """Return the array of this name with the shape and dtype of `tensor`."""
        return self.empty(name, tensor.shape, tensor.dtype)


def _compute_logits(projection: Projection, rows: slice, buffers: _Buffers, name: str, dtype: torch.dtype) -> Tensor:
    """Return `(R, vocab)` logits in `dtype`, in the buffer `name` unless the projection already has them."""
    if projection.weight is None:
        return projection.logits(rows).to(dtype)
    narrow = projection.hidden.dtype
    shape = len(projection.hidden[rows]), len(projection.weight)
    if narrow == dtype:
        return projection.logits(rows, out=buffers.empty(name, shape, dtype))
    return buffers.empty(name, shape, dtype).copy_(projection.logits(rows, out=buffers.empty("narrow", shape, narrow)))


def _compute_log_q(ref: Projection, rows: slice, buffers: _Buffers, dtype: torch.dtype) -> Tensor:
    """Return `(R, V)`, the reference's log-probabilities."""
    logits = _compute_logits(ref, rows, buffers, "p", dtype)  # The policy's p needs its buffer only later.
    return torch.log_softmax(logits, -1, out=buffers.empty_like(logits, "log_q"))


class _Nll(NamedTuple):
    """The NLL of R positions at temperature 1, and the parts of p that p' lacks."""

    value: Tensor  # (R, 1)
    log_reward_odds: Tensor  # (R, K), log of p(reward token) / p(all V original tokens)
    log_norm: Tensor  # (R, 1), -log of p(all V original tokens)


class _TemperedNll(NamedTuple):
    """The NLL of R positions at another temperature, and the log-probabilities at that temperature."""

    value: Tensor  # (R, 1)
    log_p: Tensor  # (R, V + K)


class _Terms(NamedTuple):
    """The loss terms of R positions, and what their gradient needs."""

    nll: _Nll | _TemperedNll
    kl: Tensor  # (R, 1)
    entropy: Tensor  # (R, 1)
    p: Tensor  # (R, V), p'
    log_p: Tensor  # (R, V), log p'
    log_ratio: Tensor | None  # (R, V), log p' - log q, for KL(p' || q)
    q: Tensor | None  # (R, V), for KL(q || p')


def _compute_nll(z: Tensor, log_p: Tensor, target: Tensor) -> _Nll:
    """Compute the NLL at temperature 1 from log p' and the reward tokens' logits."""
    vocab_size = log_p.shape[-1]
    # Logits are relative to the target's: relative to a fixed token's, which may be extreme, they would be inexact.
    token = target.clamp(max=vocab_size - 1)
    z_token, log_p_token = z.gather(-1, token), log_p.gather(-1, token)
    log_reward_odds = z[:, vocab_size:] - z_token + log_p_token
    log_norm = F.softplus(log_reward_odds.logsumexp(-1, keepdim=True))
    nll = log_norm - log_p_token - (z.gather(-1, target) - z_token)
    return _Nll(nll, log_reward_odds, log_norm)


def _compute_tempered_nll(z: Tensor, target: Tensor, temperature: float, buffers: _Buffers) -> _TemperedNll:
    """Compute the NLL of softmax(z / temperature)."""
    tempered = torch.div(z, temperature, out=buffers.empty_like(z, "tempered"))
    log_p = torch.log_softmax(tempered, -1, out=buffers.empty_like(z, "log_p_tempered"))
    return _TemperedNll(-log_p.gather(-1, target), log_p)


def _compute_terms(
    z: Tensor, log_q: Tensor | None, target: Tensor, settings: LossSettings, buffers: _Buffers
) -> _Terms:
    """Compute NLL, KL and entropy of R positions.

    Args:
        z: `(R, V + K)`, the policy's logits.
        log_q: `(R, V)`, the reference's log-probabilities, or None; overwritten.
        target: `(R, 1)`, token ids.
        settings: the options of the loss.
        buffers: memory for intermediate results.
    """
    vocab_size = z.shape[-1] if log_q is None else log_q.shape[-1]
    original = z[:, :vocab_size]
    p = buffers.empty_like(original, "p").copy_(original)  # The logits for now, contiguous for the softmax.
    log_p = torch.log_softmax(p, -1, out=buffers.empty_like(p, "log_p"))
    nll: _Nll | _TemperedNll
    if settings.nll_temperature == 1:
        nll = _compute_nll(z, log_p, target)
    else:
        nll = _compute_tempered_nll(z, target, settings.nll_temperature, buffers)
    torch.exp(log_p, out=p)
    entropy = -torch.einsum("rv,rv->r", p, log_p)[:, None]
    kl, log_ratio, q = torch.zeros_like(nll.value), None, None
    if log_q is not None and settings.kl_direction == "policy_ref":
        # Subtracted before it is summed: a difference of two sums would cancel.
        log_ratio = torch.sub(log_p, log_q, out=log_q)
        kl = torch.einsum("rv,rv->r", p, log_ratio)[:, None]
    elif log_q is not None:
        q = torch.exp(log_q, out=buffers.empty_like(log_q, "q"))
        kl = torch.einsum("rv,rv->r", q, log_q.sub_(log_p))[:, None]
    kl.clamp_(min=0)  # Rounding can make it negative if the two distributions are nearly equal.
    return _Terms(nll, kl, entropy, p, log_p, log_ratio, q)


def _compute_gradient(terms: _Terms, target: Tensor, settings: LossSettings, dz: Tensor) -> None:
    """Write the gradient in z of the loss's sum over R positions to `dz`, `(R, V + K)`; overwrites the terms.

    Over the original tokens, without KL(q || p'), it is p' * (entropy_coef * log p' + kl_coef * log_ratio + shift).
    """
    kl_coef, entropy_coef, _, temperature = settings
    nll, vocab_size = terms.nll, terms.p.shape[-1]
    shift = entropy_coef * terms.entropy
    if isinstance(nll, _Nll):
        shift = shift + torch.exp(-nll.log_norm)
    if terms.log_ratio is not None:
        shift = shift - kl_coef * terms.kl
    inner = torch.add(shift, terms.log_p, alpha=entropy_coef, out=terms.log_p)
    if terms.log_ratio is not None:
        inner.add_(terms.log_ratio, alpha=kl_coef)
    gradient = torch.mul(inner, terms.p, out=dz[:, :vocab_size])
    if terms.q is not None:
        gradient.add_(terms.p.sub_(terms.q), alpha=kl_coef)
    if isinstance(nll, _Nll):
        torch.exp(nll.log_reward_odds - nll.log_norm, out=dz[:, vocab_size:])
    else:
        dz[:, vocab_size:] = 0
        dz.add_(nll.log_p.exp_(), alpha=1 / temperature)
    dz.scatter_add_(-1, target, torch.full_like(nll.value, -1 / temperature))


class _Gradients(NamedTuple):
    """Gradients that slices accumulate, at least in float32; None where none is needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    row_values: Tensor | None

    @classmethod
    def zeros(cls, tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> "_Gradients":
        return cls(
            *(
                torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
                if tensor is not None and wanted
                else None
                for tensor, wanted in zip(tensors, needed, strict=True)
            )
        )

    def add(self, policy: Projection, rows: slice, dz: Tensor, buffers: _Buffers) -> None:
        """Add the contribution of one slice, from the gradient `(R, V + K)` in its logits; overwrites the gradient.

        The gradient is that in the logits before scale and cap.
        """
        if self.bias is not None:
            self.bias.add_(dz.sum(0))
        if policy.weight is None:
            if self.hidden is not None:
                self.hidden[rows] = dz
            return
        if dz.dtype != policy.weight.dtype:
            dz = buffers.empty("narrow", dz.shape, policy.weight.dtype).copy_(dz)
        dz_rows = None
        if (
            policy.row_ids is not None and policy.row_values is not None
        ):  # The weight's own rows for these tokens are not in use.
            dz_rows = dz[:, policy.row_ids]
            dz.index_fill_(1, policy.row_ids, 0)
        if self.hidden is not None:
            self.hidden[rows] = dz @ policy.weight
            if dz_rows is not None and policy.row_values is not None:
                self.hidden[rows] += dz_rows @ policy.row_values
        if self.row_values is not None and dz_rows is not None:
            self.row_values.add_(dz_rows.T @ policy.hidden[rows])
        if self.weight is not None and self.weight.dtype == dz.dtype:
            self.weight.addmm_(dz.T, policy.hidden[rows])
        elif self.weight is not None:  # In chunks, because the product is widened in a copy before it is added.
            length = max(GRADIENT_CHUNK_ELEMENTS // self.weight.shape[1], 1)
            for dz_chunk, weight_chunk in zip(dz.T.split(length), self.weight.split(length), strict=True):
                weight_chunk += dz_chunk @ policy.hidden[rows]

    def cast_as(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(self, tensors, strict=True)
        ]
