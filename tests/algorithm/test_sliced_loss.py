"""The sliced loss equals the plain one, in values and gradients, over several slices and for every kind of input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quarkrl.algorithm import sliced_loss
from quarkrl.algorithm.loss import QuarkLoss, quark_loss, quark_loss_plain
from quarkrl.models.completion_logits import Projection

TOKENS, VOCAB, REWARD_TOKENS, WIDTH = 10, 7, 2, 4
COEFFICIENTS = {"kl_coef": 0.3, "entropy_coef": 0.2}
BF16, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64

DIRECTIONS = pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
# Ten positions are ten slices; slices of 3, 3, 3 and 1; two equal slices; one slice; one slice that is not filled.
SLICE_LENGTHS = pytest.mark.parametrize("slice_length", [1, 3, 5, 10, 64])
SEVERAL_SLICES = pytest.mark.parametrize("slice_length", [1, 3])
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 0.3])
WITH_REF = pytest.mark.parametrize("with_ref", [True, False], ids=["reference", "no reference"])


def random_logits(
    tokens: int = TOKENS, vocab: int = VOCAB, extra: int = REWARD_TOKENS, dtype: torch.dtype = DOUBLE
) -> tuple[Tensor, Tensor, Tensor]:
    """Policy logits `(tokens, vocab + extra)`, reference logits `(tokens, vocab)` and targets; equal at each call."""
    generator = torch.Generator().manual_seed(0)
    policy = 2 * torch.randn(tokens, vocab + extra, generator=generator, dtype=DOUBLE)
    ref = 2 * torch.randn(tokens, vocab, generator=generator, dtype=DOUBLE)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return policy.to(dtype).requires_grad_(), ref.to(dtype), targets


def random_projection(dtype: torch.dtype = DOUBLE, bias: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, output weight and bias of a policy; reference logits; targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCAB + REWARD_TOKENS, WIDTH), *([(VOCAB + REWARD_TOKENS,)] if bias else [])]
    tensors = [torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype) for shape in shapes]
    ref = 2 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=DOUBLE)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return [tensor.requires_grad_() for tensor in tensors], ref.to(dtype), targets


def differentiate(loss: QuarkLoss, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the values of a loss, `(4,)`, and its gradients; a factor of 3 stands for gradient accumulation."""
    return torch.stack(loss).detach(), list(torch.autograd.grad(3 * loss.total, tensors))


def run_on_logits(loss: Callable[..., QuarkLoss], dtype: torch.dtype, with_ref: bool = True, **options):
    policy, ref, targets = random_logits(dtype=dtype)
    result = loss(policy, ref if with_ref else None, targets, **{**COEFFICIENTS, **options})
    return differentiate(result, [policy])


# Values and gradients over several slices


@SLICE_LENGTHS
@DIRECTIONS
@TEMPERATURES
@WITH_REF
def test_plain_logits(slice_length, direction, temperature, with_ref):
    options = {"kl_direction": direction, "nll_temperature": temperature, "with_ref": with_ref}
    sliced = run_on_logits(quark_loss, DOUBLE, slice_length=slice_length, **options)
    plain = run_on_logits(quark_loss_plain, DOUBLE, **options)
    torch.testing.assert_close(sliced, plain, rtol=1e-9, atol=1e-12)


@SLICE_LENGTHS
@DIRECTIONS
@TEMPERATURES
@WITH_REF
def test_logits_that_are_computed_from_hidden_states(slice_length, direction, temperature, with_ref):
    tensors, ref, targets = random_projection()
    hidden, weight, bias = tensors
    case = (ref if with_ref else None, targets)
    options = {**COEFFICIENTS, "kl_direction": direction, "nll_temperature": temperature}
    sliced = quark_loss(Projection(hidden, weight, bias), *case, **options, slice_length=slice_length)
    plain = quark_loss_plain(hidden @ weight.T + bias, *case, **options)
    torch.testing.assert_close(differentiate(sliced, tensors), differentiate(plain, tensors), rtol=1e-9, atol=1e-12)


@SEVERAL_SLICES
@DIRECTIONS
@TEMPERATURES
def test_logits_with_a_scale_and_a_soft_cap(slice_length, direction, temperature):
    tensors, ref, targets = random_projection()
    hidden, weight, bias = tensors
    options = {**COEFFICIENTS, "kl_direction": direction, "nll_temperature": temperature}
    projection = Projection(hidden, weight, bias, scale=1.7, cap=2.0)
    logits = 2 * torch.tanh(1.7 * (hidden @ weight.T + bias) / 2)
    sliced = quark_loss(projection, ref, targets, **options, slice_length=slice_length)
    plain = quark_loss_plain(logits, ref, targets, **options)
    torch.testing.assert_close(differentiate(sliced, tensors), differentiate(plain, tensors), rtol=1e-9, atol=1e-12)


@SEVERAL_SLICES
@DIRECTIONS
@WITH_REF
@pytest.mark.parametrize(("kl_coef", "entropy_coef"), [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)])
def test_any_coefficients(slice_length, direction, with_ref, kl_coef, entropy_coef):
    options = {"kl_coef": kl_coef, "entropy_coef": entropy_coef, "kl_direction": direction, "with_ref": with_ref}
    sliced = run_on_logits(quark_loss, DOUBLE, slice_length=slice_length, **options)
    plain = run_on_logits(quark_loss_plain, DOUBLE, **options)
    torch.testing.assert_close(sliced, plain, rtol=1e-9, atol=1e-12)


@DIRECTIONS
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-9), (FLOAT, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 0), (1, 3, 1), (5, 7, 5), (31, 5, 1), (33, 33, 5), (40, 4, 8)], ids=str)
def test_any_number_of_positions_tokens_and_reward_tokens(shape, dtype, tolerance, direction):
    policy, ref, targets = random_logits(*shape, dtype=dtype)
    options = {**COEFFICIENTS, "kl_direction": direction}
    value, (gradient,) = differentiate(quark_loss(policy, ref, targets, **options, slice_length=8), [policy])
    plain_value, (plain_gradient,) = differentiate(quark_loss_plain(policy, ref, targets, **options), [policy])
    torch.testing.assert_close(value, plain_value, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient, plain_gradient, rtol=tolerance, atol=tolerance * plain_gradient.abs().max())


@DIRECTIONS
@TEMPERATURES
@pytest.mark.parametrize("extra", [0, 2])
def test_the_gradient_is_that_of_the_value(extra, temperature, direction):
    policy, ref, targets = random_logits(4, 5, extra)
    options = {**COEFFICIENTS, "kl_direction": direction, "nll_temperature": temperature, "slice_length": 3}
    assert torch.autograd.gradcheck(lambda logits: quark_loss(logits, ref, targets, **options).total, (policy,))


def test_by_default_a_slice_has_many_positions_but_few_elements():
    assert sliced_loss.default_slice_length(1000) == 262  # 2^18 // 1000
    assert sliced_loss.default_slice_length(50_257) == 256
    policy, ref, targets = random_logits(600, 1000, 5)  # Slices of 260, 260 and 80 positions.
    sliced, plain = (loss(policy, ref, targets, **COEFFICIENTS) for loss in (quark_loss, quark_loss_plain))
    torch.testing.assert_close(differentiate(sliced, [policy]), differentiate(plain, [policy]), rtol=1e-9, atol=1e-12)


# Precision


@SEVERAL_SLICES
@DIRECTIONS
@TEMPERATURES
@WITH_REF
def test_bf16_logits_are_widened_before_the_softmax(slice_length, direction, temperature, with_ref):
    policy, ref, targets = random_logits(dtype=BF16)
    options = {**COEFFICIENTS, "kl_direction": direction, "nll_temperature": temperature}
    sliced = quark_loss(policy, ref if with_ref else None, targets, **options, slice_length=slice_length)
    value, (gradient,) = differentiate(sliced, [policy])
    wide = policy.detach().double().requires_grad_()
    plain = quark_loss_plain(wide, ref.double() if with_ref else None, targets, **options)
    exact_value, (exact_gradient,) = differentiate(plain, [wide])
    assert value.dtype == FLOAT and gradient.dtype == BF16
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-6)  # A softmax in bf16 is off by 1e-3.
    # The gradient, its factor and their product are rounded to bf16, by 2^-8 each.
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=3 * 2**-8, atol=1e-6)


@DIRECTIONS
@TEMPERATURES
@pytest.mark.parametrize("chunk_elements", [WIDTH, 3 * WIDTH, 1 << 22], ids=lambda n: f"chunks of {n}")
def test_gradients_of_bf16_hidden_states_and_weights_accumulate_in_float32(
    chunk_elements, temperature, direction, monkeypatch
):
    monkeypatch.setattr(sliced_loss, "GRADIENT_CHUNK_ELEMENTS", chunk_elements)
    tensors, ref, targets = random_projection(BF16, bias=False)
    options = {**COEFFICIENTS, "kl_direction": direction, "nll_temperature": temperature}
    sliced = quark_loss(Projection(*tensors), ref, targets, **options, slice_length=3)
    value, gradients = differentiate(sliced, tensors)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    plain = quark_loss_plain(wide[0] @ wide[1].T, ref.double(), targets, **options)
    plain_value, plain_gradients = differentiate(plain, wide)
    assert value.dtype == FLOAT and {gradient.dtype for gradient in gradients} == {BF16}
    torch.testing.assert_close(value.double(), plain_value, rtol=1e-2, atol=1e-3)
    for gradient, exact in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@DIRECTIONS
@pytest.mark.parametrize("dtypes", [(DOUBLE, FLOAT), (FLOAT, DOUBLE), (BF16, FLOAT)], ids=str)
def test_policy_and_reference_of_different_dtypes_are_computed_in_the_wider(dtypes, direction):
    policy, ref, targets = random_logits()
    policy, ref = policy.detach().to(dtypes[0]).requires_grad_(), ref.to(dtypes[1])
    options = {**COEFFICIENTS, "kl_direction": direction}
    sliced = quark_loss(policy, ref, targets, **options, slice_length=3)
    plain = quark_loss_plain(policy.double(), ref.double(), targets, **options)
    rtol = 1e-12 if DOUBLE in dtypes else 1e-5
    torch.testing.assert_close(torch.stack(sliced).double(), torch.stack(plain), rtol=rtol, atol=0)
    (gradient,), (exact,) = (torch.autograd.grad(loss.total, policy) for loss in (sliced, plain))
    torch.testing.assert_close(gradient, exact)


@DIRECTIONS
def test_a_small_kl_over_a_large_vocabulary_is_exact_in_float32(direction):
    policy, noise, targets = random_logits(32, 50_257, 5, FLOAT)
    policy = policy.detach()
    ref = policy[:, :50_257] + 0.15 * noise
    options = {"kl_coef": 1, "entropy_coef": 1, "kl_direction": direction}
    sliced = quark_loss(policy, ref, targets, **options)
    exact = quark_loss_plain(policy.double(), ref.double(), targets, **options)
    assert 0.04 < exact.kl < 0.05
    torch.testing.assert_close(torch.stack(sliced).double(), torch.stack(exact), rtol=1e-5, atol=0)


@DIRECTIONS
def test_the_kl_of_nearly_equal_distributions_is_not_negative_in_float32(direction):
    policy = 2 * torch.randn(20, 50_000)
    ref = policy + 1e-4 * torch.randn(policy.shape)
    for row in range(20):
        case = (policy[row : row + 1], ref[row : row + 1], torch.tensor([0]))
        assert 0 <= quark_loss(*case, kl_coef=1, entropy_coef=0, kl_direction=direction).kl < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("token", [0, 8])
def test_a_token_that_is_ruled_out_does_not_reduce_the_precision_of_the_nll(token, temperature):
    policy, _, targets = random_logits(40, 9, 2, FLOAT)
    policy = policy.detach().index_fill(-1, torch.tensor([token]), -1e4)
    targets = torch.where(targets == token, 1, targets)
    options = {"kl_coef": 1, "entropy_coef": 1, "nll_temperature": temperature}
    for row in range(40):
        z, target = policy[row : row + 1], targets[row : row + 1]
        nll = quark_loss(z, z[:, :9], target, **options).nll
        exact = quark_loss_plain(z.double(), z[:, :9].double(), target, **options).nll
        assert nll.item() == pytest.approx(exact.item(), rel=1e-5)


# Autograd


def test_only_the_total_carries_a_gradient_and_only_to_the_policy():
    policy, ref, targets = random_logits()
    ref.requires_grad_()
    result = quark_loss(policy, ref, targets, **COEFFICIENTS)
    assert [term.requires_grad for term in result] == [True, False, False, False]
    result.total.backward()
    assert policy.grad is not None and ref.grad is None


@SEVERAL_SLICES
@TEMPERATURES
def test_the_values_are_the_same_without_gradients(slice_length, temperature):
    policy, ref, targets = random_logits()
    options = {**COEFFICIENTS, "nll_temperature": temperature, "slice_length": slice_length}
    with torch.no_grad():
        without = quark_loss(policy, ref, targets, **options)
    assert not without.total.requires_grad
    assert torch.equal(torch.stack(without), torch.stack(quark_loss(policy, ref, targets, **options)).detach())


@SEVERAL_SLICES
@DIRECTIONS
@TEMPERATURES
def test_the_logits_are_not_modified(slice_length, direction, temperature):
    policy, ref, targets = random_logits()
    policy_before, ref_before = policy.detach().clone(), ref.clone()
    options = {**COEFFICIENTS, "kl_direction": direction, "nll_temperature": temperature}
    quark_loss(policy, ref, targets, **options, slice_length=slice_length).total.backward()
    assert torch.equal(policy, policy_before) and torch.equal(ref, ref_before)


def test_no_positions_give_zeros_and_an_empty_gradient():
    policy = torch.zeros(0, 5, requires_grad=True)
    result = quark_loss(policy, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), kl_coef=1, entropy_coef=1)
    assert [term.item() for term in result] == [0, 0, 0, 0]
    result.total.backward()
    assert policy.grad.shape == (0, 5)
