"""The sliced loss of projections: gradients where they are wanted, and memory that slices share."""

from __future__ import annotations

from math import log

import pytest
import torch
from helpers.new_arrays import NewArrays

from quarkrl.algorithm.loss import quark_loss, quark_loss_plain
from quarkrl.models.completion_logits import Projection

COEFS = {"kl_coef": 0.3, "entropy_coef": 0.1}
TARGETS = torch.tensor([0, 5, 2, 7, 1])


def test_the_gradient_is_that_of_the_value_behind_scale_and_soft_cap():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 3), torch.randn(8, 3), torch.randn(8)
    inputs = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    ref = torch.randn(5, 6).double()

    def total(*tensors):
        return quark_loss(Projection(*tensors, scale=1.7, cap=2.0), ref, TARGETS, **COEFS).total

    assert torch.autograd.gradcheck(total, inputs)


def test_rows_that_are_trained_beside_a_frozen_weight_get_their_gradient():
    torch.manual_seed(0)
    hidden, values = torch.randn(5, 3).double().requires_grad_(), torch.randn(2, 3).double().requires_grad_()
    weight, ids, ref = torch.randn(8, 3).double(), torch.tensor([7, 2]), torch.randn(5, 6).double()

    def total(hidden, values):
        projection = Projection(hidden, weight, scale=1.7, cap=2.0, row_ids=ids, row_values=values)
        return quark_loss(projection, ref, TARGETS, **COEFS, slice_length=2).total

    assert torch.autograd.gradcheck(total, (hidden, values))
    replaced = weight.index_copy(0, ids, values)
    logits = Projection(hidden, replaced, scale=1.7, cap=2.0).logits()
    torch.testing.assert_close(total(hidden, values), quark_loss_plain(logits, ref, TARGETS, **COEFS).total)


def test_rows_beyond_a_limited_vocabulary_are_dropped():
    projection = Projection(
        torch.ones(1, 2), torch.zeros(4, 2), row_ids=torch.tensor([3, 1]), row_values=torch.ones(2, 2)
    )
    assert projection.logits().tolist() == [[0, 2, 0, 2]]
    assert projection.limit_vocab(3).logits().tolist() == [[0, 2, 0]]


@pytest.mark.parametrize("has_weight", [True, False])
def test_a_suppressed_eos_is_as_if_there_were_none(has_weight):
    """A completion of at least one token: words 0 and 1, then EOS, which is token 2 of three."""
    policy, ref = torch.tensor([3.0, 1, 4]).log().expand(2, 3), torch.tensor([1.0, 1, 2]).log().expand(2, 3)
    logits = policy.clone().requires_grad_()
    labels = torch.tensor([[-100, 0, 2, -100]])
    projections = [
        Projection(hidden, torch.eye(3) if has_weight else None).suppress_early_eos(labels, 1, [2])
        for hidden in (logits, ref.clone())
    ]
    loss = quark_loss(*projections, torch.tensor([0, 2]), kl_coef=1, entropy_coef=0)
    # First (3/4, 1/4) against (1/2, 1/2), then (3, 1, 4) / 8 against (1, 1, 2) / 4.
    assert loss.nll.item() == pytest.approx((log(4 / 3) + log(2)) / 2)
    assert loss.kl.item() == pytest.approx((0.75 * log(1.5) - 0.25 * log(2) + 3 / 8 * log(1.5) - 1 / 8 * log(2)) / 2)
    loss.total.backward()
    assert logits.grad[0, 2] == 0 != logits.grad[1, 2]
    assert torch.equal(logits, policy)


@pytest.mark.parametrize("frozen", [(False, True, True), (True, False, False)])
def test_only_trained_tensors_get_a_gradient(frozen):
    tensors = torch.randn(5, 3), torch.randn(8, 3), torch.randn(8)
    for tensor, is_frozen in zip(tensors, frozen, strict=True):
        tensor.requires_grad_(not is_frozen)
    quark_loss(Projection(*tensors), None, TARGETS, **COEFS).total.backward()
    assert [tensor.grad is None for tensor in tensors] == list(frozen)


def test_a_reference_may_have_another_dtype():
    dtypes = torch.float16, torch.bfloat16
    policy, ref = (Projection(torch.randn(5, 3, dtype=dtype), torch.randn(8, 3, dtype=dtype)) for dtype in dtypes)
    loss = quark_loss(policy, ref, TARGETS, **COEFS)
    plain = quark_loss_plain(policy.logits(), ref.logits(), TARGETS, **COEFS)
    torch.testing.assert_close(loss.kl, plain.kl, check_dtype=False, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"nll_temperature": 0.5}, {"kl_direction": "ref_policy"}])
def test_slices_share_their_arrays(dtype, options):
    counts = []
    for slices in (1, 5):
        hidden, weight = torch.randn(8 * slices, 4, dtype=dtype), torch.randn(300, 4, dtype=dtype)
        ref, targets = Projection(hidden.clone(), weight[:290].clone()), torch.arange(8 * slices)
        with NewArrays(8 * 290) as new:
            quark_loss(Projection(hidden.requires_grad_(), weight), ref, targets, **COEFS, **options, slice_length=8)
        counts.append(new.count)
    assert counts[0] == counts[1] > 0
