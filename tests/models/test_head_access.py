"""Whether logits can be computed in slices: decided once per model, and right for every kind of output layer."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.completions import EVERY_MODEL, TIED, add_lora, tied_or_untied, unequal_rows
from helpers.eight_letters import TOKENIZER
from helpers.runs import small_trainer
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, MptConfig

from quarkrl.algorithm.loss import quark_loss, quark_loss_plain
from quarkrl.models.batching import build_batch
from quarkrl.models.completion_logits import Projection, completion_logits, output_layer
from quarkrl.models.head_access import (
    WHOLE_LOGITS,
    HeadAccess,
    completion_projection,
    decide_head_access,
    is_one_product,
)

COEFS = {"kl_coef": 0.3, "entropy_coef": 0.1}
PROMPT = [3, 1, 4]
SHAPE = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def project(model, batch) -> Projection:
    """The projection that training gets from a model."""
    return completion_projection(model, **batch, head=decide_head_access(model, PROMPT))


# The decision


@EVERY_MODEL
@TIED
def test_the_logits_of_every_architecture_can_be_computed_in_slices(architecture, tied):
    model = tied_or_untied(architecture, tied)
    head = decide_head_access(model, PROMPT)
    assert head.sliced and head.own_weights and head.scale == 1
    assert is_one_product(output_layer(model))


@pytest.mark.parametrize(
    ("tied", "options", "own_weights"),
    [
        (True, {}, True),
        (False, {}, True),
        (False, {"modules_to_save": ["lm_head"]}, True),
        (False, {"trainable_token_indices": [3, 5]}, True),  # Those of the input embedding alone.
        (True, {"trainable_token_indices": [3, 5]}, False),
    ],
    ids=str,
)
def test_of_an_adapter_on_other_layers_or_on_rows_too(tied, options, own_weights):
    model = add_lora(tied_or_untied("llama", tied), **options)
    assert decide_head_access(model, PROMPT) == HeadAccess(sliced=True, own_weights=own_weights)
    with model.disable_adapter():
        assert decide_head_access(model, PROMPT) == HeadAccess(sliced=True)


@pytest.mark.parametrize(
    ("change", "reason"), [("scaled", "other logits"), ("doubled", "more than one"), ("low rank", "more than one")]
)
def test_a_layer_that_is_no_plain_product_is_logged_once_and_its_logits_are_computed_whole(change, reason, caplog):
    model = tied_or_untied("llama", False)
    if change == "scaled":
        model.config.logit_scale = 2.0  # LLaMA does not use it.
    elif change == "doubled":
        model.lm_head.register_forward_hook(lambda _module, _inputs, logits: 2 * logits)
    else:
        model = add_lora(model, target_modules=["lm_head"], init_lora_weights=True)
    batch = build_batch(*unequal_rows())
    with caplog.at_level(logging.INFO):
        head = decide_head_access(model, PROMPT)
        assert head == WHOLE_LOGITS
        for _ in range(2):
            projection = completion_projection(model, **batch, head=head)
            assert projection.weight is None
            torch.testing.assert_close(projection.logits(), completion_logits(model, **batch))
    (message,) = caplog.messages
    assert "llama" in message and reason in message


def test_the_decision_changes_nothing_in_a_model_that_is_training():
    model = tiny_model("gpt2", tiny_tokenizer(), resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    assert decide_head_access(model, PROMPT).sliced
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_token_is_enough_to_decide_on():
    assert decide_head_access(tied_or_untied("gpt2", True), [7]).sliced


def test_processes_decide_alike(monkeypatch):
    """One in which the layer is no product has all of them compute whole logits."""
    reduced = []

    def all_reduce(tensor, op):
        assert op == torch.distributed.ReduceOp.MIN
        reduced.append(tensor.item())
        tensor.zero_()  # Another process has said no.

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    model = tied_or_untied("llama", False)
    assert decide_head_access(model, PROMPT) == WHOLE_LOGITS
    adapted = add_lora(model, target_modules=["lm_head"])
    assert decide_head_access(adapted, PROMPT) == WHOLE_LOGITS
    assert reduced == [1, 0]  # Both take part, also one that knows without a comparison.


def test_a_sharded_layer_is_not_tried(caplog):
    model = tied_or_untied("llama", False)
    model.lm_head.weight.ds_id = 0  # As ZeRO stage 3 marks it.
    forward_passes = []
    model.register_forward_pre_hook(lambda *_: forward_passes.append(1))
    with caplog.at_level(logging.INFO):
        assert decide_head_access(model, PROMPT) == WHOLE_LOGITS
    assert not forward_passes and "sharded" in caplog.messages[0]


# Its use


class Counter(TorchDispatchMode):
    """Counts the calls of an operator while it is active."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == self.name
        return func(*args, **(kwargs or {}))


def test_a_forward_pass_neither_calls_the_layer_again_nor_reads_a_value_from_the_device():
    model = tied_or_untied("llama", False)
    batch = build_batch(*unequal_rows())
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with Counter("_local_scalar_dense") as reading:
        bool(torch.ones(()))
    assert reading.count == 1
    head = decide_head_access(model, PROMPT)
    calls.clear()
    with Counter("_local_scalar_dense") as learning:
        completion_projection(model, **batch, head=head)
    with Counter("_local_scalar_dense") as plain:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    assert learning.count == plain.count  # The model reads values of its mask.
    assert len(calls) == 2  # That of the projection, and the plain one.


@pytest.mark.parametrize(
    "options", [{}, {"trainable_token_indices": [3, 5]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_the_weights_are_those_of_the_moment(options):
    tied = "modules_to_save" not in options
    model = add_lora(tied_or_untied("llama", tied), **options)
    batch = build_batch(*unequal_rows())
    head = decide_head_access(model, PROMPT)
    before = completion_projection(model, **batch, head=head).logits()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    after = completion_projection(model, **batch, head=head)
    assert after.weight is not None and not torch.allclose(after.logits(), before)
    torch.testing.assert_close(after.logits(), completion_logits(model, **batch))


def test_a_layer_that_is_changed_after_the_decision_is_an_error():
    model = add_lora(tied_or_untied("llama", True), trainable_token_indices=[3, 5])
    head = decide_head_access(model, PROMPT)
    output_layer(model).register_forward_hook(lambda _module, _inputs, logits: 2 * logits)
    with pytest.raises(RuntimeError, match="output layer is no longer"):
        completion_projection(model, **build_batch(*unequal_rows()), head=head)


def test_a_projections_logits_are_the_models():
    model = tied_or_untied("gemma2", True)
    batch = build_batch(*unequal_rows())
    projection, logits = project(model, batch), completion_logits(model, **batch)
    assert projection.shape == logits.shape
    torch.testing.assert_close(projection.logits(), logits)
    torch.testing.assert_close(projection.limit_vocab(250).logits(slice(2, 4)), logits[2:4, :250])


@pytest.mark.parametrize(
    ("config", "scale"),
    [(CohereConfig(**SHAPE, logit_scale=0.25), 0.25), (GraniteConfig(**SHAPE, logits_scaling=8.0), 0.125)],
    ids=["a factor", "a divisor"],
)
def test_a_scale_of_the_logits_in_the_config_is_used(config, scale):
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = build_batch(*unequal_rows())
    assert decide_head_access(model, PROMPT) == HeadAccess(sliced=True, scale=scale)
    torch.testing.assert_close(project(model, batch).logits(), completion_logits(model, **batch))


@pytest.mark.parametrize("scale", [None, 0.5, "inv_sqrt_d_model"])
def test_a_scale_in_the_config_that_the_model_may_not_use_does_no_harm(scale):
    config = MptConfig(vocab_size=260, d_model=16, n_layers=1, n_heads=2, max_seq_len=64, logit_scale=scale)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = build_batch(*unequal_rows())
    torch.testing.assert_close(project(model, batch).logits(), completion_logits(model, **batch))


# The loss from projections


def compute_losses(model, reference, batch, way: str, direction="policy_ref", slice_length=None):
    """The loss and the gradients of all trained weights, from projections or from whole logits."""
    targets = batch["labels"][batch["labels"] != -100]
    model.zero_grad()
    if way == "projections":
        policy = project(model, batch)
        with torch.no_grad():
            ref = project(reference, batch).limit_vocab(250)
        assert policy.weight is not None and ref.weight is not None
        loss = quark_loss(policy, ref, targets, **COEFS, kl_direction=direction, slice_length=slice_length)
    else:
        policy = completion_logits(model, **batch)
        with torch.no_grad():
            ref = completion_logits(reference, **batch)[:, :250]
        loss = quark_loss_plain(policy, ref, targets, **COEFS, kl_direction=direction)
    (3 * loss.total).backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_projections_give_the_loss(model, reference, rtol=1e-5, direction="policy_ref", slice_length=None):
    batch = build_batch(*unequal_rows())
    loss, grads = compute_losses(model, reference, batch, "projections", direction, slice_length)
    plain_loss, plain_grads = compute_losses(model, reference, batch, "whole logits", direction)
    for value, plain_value in zip(loss, plain_loss, strict=True):
        torch.testing.assert_close(value, plain_value, rtol=rtol, atol=1e-6)
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        assert (grad - plain_grads[name]).norm() <= 10 * rtol * plain_grads[name].norm() + 1e-6, name


SLICE_LENGTHS = pytest.mark.parametrize("slice_length", [1, 3, 256])  # Of seven positions.


@EVERY_MODEL
@TIED
@SLICE_LENGTHS
def test_loss_and_gradient_from_projections_are_those_of_whole_logits(architecture, tied, slice_length):
    models = [tied_or_untied(architecture, tied, seed) for seed in (0, 1)]
    assert_projections_give_the_loss(*models, slice_length=slice_length)


@SLICE_LENGTHS
@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
def test_both_directions_and_a_cap_that_bends(direction, slice_length):
    models = [tiny_model("gemma2", tiny_tokenizer(bos=True), final_logit_softcapping=0.5, seed=s) for s in (0, 1)]
    assert_projections_give_the_loss(*models, direction=direction, slice_length=slice_length)


@SLICE_LENGTHS
def test_a_bias_in_the_output_layer(slice_length):
    models = [tied_or_untied("gpt2", False, seed) for seed in (0, 1)]
    for model in models:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features))
    assert_projections_give_the_loss(*models, slice_length=slice_length)


@TIED
@pytest.mark.parametrize(
    "options", [{}, {"trainable_token_indices": [3, 5]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_under_an_adapter(tied, options):
    if tied and "modules_to_save" in options:
        pytest.skip("peft ties no copies")
    assert_projections_give_the_loss(add_lora(tied_or_untied("llama", tied), **options), tied_or_untied("llama", tied))


def test_with_gradient_checkpointing():
    model = tied_or_untied("llama", True).train()
    model.gradient_checkpointing_enable()
    assert_projections_give_the_loss(model, tied_or_untied("llama", True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_dtypes(dtype):
    models = [tied_or_untied("llama", True).to(dtype) for _ in range(2)]
    assert_projections_give_the_loss(*models, rtol=1e-12 if dtype == torch.float64 else 2e-3)


def test_under_autocast():
    models = [tied_or_untied("gpt2", True, seed) for seed in (0, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        assert_projections_give_the_loss(*models, rtol=4e-3)
    assert_projections_give_the_loss(*models)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that a tensor has while this is active."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_neither_model_nor_loss_nor_backward_pass_has_a_tensor_of_tokens_times_vocabulary():
    model = tiny_model("llama", tiny_tokenizer(bos=True), rows=2000)
    tokens = 30 * 20
    batch = build_batch([[257, 3]] * 30, [list(range(20))] * 30)
    largest = {}
    for way in ("projections", "whole logits"):
        with LargestTensor() as seen:
            compute_losses(model, model, batch, way, slice_length=8)
        largest[way] = seen.elements
    assert largest["whole logits"] >= tokens * 2000
    assert largest["projections"] <= max(8 * 2000, model.lm_head.weight.numel())


# Output layers that are more than a product


class ScaledInPlace(torch.nn.Linear):
    """A trained factor behind the product, 1 at first."""

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
    "low rank": lambda model: get_peft_model(model, LoraConfig(**ONLY_HEAD)),
    "factors behind": lambda model: get_peft_model(model, IA3Config(**ONLY_HEAD, feedforward_modules=[])),
    "factors before": lambda model: get_peft_model(model, IA3Config(**ONLY_HEAD, feedforward_modules=["lm_head"])),
    "a rotation": lambda model: get_peft_model(model, OFTConfig(**ONLY_HEAD, oft_block_size=4)),
    "in place": lambda model: with_head(model, ScaledInPlace),
    "a cast": lambda model: with_head(model.to(torch.bfloat16), Casting),
}


@pytest.mark.parametrize("kind", MORE_THAN_A_PRODUCT)
def test_a_layer_that_does_more_than_a_product_learns_even_where_it_starts_as_one(kind):
    model = MORE_THAN_A_PRODUCT[kind](tied_or_untied("llama", False)).eval()
    batch = build_batch(*unequal_rows())
    targets = batch["labels"][batch["labels"] != -100]
    assert decide_head_access(model, PROMPT) == WHOLE_LOGITS
    gradients = []
    for logits in (project(model, batch), completion_logits(model, **batch)):
        model.zero_grad()
        quark_loss(logits, None, targets, **COEFS).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    grads, expected = gradients
    assert grads.keys() == expected.keys() and any(grad.norm() > 0.01 for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])
    if kind != "a cast":  # It shows only with hidden states of another dtype.
        assert not is_one_product(output_layer(model))


@pytest.mark.parametrize("sliced", [True, False])
def test_a_batch_without_completions_gives_zeros(sliced):
    model = with_head(tied_or_untied("llama", False), torch.nn.Linear if sliced else ScaledInPlace).eval()
    projection = project(model, build_batch([[257, 3, 4]], [[]]))
    assert (projection.weight is not None) == sliced
    loss = quark_loss(projection, None, torch.zeros(0, dtype=torch.long), **COEFS)
    loss.total.backward()
    assert [part.item() for part in loss] == [0, 0, 0, 0]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.lm_head.weight.grad is not None


# In a run


def test_a_run_decides_before_it_learns_and_says_it_once(tmp_path, caplog):
    on_the_head = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = tiny_model("llama", TOKENIZER, tied=False)
    trainer = small_trainer(tmp_path, model=model, peft_config=on_the_head)
    forward_passes = []
    output_layer(trainer.model).register_forward_pre_hook(lambda *_: forward_passes.append(len(caplog.messages)))
    with caplog.at_level(logging.WARNING, logger="quarkrl"):
        trainer.train()
    assert [message for message in caplog.messages if "computed whole" in message] == caplog.messages
    assert len(caplog.messages) == 1  # The reference is the same model, without its adapter.
    assert forward_passes.count(0) <= 2 < forward_passes.count(1)
