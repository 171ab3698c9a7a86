"""The objective: numbers worked out by hand, the chunked form against the plain one, logits only where they count."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quarkrl.algorithm.coefficients import Coefficients
from quarkrl.algorithm.loss import quark_loss, quark_loss_plain

BOTH = pytest.mark.parametrize("loss", [quark_loss, quark_loss_plain])
DIRECTIONS = pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
DOUBLE = torch.float64


def logits_of(*rows: list[float], dtype: torch.dtype = DOUBLE) -> Tensor:
    """Logits of the given probabilities; a softmax does not care about their scale."""
    return torch.tensor(rows, dtype=dtype).log()


def random_case(tokens: int, vocab: int, extra: int, dtype: torch.dtype = DOUBLE, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    policy = 2 * torch.randn(tokens, vocab + extra, generator=generator, dtype=DOUBLE)
    ref = 2 * torch.randn(tokens, vocab, generator=generator, dtype=DOUBLE)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return policy.to(dtype).requires_grad_(), ref.to(dtype), targets


# By hand


@BOTH
def test_one_token_and_two_words_by_hand(loss):
    # p = (3/4, 1/4), q = (1/2, 1/2), target 0.
    # NLL      = -log 3/4 = log 4/3
    # KL(p||q) = 3/4 log(3/4 : 1/2) + 1/4 log(1/4 : 1/2) = 3/4 log 3/2 - 1/4 log 2
    # H(p)     = 3/4 log 4/3 + 1/4 log 4
    found = loss(logits_of([3, 1]), logits_of([1, 1]), torch.tensor([0]), kl_coef=0.05, entropy_coef=0.06)
    kl, entropy = 0.75 * log(1.5) - 0.25 * log(2), 0.75 * log(4 / 3) + 0.25 * log(4)
    assert found.nll.item() == pytest.approx(log(4 / 3))
    assert found.kl.item() == pytest.approx(kl)
    assert found.entropy.item() == pytest.approx(entropy)
    assert found.total.item() == pytest.approx(log(4 / 3) + 0.05 * kl - 0.06 * entropy)


@BOTH
def test_the_two_directions_of_kl_by_hand(loss):
    # KL(q||p) of the same p and q = 1/2 log(1/2 : 3/4) + 1/2 log(1/2 : 1/4) = 1/2 log 2/3 + 1/2 log 2 = 1/2 log 4/3
    case = (logits_of([3, 1]), logits_of([1, 1]), torch.tensor([0]))
    forward = loss(*case, kl_coef=1, entropy_coef=0, kl_direction="policy_ref").kl.item()
    backward = loss(*case, kl_coef=1, entropy_coef=0, kl_direction="ref_policy").kl.item()
    assert backward == pytest.approx(0.5 * log(4 / 3))
    assert forward == pytest.approx(0.75 * log(1.5) - 0.25 * log(2))
    assert abs(forward - backward) > 0.01


@BOTH
@DIRECTIONS
def test_a_reward_token_counts_in_the_nll_and_nowhere_else(loss, direction):
    # p over V + K = (3, 1 | 4) / 8, so NLL of target 1 = log 8. Over V it is (3/4, 1/4), as above.
    found = loss(
        logits_of([3, 1, 4]), logits_of([1, 1]), torch.tensor([1]), kl_coef=2, entropy_coef=1, kl_direction=direction
    )
    kl = 0.75 * log(1.5) - 0.25 * log(2) if direction == "policy_ref" else 0.5 * log(4 / 3)
    entropy = 0.75 * log(4 / 3) + 0.25 * log(4)
    assert found.nll.item() == pytest.approx(log(8))
    assert found.kl.item() == pytest.approx(kl)
    assert found.entropy.item() == pytest.approx(entropy)
    assert found.total.item() == pytest.approx(log(8) + 2 * kl - entropy)


@BOTH
def test_a_temperature_is_the_nlls_alone(loss):
    # At temperature 1/2 p over V + K is (9, 1 | 16) / 26, NLL of target 1 = log 26. KL and H: of (3/4, 1/4), as ever.
    case = (logits_of([3, 1, 4]), logits_of([1, 1]), torch.tensor([1]))
    found = loss(*case, kl_coef=2, entropy_coef=1, nll_temperature=0.5)
    kl, entropy = 0.75 * log(1.5) - 0.25 * log(2), 0.75 * log(4 / 3) + 0.25 * log(4)
    assert found.nll.item() == pytest.approx(log(26))
    assert (found.kl.item(), found.entropy.item()) == (pytest.approx(kl), pytest.approx(entropy))
    assert found.total.item() == pytest.approx(log(26) + 2 * kl - entropy)


@BOTH
def test_means_are_over_tokens(loss):
    # NLLs log 2 and log 4; KLs to a uniform reference over two words: 0 and 3/4 log 3/2 - 1/4 log 2.
    found = loss(logits_of([1, 1], [3, 1]), logits_of([1, 1], [1, 1]), torch.tensor([0, 1]), kl_coef=0, entropy_coef=0)
    assert found.nll.item() == pytest.approx((log(2) + log(4)) / 2)
    assert found.kl.item() == pytest.approx((0.75 * log(1.5) - 0.25 * log(2)) / 2)


def test_the_gradient_by_hand():
    # p = (1/4, 3/4), target 0, q = (1/2, 1/2).   d NLL = p - (1, 0) = (-3/4, 3/4).   d KL(q||p) = p - q = (-1/4, 1/4).
    policy = logits_of([1, 3]).requires_grad_()
    case = (policy, logits_of([1, 1]), torch.tensor([0]))
    quark_loss(*case, kl_coef=2, entropy_coef=0, kl_direction="ref_policy").total.backward()
    assert policy.grad.tolist() == [pytest.approx([-0.75 - 0.5, 0.75 + 0.5])]


@BOTH
def test_the_entropy_bonus_lowers_the_loss_and_flattens_the_policy(loss):
    policy = logits_of([3, 1]).requires_grad_()
    with_bonus = loss(policy, None, torch.tensor([0]), kl_coef=0, entropy_coef=1).total
    without = loss(policy, None, torch.tensor([0]), kl_coef=0, entropy_coef=0).total
    assert with_bonus < without
    (gradient,) = torch.autograd.grad(with_bonus - without, policy)
    assert gradient[0, 0] > 0 > gradient[0, 1]  # A step against it takes from the likelier word and gives to the other.


@BOTH
@DIRECTIONS
def test_kl_of_equal_distributions_is_zero(loss, direction):
    policy, _, targets = random_case(7, 11, 3)
    ref = policy[:, :11].detach() + 5  # A shift of all logits changes no distribution.
    found = loss(policy, ref, targets, kl_coef=1, entropy_coef=0, kl_direction=direction)
    assert found.kl.item() == pytest.approx(0, abs=1e-12)
    bare = loss(policy, None, targets, kl_coef=0, entropy_coef=0)
    # There is nothing to gain: the gradient is the NLL's alone.
    torch.testing.assert_close(torch.autograd.grad(found.total, policy), torch.autograd.grad(bare.total, policy))


@BOTH
def test_without_a_reference_there_is_no_kl(loss):
    found = loss(logits_of([3, 1]), None, torch.tensor([0]), kl_coef=7, entropy_coef=0)
    assert found.kl.item() == 0
    assert found.total.item() == pytest.approx(log(4 / 3))


@BOTH
def test_coefficients_of_zero_leave_the_nll_and_still_report_the_rest(loss):
    policy, ref, targets = random_case(5, 6, 2)
    found = loss(policy, ref, targets, kl_coef=0, entropy_coef=0)
    assert found.total.item() == pytest.approx(found.nll.item())
    assert found.kl.item() > 0.1 and found.entropy.item() > 0.1
    expected = policy.softmax(-1) - torch.nn.functional.one_hot(targets, 8)
    torch.testing.assert_close(torch.autograd.grad(found.total, policy)[0], expected / 5)


def test_no_tokens_give_zeros_and_an_empty_gradient():
    policy = torch.zeros(0, 5, requires_grad=True)
    found = quark_loss(policy, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), kl_coef=1, entropy_coef=1)
    assert [part.item() for part in found] == [0, 0, 0, 0]
    found.total.backward()
    assert policy.grad.shape == (0, 5)


# Mistakes


@BOTH
@pytest.mark.parametrize(
    ("policy", "ref", "targets"),
    [
        ((3, 5), (3, 5), (2,)),  # not a target for each row
        ((3, 5), (3, 5), (3, 1)),
        ((5,), None, (5,)),
        ((2, 3, 5), None, (2, 3)),  # not flattened
        ((3, 5), (2, 5), (3,)),  # not a reference for each row
        ((3, 5), (3, 6), (3,)),  # a reference with more words than the policy
        ((3, 5), (3,), (3,)),
        ((3, 5), (3, 5, 1), (3,)),
    ],
)
def test_shapes_that_do_not_agree_are_refused(loss, policy, ref, targets):
    with pytest.raises(ValueError, match=r"(policy_logits|targets|ref_logits) \(.*\): must have shape \("):
        loss(
            torch.zeros(policy),
            None if ref is None else torch.zeros(ref),
            torch.zeros(targets, dtype=torch.long),
            kl_coef=1,
            entropy_coef=1,
        )


@BOTH
def test_an_unknown_direction_is_refused_by_name(loss):
    with pytest.raises(ValueError, match=r"'forward'.*policy_ref.*ref_policy"):
        loss(torch.zeros(1, 2), None, torch.tensor([0]), kl_coef=1, entropy_coef=1, kl_direction="forward")


# The chunked form is the plain one


def both_ways(tokens, vocab, extra, direction, dtype, kl_coef=0.3, entropy_coef=0.2, with_ref=True, temperature=1.0):
    results = []
    for loss in (quark_loss, quark_loss_plain):
        policy, ref, targets = random_case(tokens, vocab, extra, dtype)
        found = loss(
            policy,
            ref if with_ref else None,
            targets,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            kl_direction=direction,
            nll_temperature=temperature,
        )
        (3 * found.total).backward()
        results.append((torch.stack(found).detach(), policy.grad))
    return results


# 128 rows are handled at a time.
SHAPES = [(1, 2, 0), (1, 3, 1), (5, 7, 5), (127, 5, 1), (128, 5, 2), (129, 33, 5), (300, 17, 0), (513, 4, 8)]


@DIRECTIONS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_chunked_loss_is_the_plain_one(shape, dtype, tolerance, direction):
    (value, gradient), (plain_value, plain_gradient) = both_ways(*shape, direction, dtype)
    torch.testing.assert_close(value, plain_value, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient, plain_gradient, rtol=tolerance, atol=tolerance * plain_gradient.abs().max())


@DIRECTIONS
@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize(("kl_coef", "entropy_coef"), [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)])
def test_the_chunked_loss_is_the_plain_one_for_any_coefficients(kl_coef, entropy_coef, with_ref, direction):
    found, plain = both_ways(130, 9, 3, direction, DOUBLE, kl_coef, entropy_coef, with_ref)
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)


@DIRECTIONS
@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize("extra", [0, 3])
def test_the_chunked_loss_is_the_plain_one_at_a_temperature(extra, with_ref, direction):
    found, plain = both_ways(130, 9, extra, direction, DOUBLE, with_ref=with_ref, temperature=0.3)
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)


@DIRECTIONS
def test_bf16_logits_give_nearly_what_full_precision_gives(direction):
    (value, gradient), _ = both_ways(200, 50, 5, direction, torch.bfloat16)
    (wide_value, wide_gradient), _ = both_ways(200, 50, 5, direction, DOUBLE)
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), wide_value, rtol=1e-2, atol=0)
    torch.testing.assert_close(gradient.double(), wide_gradient, rtol=0, atol=0.02 * wide_gradient.abs().max().item())


@DIRECTIONS
def test_a_small_kl_over_a_large_vocabulary_is_exact_in_single_precision(direction):
    policy, noise, targets = random_case(32, 50_257, 5, torch.float32)
    policy, ref = policy.detach(), policy.detach()[:, :50_257] + 0.15 * noise
    found, exact = (
        loss(*case, targets, kl_coef=1, entropy_coef=1, kl_direction=direction)
        for loss, case in ((quark_loss, (policy, ref)), (quark_loss_plain, (policy.double(), ref.double())))
    )
    assert 0.04 < exact.kl < 0.05
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(exact), rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("token", [0, 8])
def test_a_token_that_is_ruled_out_takes_no_precision_from_the_nll(token, temperature):
    policy, _, targets = random_case(40, 9, 2, torch.float32)
    policy = policy.detach().index_fill(-1, torch.tensor([token]), -1e4)
    targets = torch.where(targets == token, 1, targets)
    for row in range(40):
        found, exact = (
            loss(
                z[row : row + 1],
                z[row : row + 1, :9],
                targets[row : row + 1],
                kl_coef=1,
                entropy_coef=1,
                nll_temperature=temperature,
            ).nll
            for loss, z in ((quark_loss, policy), (quark_loss_plain, policy.double()))
        )
        assert found.item() == pytest.approx(exact.item(), rel=1e-5)


@DIRECTIONS
@pytest.mark.parametrize("types", [(DOUBLE, torch.float32), (torch.float32, DOUBLE)], ids=str)
def test_policy_and_reference_of_different_types_meet_in_the_wider(types, direction):
    policy, ref, targets = random_case(5, 7, 2)
    policy, ref = policy.detach().to(types[0]).requires_grad_(), ref.to(types[1])
    settings = {"kl_coef": 0.3, "entropy_coef": 0.2, "kl_direction": direction}
    found = quark_loss(policy, ref, targets, **settings)
    exact = quark_loss_plain(policy.double(), ref.double(), targets, **settings)
    torch.testing.assert_close(torch.stack(found), torch.stack(exact), rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(each.total, policy)[0] for each in (found, exact)))


@DIRECTIONS
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("extra", [0, 2])
def test_the_gradient_is_that_of_the_value(extra, temperature, direction):
    policy, ref, targets = random_case(4, 5, extra)
    settings = {"kl_coef": 0.7, "entropy_coef": 0.4, "kl_direction": direction, "nll_temperature": temperature}

    def total(logits: Tensor) -> Tensor:
        return quark_loss(logits, ref, targets, **settings).total

    assert torch.autograd.gradcheck(total, (policy,))


def test_only_the_total_carries_a_gradient_and_only_to_the_policy():
    policy, ref, targets = random_case(3, 5, 1)
    ref.requires_grad_()
    found = quark_loss(policy, ref, targets, kl_coef=1, entropy_coef=1)
    assert [part.requires_grad for part in found] == [True, False, False, False]
    found.total.backward()
    assert policy.grad is not None and ref.grad is None


def test_the_loss_without_gradients_is_the_same():
    policy, ref, targets = random_case(130, 5, 1)
    with torch.no_grad():
        found = quark_loss(policy, ref, targets, kl_coef=1, entropy_coef=1)
    assert not found.total.requires_grad
    assert found.total.item() == pytest.approx(quark_loss(policy, ref, targets, kl_coef=1, entropy_coef=1).total.item())


def test_the_logits_are_left_as_they_were():
    policy, ref, targets = random_case(130, 5, 1)
    before = policy.detach().clone(), ref.clone()
    quark_loss(policy, ref, targets, kl_coef=1, entropy_coef=1).total.backward()
    assert torch.equal(policy, before[0]) and torch.equal(ref, before[1])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-30, 30), min_size=6, max_size=6), min_size=1, max_size=4),
    direction=st.sampled_from(["policy_ref", "ref_policy"]),
)
def test_kl_and_entropy_stay_within_their_bounds(rows, direction):
    logits = torch.tensor(rows, dtype=DOUBLE)
    policy, ref = logits[:, :3], logits[:, 3:]
    targets = torch.zeros(len(rows), dtype=torch.long)
    found = quark_loss(policy, ref, targets, kl_coef=1, entropy_coef=1, kl_direction=direction)
    assert found.nll >= 0 and found.kl >= -1e-12
    assert -1e-12 <= found.entropy <= log(3) + 1e-12


@DIRECTIONS
def test_kl_of_nearly_equal_distributions_is_not_negative_in_single_precision(direction):
    generator = torch.Generator().manual_seed(0)
    policy = 2 * torch.randn(20, 50_000, generator=generator)
    ref = policy + 1e-4 * torch.randn(policy.shape, generator=generator)
    for row in range(20):
        case = (policy[row : row + 1], ref[row : row + 1], torch.tensor([0]))
        assert 0 <= quark_loss(*case, kl_coef=1, entropy_coef=0, kl_direction=direction).kl < 1e-5


# Coefficients that adapt: 1 ± clip(measured / target - 1, ±0.2) * samples / horizon


@pytest.mark.parametrize(
    ("kl", "entropy", "expected"),
    [
        (3.3, 40, (0.1 * (1 + 0.1 * 0.05), 0.06)),  # a tenth above the KL's target: β grows
        (2.7, 40, (0.1 * (1 - 0.1 * 0.05), 0.06)),
        (99, 40, (0.1 * (1 + 0.2 * 0.05), 0.06)),  # clipped
        (0, 40, (0.1 * (1 - 0.2 * 0.05), 0.06)),
        (3, 44, (0.1, 0.06 * (1 - 0.1 * 0.05))),  # a tenth above the entropy's target: α shrinks
        (3, 0, (0.1, 0.06 * (1 + 0.2 * 0.05))),
    ],
)
def test_coefficients_move_towards_their_targets(kl, entropy, expected):
    coefficients = Coefficients(0.1, 0.06, kl_target=3, entropy_target=40, horizon=2000)
    coefficients.adapt(kl, entropy, samples=100)  # 100 / 2000 = 0.05
    assert coefficients.adaptive
    assert (coefficients.kl_coef, coefficients.entropy_coef) == pytest.approx(expected)


def test_coefficients_without_targets_stay():
    coefficients = Coefficients(0.1, 0.06)
    coefficients.adapt(99, 99, samples=100)
    assert not coefficients.adaptive and (coefficients.kl_coef, coefficients.entropy_coef) == (0.1, 0.06)
