"""Logits of completions: the model's own, at no other positions; and those that are made of them a slice at a time."""

from __future__ import annotations

import logging
from math import log

import pytest
import torch
from helpers.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, MptConfig

from quarkrl.algorithm import sliced_loss
from quarkrl.algorithm.loss import quark_loss, quark_loss_plain
from quarkrl.models.batching import build_batch
from quarkrl.models.completion_logits import Projection, completion_logits, output_layer
from quarkrl.models.head_access import WHOLE_LOGITS, completion_projection, decide_head_access, is_one_product


def rows_of_unequal_length() -> tuple[list[list[int]], list[list[int]]]:
    prompts = [[257, 10, 20], [257, 30], [257, 40, 50, 60, 70, 80]]
    completions = [[11, 12, 13, 14], [31, 256], [41]]
    return prompts, completions


def untied_or_tied(architecture: str, tied: bool):
    return tiny_model(architecture, tiny_tokenizer(bos=True), tied=tied)


def projection_of(model, batch) -> Projection:
    """The projection of a model that training starts with."""
    return completion_projection(model, **batch, head=decide_head_access(model, [3, 1, 4]))


EVERY_MODEL = pytest.mark.parametrize("architecture", ARCHITECTURES)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@EVERY_MODEL
@TIED
def test_completion_logits_are_the_full_logits_where_completions_are_predicted(architecture, tied):
    model = untied_or_tied(architecture, tied)
    batch = build_batch(*rows_of_unequal_length())
    narrow = completion_logits(model, **batch)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # Row 0 predicts its four tokens from positions 2 to 5, row 1 two from 1 and 2, row 2 one from 5.
    expected = torch.stack([full[0, 2], full[0, 3], full[0, 4], full[0, 5], full[1, 1], full[1, 2], full[2, 5]])
    torch.testing.assert_close(narrow, expected)


def test_gemma2_logits_are_capped():
    model = tiny_model("gemma2", tiny_tokenizer(), final_logit_softcapping=0.5)
    logits = completion_logits(model, **build_batch([[1, 2]], [[3, 4, 5]]))
    assert 0.3 < logits.abs().max() < 0.5


def lora(model, **kwargs):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **kwargs)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {}),
        (False, {}),
        (True, {"trainable_token_indices": [3, 5]}),
        (False, {"trainable_token_indices": [3, 5]}),
        (False, {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_completion_logits_under_an_adapter(tied, options):
    model = lora(untied_or_tied("llama", tied), **options)
    batch = build_batch(*rows_of_unequal_length())
    narrow = completion_logits(model, **batch)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(narrow, full[:, :-1][batch["labels"][:, 1:] != -100])
    with model.disable_adapter():
        assert not torch.allclose(narrow, completion_logits(model, **batch))


def test_completion_logits_through_a_wrapper():
    model = untied_or_tied("gpt2", True)

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self.module = module

        def forward(self, **kwargs):
            return self.module(**kwargs)

    batch = build_batch(*rows_of_unequal_length())
    assert output_layer(Wrapper(Wrapper(model))) is model.lm_head
    torch.testing.assert_close(completion_logits(Wrapper(model), **batch), completion_logits(model, **batch))


@EVERY_MODEL
@TIED
def test_a_batch_of_one_gives_what_a_padded_batch_gives(architecture, tied):
    """Losses and gradients: of a batch, and of its rows one by one, weighted by their tokens."""
    model = untied_or_tied(architecture, tied)
    reference = tiny_model(architecture, tiny_tokenizer(bos=True), tied=tied, seed=1)
    prompts, completions = rows_of_unequal_length()

    def losses(rows: slice) -> Tensor:
        batch = build_batch(prompts[rows], completions[rows])
        with torch.no_grad():
            ref = completion_logits(reference, **batch)[:, :250]
        policy = completion_logits(model, **batch)
        targets = batch["labels"][batch["labels"] != -100].clamp(max=249)
        found = quark_loss(policy, ref, targets, kl_coef=0.5, entropy_coef=0.1)
        return torch.stack(found) * len(targets)

    def gradients(total: Tensor) -> list[Tensor]:
        return torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)

    together = losses(slice(None))
    one_by_one = sum(losses(slice(i, i + 1)) for i in range(len(prompts)))
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=0)
    for found, expected in zip(gradients(together[0]), gradients(one_by_one[0]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(expected.abs().max().item(), 1e-3))


def test_what_stands_in_the_padding_does_not_matter():
    model = untied_or_tied("gpt2", True)
    batch = build_batch(*rows_of_unequal_length())
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 99)}
    torch.testing.assert_close(completion_logits(model, **batch), completion_logits(model, **other))


def test_the_model_is_whole_again_afterwards_even_after_an_error():
    model = untied_or_tied("gpt2", True)
    batch = build_batch(*rows_of_unequal_length())
    completion_logits(model, **batch)
    with pytest.raises(IndexError):
        completion_logits(model, batch["input_ids"] + 10_000, batch["attention_mask"], batch["labels"])
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=batch["input_ids"]).logits.shape == (3, 7, 258)


# The loss from projections


COEFS = {"kl_coef": 0.3, "entropy_coef": 0.1}


def losses(model, reference, batch, way, direction="policy_ref"):
    """The loss and the gradients of all trained weights, from projections or from whole logits."""
    targets = batch["labels"][batch["labels"] != -100]
    model.zero_grad()
    if way == "projections":
        policy = projection_of(model, batch)
        with torch.no_grad():
            ref = projection_of(reference, batch).limit_vocab(250)
        assert policy.weight is not None and ref.weight is not None
        loss = quark_loss(policy, ref, targets, **COEFS, kl_direction=direction)
    else:
        policy = completion_logits(model, **batch)
        with torch.no_grad():
            ref = completion_logits(reference, **batch)[:, :250]
        loss = quark_loss_plain(policy, ref, targets, **COEFS, kl_direction=direction)
    (3 * loss.total).backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_the_same(model, reference, batch, rtol=1e-5, **kwargs):
    found, grads = losses(model, reference, batch, "projections", **kwargs)
    expected, plain_grads = losses(model, reference, batch, "whole logits", **kwargs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6)
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        assert (grad - plain_grads[name]).norm() <= 10 * rtol * plain_grads[name].norm() + 1e-6, name


@pytest.fixture(params=[1, 3, 256])
def slices(request, monkeypatch):
    """Slices of so many positions."""
    monkeypatch.setattr(sliced_loss, "default_slice_length", lambda vocab_size: request.param)


@EVERY_MODEL
@TIED
def test_loss_and_gradient_from_projections_are_those_of_whole_logits(architecture, tied, slices):
    model, reference = (tiny_model(architecture, tiny_tokenizer(bos=True), tied=tied, seed=seed) for seed in (0, 1))
    assert_the_same(model.eval(), reference.eval(), build_batch(*rows_of_unequal_length()))


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
def test_both_directions_and_a_cap_that_bends(direction, slices):
    models = [tiny_model("gemma2", tiny_tokenizer(bos=True), final_logit_softcapping=0.5, seed=s) for s in (0, 1)]
    assert_the_same(*(model.eval() for model in models), build_batch(*rows_of_unequal_length()), direction=direction)


def test_a_bias_in_the_head(slices):
    models = [tiny_model("gpt2", tiny_tokenizer(bos=True), tied=False, seed=s).eval() for s in (0, 1)]
    for model in models:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features))
    assert_the_same(*models, build_batch(*rows_of_unequal_length()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"trainable_token_indices": [3, 5]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_under_an_adapter(tied, options):
    if tied and "modules_to_save" in options:
        pytest.skip("peft ties no copies")
    model = lora(untied_or_tied("llama", tied), **options)
    assert_the_same(model, untied_or_tied("llama", tied).eval(), build_batch(*rows_of_unequal_length()))


def test_with_gradient_checkpointing():
    model = untied_or_tied("llama", True).train()
    model.gradient_checkpointing_enable()
    assert_the_same(model, untied_or_tied("llama", True).eval(), build_batch(*rows_of_unequal_length()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_types(dtype):
    models = [untied_or_tied("llama", True).to(dtype).eval() for _ in range(2)]
    assert_the_same(*models, build_batch(*rows_of_unequal_length()), rtol=1e-12 if dtype == torch.float64 else 2e-3)


def test_under_autocast():
    models = [tiny_model("gpt2", tiny_tokenizer(bos=True), seed=seed).eval() for seed in (0, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        assert_the_same(*models, build_batch(*rows_of_unequal_length()), rtol=4e-3)
    assert_the_same(*models, build_batch(*rows_of_unequal_length()))


def test_the_gradient_is_that_of_the_value():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 3), torch.randn(8, 3), torch.randn(8)
    inputs = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    ref, targets = torch.randn(5, 6).double(), torch.tensor([0, 5, 2, 7, 1])

    def total(*tensors):
        return quark_loss(Projection(*tensors, scale=1.7, cap=2.0), ref, targets, **COEFS).total

    assert torch.autograd.gradcheck(total, inputs)


@pytest.mark.parametrize("reached", [True, False])
def test_where_no_end_may_come_it_is_as_if_there_were_none(reached):
    """A completion of at least one token: words 0 and 1, then EOS, which is token 2 of three."""
    policy, ref = torch.tensor([3.0, 1, 4]).log().expand(2, 3), torch.tensor([1.0, 1, 2]).log().expand(2, 3)
    logits = policy.clone().requires_grad_()
    labels = torch.tensor([[-100, 0, 2, -100]])
    projections = [
        Projection(each, torch.eye(3) if reached else None).suppress_early_eos(labels, 1, [2])
        for each in (logits, ref.clone())
    ]
    found = quark_loss(*projections, torch.tensor([0, 2]), kl_coef=1, entropy_coef=0)
    # First (3/4, 1/4) against (1/2, 1/2), then (3, 1, 4) / 8 against (1, 1, 2) / 4.
    assert found.nll.item() == pytest.approx((log(4 / 3) + log(2)) / 2)
    assert found.kl.item() == pytest.approx((0.75 * log(1.5) - 0.25 * log(2) + 3 / 8 * log(1.5) - 1 / 8 * log(2)) / 2)
    found.total.backward()
    assert logits.grad[0, 2] == 0 != logits.grad[1, 2]
    assert torch.equal(logits, policy)


@pytest.mark.parametrize("frozen", [(False, True, True), (True, False, False)])
def test_only_what_is_trained_gets_a_gradient(frozen):
    tensors = torch.randn(5, 3), torch.randn(8, 3), torch.randn(8)
    for tensor, is_frozen in zip(tensors, frozen, strict=True):
        tensor.requires_grad_(not is_frozen)
    quark_loss(Projection(*tensors), None, torch.tensor([0, 5, 2, 7, 1]), **COEFS).total.backward()
    assert [tensor.grad is None for tensor in tensors] == list(frozen)


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor has while it lasts."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


def test_nothing_as_large_as_tokens_times_vocabulary_is_held(monkeypatch):
    monkeypatch.setattr(sliced_loss, "default_slice_length", lambda vocab_size: 8)
    model = tiny_model("llama", tiny_tokenizer(bos=True), rows=2000)
    tokens = 30 * 20
    batch = build_batch([[257, 3]] * 30, [list(range(20))] * 30)
    largest = {}
    for way in ("projections", "whole logits"):
        with Largest() as seen:
            losses(model, model, batch, way)
        largest[way] = seen.numbers
    assert largest["whole logits"] >= tokens * 2000
    assert largest["projections"] <= max(8 * 2000, model.lm_head.weight.numel())


class Made(TorchDispatchMode):
    """Counts, while it lasts, the new arrays of at least so many numbers."""

    def __init__(self, numbers: int):
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.numel() >= self.numbers:
                self.count += leaf.untyped_storage().data_ptr() not in known
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"nll_temperature": 0.5}, {"kl_direction": "ref_policy"}])
def test_slices_share_their_arrays(dtype, options, monkeypatch):
    monkeypatch.setattr(sliced_loss, "default_slice_length", lambda vocab_size: 8)
    made = []
    for slices in (1, 5):
        hidden, weight = torch.randn(8 * slices, 4, dtype=dtype), torch.randn(300, 4, dtype=dtype)
        ref, targets = Projection(hidden.clone(), weight[:290].clone()), torch.arange(8 * slices)
        with Made(8 * 290) as seen:
            quark_loss(Projection(hidden.requires_grad_(), weight), ref, targets, **COEFS, **options)
        made.append(seen.count)
    assert made[0] == made[1] > 0


def test_a_reference_may_be_of_another_type():
    types = torch.float16, torch.bfloat16
    policy, ref = (Projection(torch.randn(5, 3, dtype=dtype), torch.randn(8, 3, dtype=dtype)) for dtype in types)
    targets = torch.tensor([0, 5, 2, 7, 1])
    found = quark_loss(policy, ref, targets, **COEFS)
    expected = quark_loss_plain(policy.logits(), ref.logits(), targets, **COEFS)
    torch.testing.assert_close(found.kl, expected.kl, check_dtype=False, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("change", "reason"), [("scaled", "other logits"), ("doubled", "more than one"), ("low rank", "more than one")]
)
def test_a_head_that_is_no_plain_product_is_logged_once_and_its_logits_computed_whole(change, reason, caplog):
    model = untied_or_tied("llama", False).eval()
    if change == "scaled":
        model.config.logit_scale = 2.0  # LLaMA does not use it.
    elif change == "doubled":
        model.lm_head.register_forward_hook(lambda _module, _inputs, logits: 2 * logits)
    else:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])).eval()
    batch = build_batch(*rows_of_unequal_length())
    with caplog.at_level(logging.WARNING):
        head = decide_head_access(model, [3, 1, 4])
        assert head == WHOLE_LOGITS
        for _ in range(2):
            found = completion_projection(model, **batch, head=head)
            assert found.weight is None
            torch.testing.assert_close(found.logits(), completion_logits(model, **batch))
    (message,) = caplog.messages
    assert "llama" in message and reason in message


class ScaledInPlace(torch.nn.Linear):
    """A factor behind the product, 1 at first."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x).mul_(self.factor)


class Casting(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


def with_head(model, kind: type[torch.nn.Linear]):
    model.lm_head = kind(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    return model


ONLY_HEAD = {"task_type": "CAUSAL_LM", "target_modules": ["lm_head"]}
MORE_THAN_A_PRODUCT = {
    "factors behind": lambda model: get_peft_model(model, IA3Config(**ONLY_HEAD, feedforward_modules=[])),
    "factors before": lambda model: get_peft_model(model, IA3Config(**ONLY_HEAD, feedforward_modules=["lm_head"])),
    "a rotation": lambda model: get_peft_model(model, OFTConfig(**ONLY_HEAD, oft_block_size=4)),
    "in place": lambda model: with_head(model, ScaledInPlace),
    "a cast": lambda model: with_head(model.to(torch.bfloat16), Casting),
}


@pytest.mark.parametrize("kind", MORE_THAN_A_PRODUCT)
def test_a_head_that_does_more_than_a_product_learns_even_where_it_starts_as_one(kind):
    model = MORE_THAN_A_PRODUCT[kind](untied_or_tied("llama", False)).eval()
    batch = build_batch(*rows_of_unequal_length())
    targets = batch["labels"][batch["labels"] != -100]
    grads = []
    for logits in (projection_of, lambda model, batch: completion_logits(model, **batch)):
        model.zero_grad()
        quark_loss(logits(model, batch), None, targets, **COEFS).total.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    found, expected = grads
    assert found.keys() == expected.keys() and any(grad.norm() > 0.01 for grad in found.values())
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name])
    if kind != "a cast":  # It shows with hidden states of another type alone.
        assert not is_one_product(output_layer(model))


@pytest.mark.parametrize("reached", [True, False])
def test_a_batch_without_completions_gives_zeros(reached):
    model = with_head(untied_or_tied("llama", False), torch.nn.Linear if reached else ScaledInPlace).eval()
    projection = projection_of(model, build_batch([[257, 3, 4]], [[]]))
    assert (projection.weight is not None) == reached
    found = quark_loss(projection, None, torch.zeros(0, dtype=torch.long), **COEFS)
    found.total.backward()
    assert [part.item() for part in found] == [0, 0, 0, 0]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("scale", [None, 0.5, "inv_sqrt_d_model"])
def test_a_scale_in_the_config_is_taken_in_or_falls_back(scale):
    config = MptConfig(vocab_size=260, d_model=16, n_layers=1, n_heads=2, max_seq_len=64, logit_scale=scale)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = build_batch(*rows_of_unequal_length())
    found, expected = projection_of(model, batch), completion_logits(model, **batch)
    torch.testing.assert_close(found.logits(), expected)


def test_a_projections_logits_are_the_models():
    model = untied_or_tied("gemma2", True).eval()
    batch = build_batch(*rows_of_unequal_length())
    found, expected = projection_of(model, batch), completion_logits(model, **batch)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.logits(), expected)
    torch.testing.assert_close(found.limit_vocab(250).logits(slice(2, 4)), expected[2:4, :250])
