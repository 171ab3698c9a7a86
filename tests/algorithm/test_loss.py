"""The loss: values worked out by hand, its gradient, its bounds, and arguments that it refuses.

Each test marked BOTH_FORMS runs on the plain form and on the sliced form.
"""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quarkrl.algorithm.loss import distillation_loss, quark_loss, quark_loss_plain

BOTH_FORMS = pytest.mark.parametrize("loss", [quark_loss, quark_loss_plain])
DIRECTIONS = pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])

# Of p = (3/4, 1/4) and q = (1/2, 1/2):
KL_P_Q = 0.75 * log(1.5) - 0.25 * log(2)  # 3/4 log(3/4 : 1/2) + 1/4 log(1/4 : 1/2)
KL_Q_P = 0.5 * log(4 / 3)  # 1/2 log(1/2 : 3/4) + 1/2 log(1/2 : 1/4) = 1/2 log 2/3 + 1/2 log 2
ENTROPY_P = 0.75 * log(4 / 3) + 0.25 * log(4)


def logits_of(*rows: list[float]) -> Tensor:
    """Logits of probabilities; a softmax normalises them, so each row may sum to any number."""
    return torch.tensor(rows, dtype=torch.float64).log()


def random_case(tokens: int, vocab: int, extra: int) -> tuple[Tensor, Tensor, Tensor]:
    """Policy logits `(tokens, vocab + extra)`, reference logits `(tokens, vocab)` and targets."""
    policy = 2 * torch.randn(tokens, vocab + extra, dtype=torch.float64)
    ref = 2 * torch.randn(tokens, vocab, dtype=torch.float64)
    return policy.requires_grad_(), ref, torch.randint(vocab, (tokens,))


# Values by hand


@BOTH_FORMS
def test_one_position_with_a_vocabulary_of_two(loss):
    # p = (3/4, 1/4), q = (1/2, 1/2), target 0: NLL = -log 3/4.
    result = loss(logits_of([3, 1]), logits_of([1, 1]), torch.tensor([0]), kl_coef=0.05, entropy_coef=0.06)
    assert result.nll.item() == pytest.approx(log(4 / 3))
    assert result.kl.item() == pytest.approx(KL_P_Q)
    assert result.entropy.item() == pytest.approx(ENTROPY_P)
    assert result.total.item() == pytest.approx(log(4 / 3) + 0.05 * KL_P_Q - 0.06 * ENTROPY_P)


@BOTH_FORMS
def test_each_direction_of_the_kl(loss):
    case = (logits_of([3, 1]), logits_of([1, 1]), torch.tensor([0]))
    policy_ref = loss(*case, kl_coef=1, entropy_coef=0, kl_direction="policy_ref").kl.item()
    ref_policy = loss(*case, kl_coef=1, entropy_coef=0, kl_direction="ref_policy").kl.item()
    assert policy_ref == pytest.approx(KL_P_Q)
    assert ref_policy == pytest.approx(KL_Q_P)
    assert abs(policy_ref - ref_policy) > 0.01


@BOTH_FORMS
@DIRECTIONS
def test_a_reward_token_counts_in_the_nll_only(loss, direction):
    # Over V + K, p = (3, 1 | 4) / 8, so the NLL of target 1 is log 8. Over V, p = (3/4, 1/4) as above.
    case = (logits_of([3, 1, 4]), logits_of([1, 1]), torch.tensor([1]))
    result = loss(*case, kl_coef=2, entropy_coef=1, kl_direction=direction)
    kl = KL_P_Q if direction == "policy_ref" else KL_Q_P
    assert result.nll.item() == pytest.approx(log(8))
    assert result.kl.item() == pytest.approx(kl)
    assert result.entropy.item() == pytest.approx(ENTROPY_P)
    assert result.total.item() == pytest.approx(log(8) + 2 * kl - ENTROPY_P)


@BOTH_FORMS
def test_the_temperature_applies_to_the_nll_only(loss):
    # At temperature 1/2 p over V + K is (9, 1 | 16) / 26, so the NLL of target 1 is log 26. KL and H are as above.
    case = (logits_of([3, 1, 4]), logits_of([1, 1]), torch.tensor([1]))
    result = loss(*case, kl_coef=2, entropy_coef=1, nll_temperature=0.5)
    assert result.nll.item() == pytest.approx(log(26))
    assert result.kl.item() == pytest.approx(KL_P_Q)
    assert result.entropy.item() == pytest.approx(ENTROPY_P)
    assert result.total.item() == pytest.approx(log(26) + 2 * KL_P_Q - ENTROPY_P)


@BOTH_FORMS
def test_terms_are_means_over_positions(loss):
    # NLLs log 2 and log 4; KLs to a uniform reference 0 and KL_P_Q.
    policy, ref = logits_of([1, 1], [3, 1]), logits_of([1, 1], [1, 1])
    result = loss(policy, ref, torch.tensor([0, 1]), kl_coef=0, entropy_coef=0)
    assert result.nll.item() == pytest.approx((log(2) + log(4)) / 2)
    assert result.kl.item() == pytest.approx(KL_P_Q / 2)
    assert result.entropy.item() == pytest.approx((log(2) + ENTROPY_P) / 2)


@BOTH_FORMS
def test_without_a_reference_the_kl_is_zero(loss):
    result = loss(logits_of([3, 1]), None, torch.tensor([0]), kl_coef=7, entropy_coef=0)
    assert result.kl.item() == 0
    assert result.total.item() == pytest.approx(log(4 / 3))


# Gradients


@BOTH_FORMS
@pytest.mark.parametrize(("direction", "kl_gradient"), [("ref_policy", -0.25), ("policy_ref", -3 / 16 * log(3))])
def test_the_gradient_by_hand(loss, direction, kl_gradient):
    # p = (1/4, 3/4), target 0, q = (1/2, 1/2).   d NLL = p - (1, 0) = (-3/4, 3/4).   d KL(q||p) = p - q = (-1/4, 1/4).
    # d KL(p||q) / dz_0 = p_0 (log p_0/q_0 - KL) = 1/4 (log 1/2 - 1/4 log 1/2 - 3/4 log 3/2) = -3/16 log 3
    policy = logits_of([1, 3]).requires_grad_()
    case = (policy, logits_of([1, 1]), torch.tensor([0]))
    loss(*case, kl_coef=2, entropy_coef=0, kl_direction=direction).total.backward()
    expected = -0.75 + 2 * kl_gradient
    assert policy.grad.tolist() == [pytest.approx([expected, -expected])]


@BOTH_FORMS
def test_a_step_down_the_gradient_makes_the_target_more_likely(loss):
    policy = logits_of([3, 1]).requires_grad_()
    loss(policy, None, torch.tensor([1]), kl_coef=0, entropy_coef=0).total.backward()
    updated = (policy - 0.1 * policy.grad).softmax(-1)
    assert updated[0, 1] > 1 / 4


@BOTH_FORMS
def test_the_entropy_bonus_lowers_the_loss_and_flattens_the_policy(loss):
    policy = logits_of([3, 1]).requires_grad_()
    with_bonus = loss(policy, None, torch.tensor([0]), kl_coef=0, entropy_coef=1).total
    without = loss(policy, None, torch.tensor([0]), kl_coef=0, entropy_coef=0).total
    assert with_bonus < without
    (gradient,) = torch.autograd.grad(with_bonus - without, policy)
    assert gradient[0, 0] > 0 > gradient[0, 1]  # A step down it lowers the likelier logit and raises the other.


@BOTH_FORMS
@DIRECTIONS
def test_the_kl_of_equal_distributions_is_zero_and_has_no_gradient(loss, direction):
    policy, _, targets = random_case(7, 11, 3)
    ref = policy[:, :11].detach() + 5  # Adding a constant to all logits does not change the distribution.
    result = loss(policy, ref, targets, kl_coef=1, entropy_coef=0, kl_direction=direction)
    assert result.kl.item() == pytest.approx(0, abs=1e-12)
    nll_only = loss(policy, None, targets, kl_coef=0, entropy_coef=0)
    torch.testing.assert_close(torch.autograd.grad(result.total, policy), torch.autograd.grad(nll_only.total, policy))


@BOTH_FORMS
def test_with_zero_coefficients_the_total_is_the_nll_and_all_terms_are_reported(loss):
    policy, ref, targets = random_case(5, 6, 2)
    result = loss(policy, ref, targets, kl_coef=0, entropy_coef=0)
    assert result.total.item() == pytest.approx(result.nll.item())
    assert result.kl.item() > 0.1 and result.entropy.item() > 0.1
    expected = policy.softmax(-1) - torch.nn.functional.one_hot(targets, 8)
    torch.testing.assert_close(torch.autograd.grad(result.total, policy)[0], expected / 5)


# Bounds


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-30, 30), min_size=6, max_size=6), min_size=1, max_size=4),
    direction=st.sampled_from(["policy_ref", "ref_policy"]),
)
def test_terms_stay_within_their_bounds(rows, direction):
    logits = torch.tensor(rows, dtype=torch.float64)
    policy, ref = logits[:, :3], logits[:, 3:]
    targets = torch.zeros(len(rows), dtype=torch.long)
    result = quark_loss(policy, ref, targets, kl_coef=1, entropy_coef=1, kl_direction=direction)
    assert result.nll >= 0 and result.kl >= -1e-12
    assert -1e-12 <= result.entropy <= log(3) + 1e-12


# Arguments that are refused


@BOTH_FORMS
@pytest.mark.parametrize(
    ("policy", "ref", "targets", "name"),
    [
        ((3, 5), (3, 5), (2,), "targets"),  # Not one target per position.
        ((3, 5), (3, 5), (3, 1), "targets"),
        ((5,), None, (5,), "policy_logits"),
        ((2, 3, 5), None, (2, 3), "policy_logits"),  # Not flattened.
        ((3, 5), (2, 5), (3,), "ref_logits"),  # Not one reference position per position.
        ((3, 5), (3, 6), (3,), "ref_logits"),  # A larger vocabulary than the policy's.
        ((3, 5), (3,), (3,), "ref_logits"),
        ((3, 5), (3, 5, 1), (3,), "ref_logits"),
    ],
)
def test_an_error_names_the_argument_whose_shape_does_not_match(loss, policy, ref, targets, name):
    ref_logits = None if ref is None else torch.zeros(ref)
    shape = {"policy_logits": policy, "ref_logits": ref, "targets": targets}[name]
    with pytest.raises(ValueError) as error:
        loss(torch.zeros(policy), ref_logits, torch.zeros(targets, dtype=torch.long), kl_coef=1, entropy_coef=1)
    assert str(error.value).startswith(f"{name} {shape}: ")


@BOTH_FORMS
def test_an_error_names_an_unknown_kl_direction_and_the_known_ones(loss):
    with pytest.raises(ValueError, match=r"kl_direction 'forward'.*policy_ref.*ref_policy"):
        loss(torch.zeros(1, 2), None, torch.tensor([0]), kl_coef=1, entropy_coef=1, kl_direction="forward")


@pytest.mark.parametrize("length", [0, -3])
def test_an_error_names_a_slice_length_below_one(length):
    with pytest.raises(ValueError, match=f"slice_length {length}: must be at least 1"):
        quark_loss(torch.zeros(1, 2), None, torch.tensor([0]), kl_coef=1, entropy_coef=1, slice_length=length)


# Distillation


def test_distillation_is_the_divergence_from_the_teacher_and_unlearns_reward_tokens():
    """The teacher has (1/2, 1/2), the policy 1/3 for each of two tokens and a reward token."""
    policy = logits_of([1, 1, 1]).requires_grad_()
    loss = distillation_loss(policy, logits_of([1, 1]), torch.tensor([1]))
    assert [float(term) for term in loss] == pytest.approx([log(1.5), log(3), log(1.5), log(3)])
    loss.total.backward()
    torch.testing.assert_close(policy.grad, torch.tensor([[-1 / 6, -1 / 6, 1 / 3]], dtype=torch.float64))  # p - g
    assert float(distillation_loss(logits_of([1, 3, 0]), logits_of([1, 3]), torch.tensor([0])).total) == 0


def test_a_token_that_is_ruled_out_on_both_sides_adds_nothing():
    policy, teacher = torch.tensor([[0.0, -1e4, 0.0]]), torch.tensor([[0.0, -1e4]])
    assert float(distillation_loss(policy, teacher, torch.tensor([0])).total) == pytest.approx(log(2))
